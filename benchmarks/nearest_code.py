"""nearest_code beside cdist and argmin, and beside the short form as a product and argmin.

The peers hold all N x K distances, and neither of them settles ties: their argmin may differ from ours where
distances are equal or closer than float32 can tell.
"""

import torch

from benchmarks.harness import Case, Variant
from tokenbook.kernels.nearest_code import nearest_code

SHAPES = {
    "tokens of images, small codes": {"N": 20000, "K": 4096, "D": 32},
    "speech frames": {"N": 8000, "K": 1000, "D": 256},
    "clusters of a clip": {"N": 11664, "K": 32, "D": 896},
}


def cases(device: torch.device) -> list[Case]:
    return [_case(name, shape) for name, shape in SHAPES.items()]


def _case(name, shape) -> Case:
    n, n_codes, width = shape.values()

    def build(device):
        torch.manual_seed(0)
        x, codebook = torch.randn(n, width, device=device), torch.randn(n_codes, width, device=device)
        return {
            "nearest_code": lambda: nearest_code(x, codebook),
            "cdist + argmin": lambda: torch.cdist(x, codebook).argmin(1),
            "product + argmin": Variant(
                lambda: torch.addmm(codebook.square().sum(1) / 2, x, codebook.T, alpha=-1).argmin(1),
                note="no distance, ties at random",
            ),
        }

    moved = 4 * (n + n_codes) * width + 12 * n  # vectors and codes read, index and distance written
    return Case(name, shape, "float32", "forward", build, moved)
