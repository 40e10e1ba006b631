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
import functools
import math

import torch

LAYOUTS = ("half", "interleaved")
MAX_HEAD_WIDTH = 1024  # of the Triton kernel: one row of pairs stays in registers
BLOCK_ELEMENTS = 2**18  # of the CPU path: a block and its temporaries stay in the second-level cache


@dataclasses.dataclass(frozen=True)
class Rotation:
    """What to rotate by: positions (an int, or a tensor [B or 1, S or 1, A]) and frequencies w [P]."""

    positions: int | torch.Tensor
    freqs: torch.Tensor
    layout: str = "half"
    pairs_per_axis: int = 0  # 0: all pairs belong to axis 0

    def inverse(self) -> "Rotation":
        return dataclasses.replace(self, positions=-self.positions)


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
    n_pairs = len(rotation.freqs)
    width = 2 * n_pairs
    if rotation.layout == "half":
        first, second = slice(0, n_pairs), slice(n_pairs, width)
    else:
        first, second = slice(0, width, 2), slice(1, width, 2)
    cos, sin = (t.unsqueeze(1) for t in phases(rotation, dtype))  # [B or 1, 1, S or 1, P]
    cos = torch.cat((cos, cos), -1) if rotation.layout == "half" else cos.repeat_interleave(2, -1)
    in_place = out.data_ptr() == x.data_ptr()
    if not in_place and width < x.shape[-1]:
        out[..., width:] = x[..., width:]
    for block in _blocks(x.shape[:3], width, x.device.type):
        source, target = x[block][..., :width], out[block][..., :width]
        c, s = _narrow(cos, block), _narrow(sin, block)
        copies = in_place and source.dtype == dtype
        source = source.clone() if copies else source.to(dtype)
        turned = torch.mul(source, c, out=target) if target.dtype == dtype else source * c
        turned[..., first].addcmul_(source[..., second], s, value=-1)
        turned[..., second].addcmul_(source[..., first], s)
        if turned is not target:
            target.copy_(turned)
    return out


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


def rotate_triton(x, rotation: Rotation | None, out, moves: torch.Tensor | None = None, block=None):
    """Launch the kernel. `moves` [2, S_moved] int64: the row read and the row written, by moved position.

    A rotation of None copies. `block` = (positions, heads, warps) per program overrides `launch_shape`.
    """
    batch, heads, n_rows, width = x.shape
    n_rows = n_rows if moves is None else moves.shape[1]
    n_pairs = 0 if rotation is None else len(rotation.freqs)
    positions = 0 if rotation is None else rotation.positions
    is_scalar = isinstance(positions, int)
    table = x if is_scalar else positions.expand(batch, n_rows, positions.shape[-1])
    n_axes = 1 if is_scalar else table.shape[-1]
    interleaved = rotation is not None and rotation.layout == "interleaved"
    rows, group, warps = block or launch_shape(batch, heads, n_rows, max(n_pairs, (width + 1) // 2))
    grid = (batch * -(-heads // group) * -(-n_rows // rows),)
    _kernel()[grid](
        x, out, table, x if rotation is None else rotation.freqs, x if moves is None else moves,
        positions if is_scalar else 0, n_rows, heads, *x.stride(), *out.stride(),
        *(table.stride() if not is_scalar else (0, 0, 0)),
        N_PAIRS=n_pairs, STEP=2 if interleaved else 1, PARTNER=1 if interleaved else n_pairs,
        PAIRS_PER_AXIS=(rotation.pairs_per_axis if rotation else 0) or max(n_pairs, 1), N_AXES=n_axes,
        WIDTH=width, SCALAR=is_scalar, MOVED=moves is not None,
        ROWS=rows, GROUP=group, PAIRS=_power_of_two(n_pairs), TAIL=_power_of_two(width - 2 * n_pairs),
        num_warps=warps,
    )  # fmt: skip
    return out


def launch_shape(batch: int, heads: int, n_rows: int, n_pairs: int) -> tuple[int, int, int]:
    """(positions, heads, warps) per program: about 2048 pairs at once; heads share the angles while programs
    are plenty (several for each multiprocessor). No autotuning: it would rotate a tensor in place repeatedly.
    """
    rows = max(1, min(2048 // _power_of_two(n_pairs), _power_of_two(n_rows)))
    group = 8
    while group > 1 and batch * -(-heads // group) * -(-n_rows // rows) < 1024:
        group //= 2
    return rows, min(group, heads), 4


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def _kernel():
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["shift"])
    def rotate_rows(
        x_ptr, out_ptr, positions_ptr, freqs_ptr, moves_ptr, shift, n_rows, n_heads,
        x_b, x_h, x_s, x_d, out_b, out_h, out_s, out_d, p_b, p_s, p_a,
        N_PAIRS: tl.constexpr, STEP: tl.constexpr, PARTNER: tl.constexpr, PAIRS_PER_AXIS: tl.constexpr,
        N_AXES: tl.constexpr, WIDTH: tl.constexpr, SCALAR: tl.constexpr, MOVED: tl.constexpr,
        ROWS: tl.constexpr, GROUP: tl.constexpr, PAIRS: tl.constexpr, TAIL: tl.constexpr,
    ):  # fmt: skip
        n_blocks = tl.cdiv(n_rows, ROWS)
        n_groups = tl.cdiv(n_heads, GROUP)
        program = tl.program_id(0)
        batch = (program // (n_blocks * n_groups)).to(tl.int64)
        first_head = (program // n_blocks) % n_groups * GROUP
        row = (program % n_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        live = row < n_rows
        read, written = row, row
        if MOVED:
            read = tl.load(moves_ptr + row, mask=live, other=0)
            written = tl.load(moves_ptr + n_rows + row, mask=live, other=0)
        x_row = x_ptr + batch * x_b + read[:, None] * x_s
        out_row = out_ptr + batch * out_b + written[:, None] * out_s
        if N_PAIRS > 0:
            pair = tl.arange(0, PAIRS)[None, :]
            mask = live[:, None] & (pair < N_PAIRS)
            freq = tl.load(freqs_ptr + pair, mask=pair < N_PAIRS, other=0.0).to(tl.float64)
            if SCALAR:
                angle = tl.zeros([ROWS, PAIRS], tl.float64) + shift.to(tl.float64) * freq
            else:
                axis = tl.minimum(pair // PAIRS_PER_AXIS, N_AXES - 1)
                offset = batch * p_b + row[:, None] * p_s + axis * p_a
                angle = tl.load(positions_ptr + offset, mask=mask, other=0).to(tl.float64) * freq
            turns = angle * 0.15915494309189535  # 1 / (2 pi)
            angle = ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(tl.float32)
            cos, sin = tl.cos(angle), tl.sin(angle)
        for i in range(GROUP):
            head = (first_head + i).to(tl.int64)
            here = head < n_heads
            if N_PAIRS > 0:
                x_pair = x_row + head * x_h + pair * STEP * x_d
                out_pair = out_row + head * out_h + pair * STEP * out_d
                a = tl.load(x_pair, mask=mask & here, other=0.0).to(tl.float32)
                b = tl.load(x_pair + PARTNER * x_d, mask=mask & here, other=0.0).to(tl.float32)
                kind = out_ptr.dtype.element_ty
                tl.store(out_pair, (a * cos - b * sin).to(kind), mask=mask & here)
                tl.store(out_pair + PARTNER * out_d, (b * cos + a * sin).to(kind), mask=mask & here)
            if WIDTH > 2 * N_PAIRS:
                column = 2 * N_PAIRS + tl.arange(0, TAIL)[None, :]
                kept = live[:, None] & (column < WIDTH) & here
                tail = tl.load(x_row + head * x_h + column * x_d, mask=kept, other=0.0)
                tl.store(out_row + head * out_h + column * out_d, tail, mask=kept)

    return rotate_rows
