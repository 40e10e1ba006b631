"""The rotation of channel pairs that `rope_shift`, `rope_splice` and `rope_nd` share.

Pair c of a head, channels (a, b), at a position with coordinates p_0..p_{A-1} becomes

    a' = a cos t - b sin t,   b' = b cos t + a sin t,   t = p_{axis(c)} w_c,   axis(c) = c // pairs_per_axis

Layout "half": pair c is channels (c, c + P), P = number of pairs; "interleaved": channels (2c, 2c + 1).
Channels from 2P on are copied. With one axis this is the usual rotary embedding.

Delicate: t reaches thousands of radians. Both paths multiply and take off whole turns in float64, which
costs little beside the memory traffic (once per position and pair, not per head), and only then go to
float32: the angle is good to 1e-6 at any position, where float32 alone is off by 2e-4 at position 4096 and
bfloat16 by whole turns. The rotation is float32 (float64 for float64 tensors), rounded once to the dtype.

Complexity: O(B H S D) operations, one read and one write of the tensor: bound by memory.
"""

import dataclasses
import math

import torch

from tokenbook.kernels._rotation_triton import MAX_HEAD_WIDTH, rotate_triton

LAYOUTS = ("half", "interleaved")
BLOCK_ELEMENTS = 2**19  # of the CPU path: blocks this small stay in cache, and Python's share stays small


@dataclasses.dataclass(frozen=True)
class Rotation:
    """What to rotate by: positions (an int, or a tensor [B or 1, S or 1, A]) and frequencies w [P]."""

    positions: int | torch.Tensor
    freqs: torch.Tensor
    layout: str = "half"
    pairs_per_axis: int = 0  # 0: all pairs belong to axis 0
    # cos and sin by dtype, for the torch path: made once for queries and keys, forward and backward
    tables: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def inverse(self) -> "Rotation":
        tables = {dtype: (cos, -sin) for dtype, (cos, sin) in self.tables.items()}
        return dataclasses.replace(self, positions=-self.positions, tables=tables)


def check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")


def check_heads(name: str, x: torch.Tensor) -> None:
    """A tensor [B, H, S, D] of a real floating dtype; S may be 0 (an empty suffix is legal), the rest not."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        given = str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a floating tensor [B, H, S, D], got {given}")
    if x.dim() != 4 or 0 in (x.shape[0], x.shape[1], x.shape[3]):
        raise ValueError(f"{name} must be [B, H, S, D] with B, H, D >= 1, got {list(x.shape)}")


def check_freqs(name: str, freqs: torch.Tensor) -> None:
    """Frequencies in float32 or float64: in half precision angles are wrong by whole turns."""
    if not isinstance(freqs, torch.Tensor) or freqs.dim() != 1 or freqs.numel() == 0:
        given = list(freqs.shape) if isinstance(freqs, torch.Tensor) else type(freqs).__name__
        raise ValueError(f"{name} must be a tensor [rotary_dim / 2] with at least one element, got {given}")
    if freqs.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} must be float32 or float64, got {freqs.dtype}: angles would be wrong by turns"
        )


def unsupported(name: str, x: torch.Tensor) -> str | None:
    """Why the Triton kernel cannot take this tensor, if so."""
    if x.shape[3] > MAX_HEAD_WIDTH:
        return f"{name}'s head width is {x.shape[3]} and the kernel holds up to {MAX_HEAD_WIDTH}"
    return None


def span(x: torch.Tensor) -> tuple[int, int]:
    """First and last byte address (exclusive) that a strided tensor touches."""
    last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def check_out(out: torch.Tensor, x: torch.Tensor, shape: list[int], in_place: bool) -> None:
    """An output of the given shape that shares no memory with x, unless it is x itself and may be."""
    if not isinstance(out, torch.Tensor) or list(out.shape) != shape:
        given = list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise ValueError(f"out must be a tensor {shape}, got {given}")
    if out.dtype != x.dtype:
        raise ValueError(f"out must have k's dtype {x.dtype}, got {out.dtype}")
    if any(stride == 0 and n > 1 for n, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError("out must not be an expanded tensor: several of its elements share one address")
    same = out.data_ptr() == x.data_ptr() and out.stride() == x.stride() and out.shape == x.shape
    (low, high), (first, last) = span(out), span(x)
    if out.device == x.device and low < last and first < high and not (same and in_place):
        raise ValueError("out must be k itself or share no memory with it" if in_place else "out overlaps k")
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError(
            "out cannot be given where a gradient is wanted; leave it out or use torch.no_grad()"
        )


def phases(rotation: Rotation, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every pair's angle, [B or 1, S or 1, P]."""
    freqs, positions = rotation.freqs.double(), rotation.positions
    if isinstance(positions, int):
        angle = (positions * freqs).view(1, 1, -1)
    else:
        positions = positions.double()
        if rotation.pairs_per_axis:
            axis = torch.arange(len(freqs), device=freqs.device) // rotation.pairs_per_axis
            positions = positions[..., axis.clamp(max=positions.shape[-1] - 1)]
        angle = positions * freqs
    if dtype != torch.float64:  # whole turns off before the angle is rounded
        turns = angle / (2 * math.pi)
        angle = ((turns - turns.round()) * (2 * math.pi)).to(dtype)
    return angle.cos(), angle.sin()


def rotate_reference(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """The definition, x cos + rotate_half(x) sin, in float64; differentiable; in x's dtype."""
    width = 2 * len(rotation.freqs)
    cos, sin = (t.unsqueeze(1) for t in phases(rotation, torch.float64))
    turned, tail = x[..., :width].double(), x[..., width:]
    if rotation.layout == "half":
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        a, b = turned.chunk(2, -1)
        quarter_turn = torch.cat((-b, a), -1)
    else:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        quarter_turn = torch.stack((-turned[..., 1::2], turned[..., 0::2]), -1).flatten(-2)
    return torch.cat(((turned * cos + quarter_turn * sin).to(x.dtype), tail), -1)


def rotate(x: torch.Tensor, rotation: Rotation, out: torch.Tensor | None, backend: str) -> torch.Tensor:
    """Rotate on a chosen backend; differentiable in x where `out` is None."""
    if backend == "reference":
        result = rotate_reference(x, rotation)
        return result if out is None else out.copy_(result)
    if out is None and torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, rotation, backend)
    out = torch.empty_like(x) if out is None else out
    if x.numel() == 0:
        return out
    return rotate_triton(x, rotation, out) if backend == "triton" else rotate_torch(x, rotation, out)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the inverse rotation of the gradient; nothing of x needs to be kept."""

    @staticmethod
    def forward(ctx, x, rotation, backend):
        ctx.rotation, ctx.backend = rotation, backend
        positions = rotation.positions if isinstance(rotation.positions, torch.Tensor) else None
        ctx.save_for_backward(rotation.freqs, positions)
        return rotate(x.detach(), rotation, None, backend)

    @staticmethod
    def backward(ctx, grad):
        _ = ctx.saved_tensors  # raises if positions or frequencies were changed in place since
        return rotate(grad, ctx.rotation.inverse(), None, ctx.backend), None, None


def rotate_torch(x: torch.Tensor, rotation: Rotation, out: torch.Tensor) -> torch.Tensor:
    """Block by block, so that no temporary leaves the cache; writes `out`, which may be x."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if dtype not in rotation.tables:
        rotation.tables[dtype] = _phases_once(rotation, dtype)
    cos, sin = (table.unsqueeze(1) for table in rotation.tables[dtype])  # [B or 1, 1, S or 1, P]
    if rotation.layout == "half":
        turn, tables = _turn_halves, (torch.cat((cos, cos), -1), sin)
    else:
        turn, tables = _turn_neighbours, (torch.complex(cos, sin),)
    width, in_place = 2 * len(rotation.freqs), out.data_ptr() == x.data_ptr()
    if not in_place and width < x.shape[-1]:
        out[..., width:] = x[..., width:]
    for block in _blocks(x.shape[:3], width, x.device.type):
        source, target = x[block][..., :width], out[block][..., :width]
        # What is written must not be read again: in place, the block is copied first.
        source = source.clone() if in_place and source.dtype == dtype else source.to(dtype)
        result = target if target.dtype == dtype else torch.empty_like(source)
        turn(source, result, *(_narrow(table, block) for table in tables))
        if result is not target:
            target.copy_(result)
    return out


def _phases_once(rotation: Rotation, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`phases`, with each integer shift's angles made once: a few edits make few shifts of many positions."""
    positions = rotation.positions
    if isinstance(positions, int) or positions.is_floating_point() or positions.shape[-1] != 1:
        return phases(rotation, dtype)
    shifts, where = positions.squeeze(-1).unique(return_inverse=True)
    cos, sin = phases(dataclasses.replace(rotation, positions=shifts.view(1, -1, 1), tables={}), dtype)
    return cos[0][where], sin[0][where]


def _turn_halves(source, result, cos, sin) -> None:
    n = sin.shape[-1]
    torch.mul(source, cos, out=result)
    result[..., :n].addcmul_(source[..., n:], sin, value=-1)
    result[..., n:].addcmul_(source[..., :n], sin)


def _turn_neighbours(source, result, phase) -> None:
    """Neighbouring channels are complex numbers: one product (five times faster here than strided halves)."""
    pairs = _as_complex(source)
    if pairs is None:
        pairs = _as_complex(source.contiguous())
    target = _as_complex(result)
    if target is None:
        result.copy_(torch.view_as_real(pairs * phase).flatten(-2))
    else:
        torch.mul(pairs, phase, out=target)


def _as_complex(x: torch.Tensor) -> torch.Tensor | None:
    """x [..., 2P] as complex [..., P] on the same memory, or None where strides or offset do not allow it."""
    if x.stride(-1) != 1 or any(stride % 2 for stride in x.stride()[:-1]) or x.storage_offset() % 2:
        return None
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _blocks(shape, width: int, device_type: str):
    """Index triples over B, H, S of at most BLOCK_ELEMENTS elements each; one block on an accelerator."""
    steps, room = [], BLOCK_ELEMENTS // width if device_type == "cpu" else math.prod(shape)
    for n in reversed(shape):
        steps.append(max(1, min(n, room)))
        room //= steps[-1]
    ranges = [range(0, n, step) for n, step in zip(shape, reversed(steps), strict=True)]
    for b in ranges[0]:
        for h in ranges[1]:
            for s in ranges[2]:
                yield tuple(slice(i, i + r.step) for i, r in zip((b, h, s), ranges, strict=True))


def _narrow(table: torch.Tensor, block) -> torch.Tensor:
    """The block's part of a table [B or 1, 1, S or 1, ...]."""
    table = table[block[0]] if table.shape[0] > 1 else table
    return table[:, :, block[2]] if table.shape[2] > 1 else table
