"""rope_shift, rope_splice and rope_nd against eager rotate_half, torch.compile and Liger's kernel.

The shift is what an edit of a cached file costs in one layer: 16 heads of 128 channels over 8192 positions,
the keys of DeepSeek-Coder 1.3B, and a cache small enough for a laptop's caches.
"""

import importlib.util

import torch

from benchmarks.harness import Case, Variant
from tokenbook.kernels.rope import rope_shift, rope_splice
from tokenbook.kernels.rope_nd import axis_frequencies, rope_nd

TESTS = ["tests/kernels/test_rope.py", "tests/kernels/test_rope_nd.py"]
DELTA = 57


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def eager(k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As transformers' models do it, in float32 so that it is as exact as the rest."""
    k32 = k.float()
    return (k32 * cos + rotate_half(k32) * sin).to(k.dtype)


def tables(positions: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angle = (positions.double()[..., None] * inv_freq.double()).to(torch.float32)
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def cases(device: torch.device) -> list[Case]:
    dtypes = [torch.float32, torch.bfloat16]
    sizes = [(8, 1024, 64), (16, 8192, 128)]
    return [
        *(
            shift_case(dtype, *size, by_position)
            for dtype in dtypes
            for size in sizes
            for by_position in (0, 1)
        ),
        *(splice_case(dtype, *sizes[1]) for dtype in dtypes),
        nd_case(torch.float32, 12, 1024, 64),
    ]


def shift_case(dtype, heads: int, n: int, width: int, by_position: bool) -> Case:
    def build(device):
        k = torch.randn(1, heads, n, width, device=device).to(dtype)
        inv_freq = 100_000.0 ** (-torch.arange(0, width, 2, device=device).float() / width)
        delta = torch.randint(-99, 99, (n,), device=device) if by_position else DELTA
        cos, sin = tables(torch.as_tensor(delta, device=device).reshape(-1), inv_freq)
        out, scratch = torch.empty_like(k), k.clone()
        compiled = torch.compile(eager)
        return {
            "rope_shift": lambda: rope_shift(k, delta, inv_freq),
            "rope_shift, out given": lambda: rope_shift(k, delta, inv_freq, out=out),
            "rope_shift, in place": lambda: rope_shift(scratch, delta, inv_freq, out=scratch),
            "eager rotate_half": Variant(lambda: eager(k, cos, sin), "cos and sin made beforehand"),
            "torch.compile": Variant(lambda: compiled(k, cos, sin), "cos and sin made beforehand", True),
            "Liger": Variant(liger(k, cos, sin), "turns a query of one head too", True),
        }

    name = "shift by position" if by_position else "shift by one number"
    shape = {"B": 1, "H": heads, "S": n, "D": width}
    return Case(name, shape, _name(dtype), "forward", build, 2 * heads * n * width * dtype.itemsize)


def liger(k, cos, sin):
    """Liger's rotary kernel, fed with the shift's cos and sin; it turns queries and keys, in place."""

    def run():
        if importlib.util.find_spec("liger_kernel") is None:
            raise RuntimeError("liger_kernel is not installed")
        from liger_kernel.ops.rope import LigerRopeFunction

        n = k.shape[2]
        return LigerRopeFunction.apply(k[:, :1].clone(), k, cos.expand(1, n, -1), sin.expand(1, n, -1))

    return run


def splice_case(dtype, heads: int, n: int, width: int) -> Case:
    """Three edits: the four kept segments move by 0, 40, -20 and 17."""
    quarter, moves = n // 4, (0, 40, -20, 17)
    segments = [(i * quarter, (i + 1) * quarter - 64, i * quarter + move) for i, move in enumerate(moves)]
    moved = sum(stop - start for start, stop, _ in segments)

    def build(device):
        k = torch.randn(1, heads, n, width, device=device).to(dtype)
        inv_freq = 100_000.0 ** (-torch.arange(0, width, 2, device=device).float() / width)
        out = k.new_zeros(1, heads, n + 64, width)
        angles = [tables(torch.tensor([new - start], device=device), inv_freq) for start, _, new in segments]

        def eager_splice():
            for (start, stop, new), (cos, sin) in zip(segments, angles, strict=True):
                out[:, :, new : new + stop - start] = eager(k[:, :, start:stop], cos, sin)

        return {
            "rope_splice": lambda: rope_splice(k, segments, inv_freq, out),
            "rope_splice, values": lambda: rope_splice(k, segments, None, out),
            "eager rotate_half by segment": Variant(eager_splice, "cos and sin made beforehand"),
        }

    shape = {"B": 1, "H": heads, "S": n, "D": width, "segments": len(segments)}
    return Case("splice", shape, _name(dtype), "forward", build, 2 * heads * moved * width * dtype.itemsize)


def nd_case(dtype, heads: int, n: int, width: int) -> Case:
    """Uni-3DAR's attention: 3 axes, queries and keys of 12 heads, training, so forward and backward."""

    def build(device):
        q, k = (torch.randn(2, heads, n, width, device=device).to(dtype).requires_grad_() for _ in range(2))
        positions = torch.rand(2, n, 3, device=device) * 1536
        freqs, per_axis = axis_frequencies(width, 3, device=device), width // 6
        axis = (torch.arange(width // 2, device=device) // per_axis).clamp(max=2)
        phase = torch.polar(torch.ones((), device=device), (positions[..., axis] * freqs).float()).unsqueeze(
            1
        )

        def complex_form(q, k):
            pairs = (torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * phase for x in (q, k))
            return tuple(torch.view_as_real(x).flatten(-2).to(q.dtype) for x in pairs)

        grad = torch.randn_like(q)

        def both(rotate):
            return lambda: torch.autograd.grad(rotate(q, k), (q, k), (grad, grad))

        return {
            "rope_nd": both(lambda q, k: rope_nd(q, k, positions)),
            "complex multiplication": Variant(both(complex_form), "phases made beforehand"),
        }

    shape = {"B": 2, "H": heads, "T": n, "D": width, "axes": 3}
    return Case("rope_nd", shape, _name(dtype), "both", build, 8 * 2 * heads * n * width * dtype.itemsize)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
