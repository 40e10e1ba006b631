"""pair_shift beside log_softmax and kl_div, eager and compiled."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Case, Variant
from tokenbook.kernels.pair_shift import pair_shift

SHAPES = {
    "small model, a batch of text": {"N": 2048, "V": 4096},
    "large vocabulary": {"N": 32, "V": 151_936},
}


def peer(x, y, ids):
    """The same seven numbers by torch's own functions."""
    log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
    z = ids[:, None]
    return (
        F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1),
        (x > x.gather(-1, z)).sum(-1),
        (y > y.gather(-1, z)).sum(-1),
        log_p.gather(-1, z),
        log_q.gather(-1, z),
        x.argmax(-1),
        y.argmax(-1),
    )


def cases(device: torch.device) -> list[Case]:
    dtypes = ("float32", "bfloat16") if device.type == "cuda" else ("float32",)
    return [_case(name, shape, dtype) for name, shape in SHAPES.items() for dtype in dtypes]


def _case(name, shape, dtype) -> Case:
    n, n_vocabulary = shape.values()
    real = getattr(torch, dtype)

    def build(device):
        torch.manual_seed(0)
        x = 3 * torch.randn(n, n_vocabulary, device=device)
        y = (x + torch.randn_like(x)).to(real)
        x, ids = x.to(real), torch.randint(n_vocabulary, (n,), device=device)
        digits = "KL to about 1e-7 nats"
        compiled = torch.compile(lambda: peer(x.float(), y.float(), ids), dynamic=False)
        return {
            "pair_shift": Variant(lambda: pair_shift(x, y, ids), "KL to 1e-3 of itself at 1e-9 nats"),
            "eager log_softmax, kl_div": Variant(
                lambda: peer(x.float(), y.float(), ids), "KL to about 1e-7 nats"
            ),
            "torch.compile": Variant(compiled, digits, optional=True),
        }

    return Case(name, shape, dtype, "forward", build, 2 * real.itemsize * n * n_vocabulary)
