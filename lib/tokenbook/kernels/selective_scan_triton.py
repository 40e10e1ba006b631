"""Triton kernels of `selective_scan`, forward and backward, every step fused.

A program owns one batch row and BLOCK_D channels, keeps the state [BLOCK_D, N] in registers and walks along
L. Values are upcast to float32 right behind the load; row offsets are int64. Any strides are taken: channels
last ([B, L, D] in memory, seen as [B, D, L]) is read whole sectors at a time, while with L last the eight
float32 neighbours of a sector are met in the eight following steps and come from L1.

The forward pass saves the state at every CHUNK-th step. The backward pass takes the chunks from the last to
the first: it computes a chunk's states again into a scratch buffer, then walks back through them. Sums over
programs (A, D, delta_bias over the batch; B and C over channel blocks) go through buffers that torch adds up
afterwards: no atomics, so two runs agree to the bit.

Floor: the forward pass must read u, delta, B, C (z, delta_decay) and write y, the backward pass must read
these and dy and write every gradient. On recent GPUs the exponentials can weigh more than the bytes: B D L N
of them forward and twice that backward, 16 a clock and multiprocessor. `floor_bytes` and `exponentials` give
both, and the benchmark prints them.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from tokenbook.kernels._dispatch import interpreting

CHUNK = 16
BLOCK_D = 32
# Few warps: a program is one walk along L, and the batch supplies the parallelism.
CONFIGS = [triton.Config({}, num_warps=w) for w in (1, 2, 4)]
if interpreting():
    CONFIGS = CONFIGS[:1]  # there is nothing to time


def selective_scan_triton(u, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_decay) -> torch.Tensor:
    """The scan on checked tensors; arguments as in `selective_scan`."""
    return _Scan.apply(u, delta, A, B, C, D, z, delta_bias, delta_decay, delta_softplus)


def floor_bytes(shape: dict[str, int], itemsize: int, backward: bool) -> int:
    """Bytes that must move for u, delta, B, C and y (backward: these four, dy and their gradients)."""
    rows, states = shape["B"] * shape["D"] * shape["L"], shape["B"] * shape["N"] * shape["L"]
    n_rows, n_states = (5, 4) if backward else (3, 2)  # u, delta, dy read, du, ddelta written
    return (n_rows * rows + n_states * states) * itemsize


def exponentials(shape: dict[str, int], backward: bool) -> int:
    """How many exponentials the decay takes; the backward pass computes each a second time."""
    return (1 + backward) * shape["B"] * shape["D"] * shape["L"] * shape["N"]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, delta_decay, delta_softplus):
        n_rows, width, length = u.shape
        keep = any(ctx.needs_input_grad)
        y = torch.empty_like(u)
        n_starts = triton.cdiv(length, CHUNK) if keep else 0
        starts = torch.empty(n_rows, n_starts, width, A.shape[1], dtype=torch.float32, device=u.device)
        inputs = (u, delta, A, B, C, D, z, delta_bias, delta_decay)
        _forward_kernel[_grid(u)](
            *_pointers(inputs), y, starts, *_sizes(u, A),
            *_strides(inputs), *y.stride(),
            **_switches(inputs, delta_softplus), KEEP=keep,
        )  # fmt: skip
        ctx.save_for_backward(*inputs, starts)
        ctx.delta_softplus = delta_softplus
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        *inputs, starts = ctx.saved_tensors
        u, delta, A, B, C, D, z, delta_bias, delta_decay = inputs
        n_rows, width, length = u.shape
        blocks, n_states = triton.cdiv(width, BLOCK_D), A.shape[1]
        new = lambda *shape: torch.empty(*shape, dtype=torch.float32, device=u.device)  # noqa: E731
        du, ddelta = torch.empty_like(u), torch.empty_like(delta)
        dz = None if z is None else torch.empty_like(z)
        ddecay = None if delta_decay is None else torch.empty_like(delta_decay)
        dB, dC = new(blocks, n_rows, length, n_states), new(blocks, n_rows, length, n_states)
        dA, dD, dbias = new(n_rows, width, n_states), new(n_rows, width), new(n_rows, width)
        # States of one chunk, index 0 the state before it; written and read by one program only.
        scratch = new(n_rows, CHUNK + 1, width, n_states)
        _backward_kernel[_grid(u)](
            *_pointers(inputs), dy, starts, scratch,
            du, ddelta, ddelta if ddecay is None else ddecay, du if dz is None else dz,
            dA, dB, dC, dD, dbias, *_sizes(u, A),
            *_strides(inputs), *dy.stride(), *du.stride(), *ddelta.stride(),
            *_strides3(ddecay), *_strides3(dz),
            **_switches(inputs, ctx.delta_softplus),
        )  # fmt: skip
        sums = [dA.sum(0).to(A.dtype), dB.sum(0).mT.to(B.dtype), dC.sum(0).mT.to(C.dtype)]
        dD = None if D is None else dD.sum(0).to(D.dtype)
        dbias = None if delta_bias is None else dbias.sum(0).to(delta_bias.dtype)
        return du, ddelta, *sums, dD, dz, dbias, ddecay, None


def _grid(u):
    return (u.shape[0], triton.cdiv(u.shape[1], BLOCK_D))


def _pointers(inputs):
    return [inputs[0] if t is None else t for t in inputs]  # an unused pointer still has to point somewhere


def _sizes(u, A):
    return u.shape[0], u.shape[1], u.shape[2], A.shape[1]


def _strides3(t):
    return (0, 0, 0) if t is None else t.stride()


def _strides(inputs):
    """Strides of u, delta, A, B, C, D, z, delta_bias, delta_decay, in the kernels' order."""
    return [s for t, n in zip(inputs, (3, 3, 2, 3, 3, 1, 3, 1, 3), strict=True)
            for s in ((0,) * n if t is None else t.stride())]  # fmt: skip


def _switches(inputs, delta_softplus):
    *_, D, z, delta_bias, delta_decay = inputs
    n_states = triton.next_power_of_2(inputs[2].shape[1])
    has = {"HAS_D": D is not None, "HAS_Z": z is not None, "HAS_BIAS": delta_bias is not None}
    has |= {"HAS_DECAY": delta_decay is not None, "SOFTPLUS": delta_softplus}
    return has | {"N_PAD": n_states, "CHUNK": CHUNK, "BLOCK_D": BLOCK_D}


@triton.jit
def _softplus(x):
    # log(1 + e) loses every digit of a small e; the quotient gives them back (Kahan), and NaN stays NaN.
    e = tl.exp(x)
    w = 1.0 + e
    return tl.where(x > 20.0, x, tl.where(w == 1.0, e, tl.log(w) * (e / (w - 1.0))))


@triton.jit
def _step(delta_ptrs, decay_ptrs, bias, mask_d, HAS_DECAY: tl.constexpr, SOFTPLUS: tl.constexpr):
    """The step before softplus, behind it, and the decay step, each [BLOCK_D]."""
    raw = tl.load(delta_ptrs, mask=mask_d, other=0.0).to(tl.float32) + bias
    step = raw
    if SOFTPLUS:
        step = _softplus(raw)
    decay = step
    if HAS_DECAY:
        decay = tl.load(decay_ptrs, mask=mask_d, other=0.0).to(tl.float32)
    return raw, step, decay


@triton.autotune(CONFIGS, key=["width", "n_states"])
@triton.jit
def _forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, decay_ptr, y_ptr, starts_ptr,
    n_rows, width, length, n_states,
    u_b, u_d, u_l, delta_b, delta_d, delta_l, A_d, A_n, B_b, B_n, B_l, C_b, C_n, C_l, D_d,
    z_b, z_d, z_l, bias_d, decay_b, decay_d, decay_l, y_b, y_d, y_l,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr,
    SOFTPLUS: tl.constexpr, N_PAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, N_PAD).to(tl.int64)
    mask_d, mask_n = d < width, n < n_states
    mask = mask_d[:, None] & mask_n[None, :]
    A = tl.load(A_ptr + d[:, None] * A_d + n[None, :] * A_n, mask=mask, other=0.0).to(tl.float32)
    bias, skip = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d * bias_d, mask=mask_d, other=0.0).to(tl.float32)
    if HAS_D:
        skip = tl.load(D_ptr + d * D_d, mask=mask_d, other=0.0).to(tl.float32)
    origin = row * 0  # lifts positions to int64, also where the interpreter's loop counts in Python integers
    n_starts = tl.cdiv(length, CHUNK)
    h = tl.zeros([BLOCK_D, N_PAD], tl.float32)
    for t in range(length):
        at = origin + t
        if KEEP:  # noqa: SIM102 (a compile-time switch around a run-time condition)
            if t % CHUNK == 0:
                place = ((row * n_starts + t // CHUNK) * width + d[:, None]) * n_states + n[None, :]
                tl.store(starts_ptr + place, h, mask=mask)
        u = tl.load(u_ptr + row * u_b + d * u_d + at * u_l, mask=mask_d, other=0.0).to(tl.float32)
        delta_at = delta_ptr + row * delta_b + d * delta_d + at * delta_l
        decay_at = decay_ptr + row * decay_b + d * decay_d + at * decay_l
        _, step, decay = _step(delta_at, decay_at, bias, mask_d, HAS_DECAY, SOFTPLUS)
        B = tl.load(B_ptr + row * B_b + n * B_n + at * B_l, mask=mask_n, other=0.0).to(tl.float32)
        C = tl.load(C_ptr + row * C_b + n * C_n + at * C_l, mask=mask_n, other=0.0).to(tl.float32)
        h = tl.exp(decay[:, None] * A) * h + (step * u)[:, None] * B[None, :]
        y = tl.sum(h * C[None, :], axis=1) + skip * u
        if HAS_Z:
            z = tl.load(z_ptr + row * z_b + d * z_d + at * z_l, mask=mask_d, other=0.0).to(tl.float32)
            y = y * z * tl.sigmoid(z)
        tl.store(y_ptr + row * y_b + d * y_d + at * y_l, y, mask=mask_d)


@triton.autotune(CONFIGS, key=["width", "n_states"])
@triton.jit
def _backward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, decay_ptr, dy_ptr, starts_ptr, scratch_ptr,
    du_ptr, ddelta_ptr, ddecay_ptr, dz_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr,
    n_rows, width, length, n_states,
    u_b, u_d, u_l, delta_b, delta_d, delta_l, A_d, A_n, B_b, B_n, B_l, C_b, C_n, C_l, D_d,
    z_b, z_d, z_l, bias_d, decay_b, decay_d, decay_l,
    dy_b, dy_d, dy_l, du_b, du_d, du_l, ddelta_b, ddelta_d, ddelta_l,
    ddecay_b, ddecay_d, ddecay_l, dz_b, dz_d, dz_l,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DECAY: tl.constexpr,
    SOFTPLUS: tl.constexpr, N_PAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, N_PAD).to(tl.int64)
    mask_d, mask_n = d < width, n < n_states
    mask = mask_d[:, None] & mask_n[None, :]
    state = d[:, None] * n_states + n[None, :]
    A = tl.load(A_ptr + d[:, None] * A_d + n[None, :] * A_n, mask=mask, other=0.0).to(tl.float32)
    bias, skip = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d * bias_d, mask=mask_d, other=0.0).to(tl.float32)
    if HAS_D:
        skip = tl.load(D_ptr + d * D_d, mask=mask_d, other=0.0).to(tl.float32)
    origin = row * 0  # lifts positions to int64, also where the interpreter's loop counts in Python integers
    n_starts = tl.cdiv(length, CHUNK)
    saved = scratch_ptr + row * (CHUNK + 1) * width * n_states + state
    carry, dA = tl.zeros([BLOCK_D, N_PAD], tl.float32), tl.zeros([BLOCK_D, N_PAD], tl.float32)
    dD, dbias = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    partial = (block * n_rows + row) * length * n_states + n  # this program's share of dB and dC
    for i in range(n_starts):
        chunk = n_starts - 1 - i
        first = chunk * CHUNK
        n_steps = tl.minimum(CHUNK, length - first)
        h = tl.load(starts_ptr + (row * n_starts + chunk) * width * n_states + state, mask=mask, other=0.0)
        for k in range(n_steps):
            at = origin + first + k
            tl.store(saved + k * width * n_states, h, mask=mask)
            u = tl.load(u_ptr + row * u_b + d * u_d + at * u_l, mask=mask_d, other=0.0).to(tl.float32)
            delta_at = delta_ptr + row * delta_b + d * delta_d + at * delta_l
            decay_at = decay_ptr + row * decay_b + d * decay_d + at * decay_l
            _, step, decay = _step(delta_at, decay_at, bias, mask_d, HAS_DECAY, SOFTPLUS)
            B = tl.load(B_ptr + row * B_b + n * B_n + at * B_l, mask=mask_n, other=0.0).to(tl.float32)
            h = tl.exp(decay[:, None] * A) * h + (step * u)[:, None] * B[None, :]
        tl.debug_barrier()  # what was stored may be loaded by another thread
        for j in range(n_steps):
            k = n_steps - 1 - j
            at = origin + first + k
            u = tl.load(u_ptr + row * u_b + d * u_d + at * u_l, mask=mask_d, other=0.0).to(tl.float32)
            delta_at = delta_ptr + row * delta_b + d * delta_d + at * delta_l
            decay_at = decay_ptr + row * decay_b + d * decay_d + at * decay_l
            raw, step, decay = _step(delta_at, decay_at, bias, mask_d, HAS_DECAY, SOFTPLUS)
            B = tl.load(B_ptr + row * B_b + n * B_n + at * B_l, mask=mask_n, other=0.0).to(tl.float32)
            C = tl.load(C_ptr + row * C_b + n * C_n + at * C_l, mask=mask_n, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + row * dy_b + d * dy_d + at * dy_l, mask=mask_d, other=0.0).to(tl.float32)
            previous = tl.load(saved + k * width * n_states, mask=mask, other=0.0)
            factor = tl.exp(decay[:, None] * A)
            h = factor * previous + (step * u)[:, None] * B[None, :]
            if HAS_Z:
                z = tl.load(z_ptr + row * z_b + d * z_d + at * z_l, mask=mask_d, other=0.0).to(tl.float32)
                gate = tl.sigmoid(z)
                y = tl.sum(h * C[None, :], axis=1) + skip * u
                dz = dy * y * gate * (1.0 + z * (1.0 - gate))
                tl.store(dz_ptr + row * dz_b + d * dz_d + at * dz_l, dz, mask=mask_d)
                dy = dy * z * gate
            dh = carry + dy[:, None] * C[None, :]
            tl.store(dC_ptr + partial + at * n_states, tl.sum(dy[:, None] * h, axis=0), mask=mask_n)
            tl.store(dB_ptr + partial + at * n_states, tl.sum((step * u)[:, None] * dh, axis=0), mask=mask_n)
            dx = tl.sum(dh * B[None, :], axis=1)
            du = dx * step + dy * skip
            tl.store(du_ptr + row * du_b + d * du_d + at * du_l, du, mask=mask_d)
            dD += dy * u
            carry = dh * factor
            dexponent = carry * previous
            dA += dexponent * decay[:, None]
            ddecay = tl.sum(dexponent * A, axis=1)
            dstep = dx * u
            if HAS_DECAY:
                place = row * ddecay_b + d * ddecay_d + at * ddecay_l
                tl.store(ddecay_ptr + place, ddecay, mask=mask_d)
            else:
                dstep += ddecay
            if SOFTPLUS:
                dstep = tl.where(raw > 20.0, dstep, dstep * tl.sigmoid(raw))
            tl.store(ddelta_ptr + row * ddelta_b + d * ddelta_d + at * ddelta_l, dstep, mask=mask_d)
            dbias += dstep
        tl.debug_barrier()  # the scratch is written again for the chunk before
    tl.store(dA_ptr + row * width * n_states + state, dA, mask=mask)
    tl.store(dD_ptr + row * width + d, dD, mask=mask_d)
    tl.store(dbias_ptr + row * width + d, dbias, mask=mask_d)
