"""The Triton kernel of `_rotation`: gather rows, rotate pairs, write rows; imports Triton on launch."""

import functools

import torch

MAX_HEAD_WIDTH = 1024  # one row of pairs stays in registers


def rotate_triton(x, rotation, out, moves: torch.Tensor | None = None, block=None):
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
