"""segment_mean beside index_add_, scatter_reduce and a product with the one-hot matrix."""

import torch

from benchmarks.harness import Case
from tokenbook.kernels.segment_mean import segment_mean

SHAPES = {
    "cluster means of a clip": {"B": 1, "N": 11664, "D": 896, "K": 32},
    "activations by token": {"B": 1, "N": 50000, "D": 128, "K": 2000},
}


def cases(device: torch.device) -> list[Case]:
    return [_case(name, shape, way) for name, shape in SHAPES.items() for way in ("forward", "both")]


def _case(name, shape, direction) -> Case:
    _, n, width, n_segments = shape.values()

    def build(device):
        torch.manual_seed(0)
        x = torch.randn(n, width, device=device).requires_grad_(direction == "both")
        segments = torch.randint(n_segments, (n,), device=device)
        dmean = torch.randn(n_segments, width, device=device)
        wide = segments[:, None].expand(-1, width)

        def counted(sums):
            return sums / torch.bincount(segments, minlength=n_segments).clamp(min=1)[:, None]

        zeros = torch.zeros(n_segments, width, device=device)
        means = {
            "segment_mean": lambda: segment_mean(x, segments, n_segments, empty="zero").mean,
            "index_add": lambda: counted(zeros.index_add(0, segments, x)),
            "scatter_reduce": lambda: zeros.scatter_reduce(0, wide, x, "mean", include_self=False),
            "one-hot product": lambda: counted(torch.nn.functional.one_hot(segments, n_segments).to(x).T @ x),
        }
        if direction == "forward":
            return means
        return {key: lambda mean=mean: torch.autograd.grad(mean(), x, dmean) for key, mean in means.items()}

    forward = 4 * n * width + 8 * n + 4 * n_segments * width  # rows and segments read, means written
    moved = forward if direction == "forward" else 2 * forward
    return Case(name, shape, "float32", direction, build, moved)
