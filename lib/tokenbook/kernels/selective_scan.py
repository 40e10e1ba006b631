"""The selective state-space scan of Mamba, with a decay step of its own where tokens were removed.

For every batch row b and channel d, with a state h of N numbers that starts at zero:

    delta_t = softplus(delta_t + delta_bias)          each part only where asked for
    h_t = exp(delta_decay_t * A) h_{t-1} + delta_t B_t u_t
    y_t = <C_t, h_t> + D u_t,  then y_t <- y_t * silu(z_t)

`delta_decay` defaults to delta. Where positions between two tokens were pruned, it is delta plus the steps of
the missing positions: the state then decays as if they had been passed. It is used as it stands: softplus and
delta_bias do not touch it.

Shapes: u, delta, z, delta_decay [B, D, L]; A [D, N]; B, C [B, N, L]; D, delta_bias [D]; L is the length here.
Several scans with weights of their own run as one where A is [G, D, N], and D and delta_bias are [G, D]: the
rows are then G equal blocks, and block g uses A[g] (the two directions of a bidirectional model).
torch.func.vmap over several models runs as one scan as well, on the torch path.
Any floating dtypes, any strides; y has u's dtype. State and sums are float32 (float64 if a tensor is
float64). O(B D L N) time; memory beyond the inputs O(B D N (L / chunk + chunk)) when gradients are wanted.

Delicate: the state is never stored for all L, the backward pass recomputes it chunk by chunk from one saved
state per chunk (inverting the recurrence divides by exp(delta A), which underflows). A decay exponent below
-80 counts as -80 on the CPU path: 2e-35 instead of numbers so small that the CPU handles them in microcode.
softplus is linear above 20, where float32 cannot tell the two apart.

Source: Gu and Dao, Mamba (2312.00752), section 3.2 and algorithm 2; the decay step: Zhan et al., Exploring
Token Pruning in Vision State Space Models (2409.18962), section 3.3, as reconstructed in the chapter
`ssm-token-pruning`. Used by the chapters `shufflemamba` and `ssm-token-pruning`. The Triton kernels stand in
`selective_scan_triton.py`: fused forward and backward do not fit into one readable file with this one.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from tokenbook.kernels._dispatch import choose_backend

# Steps between two saved states on the torch path: as many as keep a buffer of states at 2 MiB of float32.
# Measured with B D N = 98,304: 4 to 6 steps take a third less time than 16, and less than half of 2.
CHUNK_VALUES, SHORTEST_CHUNK, LONGEST_CHUNK = 2**19, 4, 64
SMALL_PRODUCT = 400  # torch's bmm leaves products below that to plain loops: 7 times slower at N = 4, D = 32
LOWEST_EXPONENT = -80.0
LOG2_E = math.log2(math.e)
MAX_STATE = 256


def selective_scan(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    delta_decay: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Run the selective scan along the last axis; the formula stands at the top of this module.

    Args:
        u: input [B, D, L], floating.
        delta: step sizes [B, D, L], before delta_bias and softplus.
        A: [D, N], or [G, D, N] for G blocks of rows; negative for a state that fades (not checked).
        B, C: input and output projections [B, N, L].
        D: skip weights [D] ([G, D]), or None for no skip.
        z: gate [B, D, L], before silu, or None for no gate.
        delta_bias: [D] ([G, D]), added to delta, or None.
        delta_softplus: whether delta (with its bias) goes through softplus.
        delta_decay: final step sizes [B, D, L] of the decay; None: those of delta.
        backend: "auto", "triton", "torch" or "reference".

    Returns: y [B, D, L] in u's dtype, differentiable once in every tensor argument.

    Raises ValueError naming the argument, what was given and what is allowed.
    """
    vectors = {"D": D, "delta_bias": delta_bias}
    rows = {"z": z, "delta_decay": delta_decay}
    _check(u, delta, A, B, C, rows, vectors, delta_softplus)
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C} | rows | vectors
    n_states = A.shape[-1]
    unsupported = f"N must be at most {MAX_STATE}, got {n_states}" if n_states > MAX_STATE else None
    chosen = choose_backend("selective_scan", backend, tensors, unsupported)
    arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_decay)
    if chosen == "reference":
        return selective_scan_reference(*arguments)
    if chosen == "triton":
        return _selective_scan_triton(*arguments)
    return _selective_scan_torch(*arguments)


def selective_scan_reference(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, delta_decay=None
) -> torch.Tensor:
    """The definition, step by step in float64, differentiable; same arguments, result in u's dtype."""
    x, step, B, C = (t.double() for t in (u, delta, B, C))
    A = _per_row(A.double(), len(x), 2)
    if delta_bias is not None:
        step = step + _per_row(delta_bias.double(), len(x))[..., None]
    if delta_softplus:
        step = torch.nn.functional.softplus(step)
    decay = step if delta_decay is None else delta_decay.double()
    h = x.new_zeros(*x.shape[:2], A.shape[-1])  # (B, D, N)
    outputs = [x[:, :, 0:0]]
    for t in range(x.shape[-1]):
        h = torch.exp(decay[:, :, t, None] * A) * h + (step * x)[:, :, t, None] * B[:, None, :, t]
        outputs.append((h * C[:, None, :, t]).sum(-1, keepdim=True))
    y = torch.cat(outputs, dim=-1)
    if D is not None:
        y = y + _per_row(D.double(), len(x))[..., None] * x
    if z is not None:
        y = y * torch.nn.functional.silu(z.double())
    return y.to(u.dtype)


def _selective_scan_torch(u, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_decay):
    """The fast path: autograd for what has B D L elements, the own scan for what has N times that."""
    given = [t for t in (u, delta, A, B, C, D, z, delta_bias, delta_decay) if t is not None]
    wide = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
    x, step = _time_major(u, wide), _time_major(delta, wide)
    if delta_bias is not None:
        step = step + _per_row(delta_bias.to(wide), u.shape[0])
    if delta_softplus:
        step = torch.nn.functional.softplus(step)
    decay = step if delta_decay is None else _time_major(delta_decay, wide)
    grouped = A.to(wide) if A.dim() == 3 else A.to(wide)[None]
    keep = torch.is_grad_enabled()  # inside vmap no tensor says whether it wants a gradient
    y, _ = _Scan.apply(step * x, decay, grouped, _time_major(B, wide), _time_major(C, wide), keep)
    if D is not None:
        y = torch.addcmul(y, x, _per_row(D.to(wide), u.shape[0]))
    if z is not None:
        y = y * torch.nn.functional.silu(_time_major(z, wide))
    return y.to(u.dtype).permute(1, 2, 0)  # as it lies in memory: L is the slow axis


def _selective_scan_triton(u, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_decay):
    """The Triton kernels, launched once per block of rows: their A is one for all rows."""
    from tokenbook.kernels.selective_scan_triton import selective_scan_triton

    if A.dim() == 2:
        return selective_scan_triton(u, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_decay)
    n_blocks = len(A)
    rows = [[None] * n_blocks if t is None else t.chunk(n_blocks) for t in (u, delta, B, C, z, delta_decay)]
    weights = [[None] * n_blocks if t is None else t.unbind() for t in (A, D, delta_bias)]
    outputs = []
    for u, delta, B, C, z, decay, A, D, bias in zip(*rows, *weights, strict=True):
        outputs.append(selective_scan_triton(u, delta, A, B, C, D, z, bias, delta_softplus, decay))
    return torch.cat(outputs)


def _per_row(weights: torch.Tensor, n_rows: int, n_axes: int = 1) -> torch.Tensor:
    """Weights of `n_axes` axes stay as they are; those of G blocks are repeated for every row of a block."""
    if weights.dim() == n_axes:
        return weights
    return weights.unsqueeze(1).expand(-1, n_rows // weights.shape[0], *weights.shape[1:]).flatten(0, 1)


def _time_major(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return t.permute(2, 0, 1).to(dtype, memory_format=torch.contiguous_format).contiguous()  # (L, B, .)


class _Scan(torch.autograd.Function):
    """h_t = exp(decay_t A) h_{t-1} + x_t B_t, y_t = <C_t, h_t>; x, decay, y [L, B, D], B and C [L, B, N].

    A is [G, D, N], for G equal blocks of rows. States lie as [L, B, N, D]: the long axis last, so that every
    operation runs over contiguous channels. Everything works in place on buffers of one chunk, which stay in
    the cache. The second result, the states at which chunks start, is for the backward pass.
    """

    @staticmethod
    def forward(x, decay, A, B, C, keep):
        length, n_rows, width = x.shape
        n_states = A.shape[2]
        rates = (A.mT * LOG2_E).contiguous()  # exp2 is twice as fast as exp on CPU
        chunk = _chunk(n_rows * n_states * width)
        y = torch.empty_like(x)
        starts = x.new_zeros(-(-length // chunk) if keep else 1, n_rows, n_states, width)
        factors = x.new_empty(min(chunk, length), n_rows, n_states, width)
        states = torch.empty_like(factors)
        for i, first in enumerate(range(0, length, chunk)):
            here = slice(first, min(first + chunk, length))
            n = here.stop - first
            start = starts[i if keep else 0]
            if i:
                start.copy_(states[-1])
            a, h = factors[:n], states[:n]
            _run_chunk(a, h, x[here], decay[here], rates, B[here], start)
            _sum_over_states(C[here], h, y[here])
        return y, starts

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, decay, A, B, C, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # else every backward pass fills zeros as large as the states
        ctx.save_for_backward(x, decay, A, B, C, output[1])

    @staticmethod
    def vmap(info, in_dims, x, decay, A, B, C, keep):
        """Several scans as one: theirs becomes the slow axis of the rows, and of the blocks of A."""
        rows = [
            _in_front(t, d, info, 1)
            for t, d in zip((x, decay, B, C), in_dims[:2] + in_dims[3:5], strict=True)
        ]
        x, decay, B, C = (t.flatten(1, 2) for t in rows)
        y, starts = _Scan.apply(x, decay, _in_front(A, in_dims[2], info, 0).flatten(0, 1), B, C, keep)
        return (y.unflatten(1, (info.batch_size, -1)), starts.unflatten(1, (info.batch_size, -1))), (1, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 6
        x, decay, A, B, C, starts = ctx.saved_tensors
        chunk = _chunk(starts[0].numel())
        rates = (A.mT * LOG2_E).contiguous()
        slopes = A.mT.contiguous().unsqueeze(1)  # (G, 1, N, D)
        dy = dy.contiguous()
        dx, ddecay, dB, dC = (torch.empty_like(t) for t in (x, decay, B, C))
        dA = x.new_zeros(starts.shape[1:])  # (B, N, D), summed over the rows of a block at the end
        carry = torch.zeros_like(dA)  # exp(decay_{t+1} A) * dLoss/dh_{t+1}
        buffers = x.new_empty(3, min(chunk, len(x)), *starts.shape[1:])
        for i in reversed(range(len(starts))):
            here = slice(i * chunk, min((i + 1) * chunk, len(x)))
            a, h, g = buffers[:, : here.stop - here.start]
            _run_chunk(a, h, x[here], decay[here], rates, B[here], starts[i])
            _state_gradients(g, a, C[here], dy[here], carry)
            _sum_over_states(B[here], g, dx[here])
            flat = g.view(-1, *g.shape[2:])
            # A row times the transposed states: six times as fast on CPU as the states times a column.
            torch.bmm(x[here].view(len(flat), 1, -1), flat.mT, out=dB[here].view(len(flat), 1, -1))
            across = h.view_as(flat).mT
            torch.bmm(dy[here].view(len(flat), 1, -1), across, out=dC[here].view(len(flat), 1, -1))
            a.mul_(g)
            carry.copy_(a[0])
            # a becomes dLoss/d(exponent of the decay) = g_t * exp(decay_t A) * h_{t-1}.
            a[0].mul_(starts[i])
            a[1:].mul_(h[:-1])
            torch.mul(_blocks(a, A), slopes, out=_blocks(g, A))
            torch.sum(g, 2, out=ddecay[here])
            for t in range(len(a)):
                dA.addcmul_(a[t], decay[here.start + t].unsqueeze(1))
        return dx, ddecay, dA.unflatten(0, (len(A), -1)).sum(1).mT, dB, dC, None


def _in_front(t: torch.Tensor, axis: int | None, info, place: int) -> torch.Tensor:
    """The mapped axis of a tensor moved to `place`; one that is not mapped is repeated."""
    if axis is not None:
        return t.movedim(axis, place)
    return t.unsqueeze(place).expand(*t.shape[:place], info.batch_size, *t.shape[place:])


def _sum_over_states(weights: torch.Tensor, states: torch.Tensor, out: torch.Tensor) -> None:
    """out [n, B, D] = sum over N of weights [n, B, N] times states [n, B, N, D]."""
    n_states, width = states.shape[2:]
    if n_states * width < SMALL_PRODUCT:
        sum_over_few_states.default(weights, states, out)
        return
    flat = states.view(-1, n_states, width)
    torch.bmm(weights.view(len(flat), 1, n_states), flat, out=out.view(len(flat), 1, width))


def _sum_over_few_states(weights: torch.Tensor, states: torch.Tensor, out: torch.Tensor) -> None:
    torch.mul(states[:, :, 0], weights[:, :, :1], out=out)
    for k in range(1, states.shape[2]):
        out.addcmul_(states[:, :, k], weights[:, :, k : k + 1])


# An operator of its own, so that FLOP counters see a product and not element-wise work: its formula stands in
# `metrics.count_flops`. The detour through torch's dispatcher costs microseconds, once for every chunk.
_OPERATORS = torch.library.Library("tokenbook", "FRAGMENT")
_OPERATORS.define("sum_over_few_states(Tensor weights, Tensor states, Tensor(a!) out) -> ()")
_OPERATORS.impl("sum_over_few_states", _sum_over_few_states, "CompositeExplicitAutograd")
sum_over_few_states = torch.ops.tokenbook.sum_over_few_states


def _blocks(t: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Rows [n, B, ...] as blocks of rows [n, G, B / G, ...]."""
    return t.unflatten(1, (len(A), -1))


def _chunk(n_values: int) -> int:
    """Steps of one chunk, for a state of so many values."""
    return min(LONGEST_CHUNK, max(SHORTEST_CHUNK, CHUNK_VALUES // n_values))


def _run_chunk(factors, states, x, decay, rates, B, start) -> None:
    """Fill factors = exp2(decay rates) and the states of one chunk, [n, B, N, D], beginning from `start`."""
    torch.mul(_blocks(decay.unsqueeze(2), rates), rates.unsqueeze(1), out=_blocks(factors, rates))
    factors.clamp_min_(LOWEST_EXPONENT * LOG2_E).exp2_()
    torch.mul(x.unsqueeze(2), B.unsqueeze(-1), out=states)
    previous = start
    for factor, state in zip(factors.unbind(), states.unbind(), strict=True):
        previous = state.addcmul_(factor, previous)


def _state_gradients(gradients, factors, C, dy, carry) -> None:
    """Fill dLoss/dh of one chunk: what its own output passes back, plus what the next state does."""
    torch.mul(C.unsqueeze(-1), dy.unsqueeze(2), out=gradients)
    gradients[-1].add_(carry)
    for t in range(len(gradients) - 2, -1, -1):
        gradients[t].addcmul_(factors[t + 1], gradients[t + 1])


def _check(u, delta, A, B, C, rows, vectors, delta_softplus) -> None:
    """Raise ValueError for the first argument whose type, dtype or shape does not fit."""
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C}
    given |= {name: t for name, t in (rows | vectors).items() if t is not None}
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if not isinstance(delta_softplus, bool):
        raise ValueError(f"delta_softplus must be True or False, got {delta_softplus!r}")
    if u.dim() != 3:
        raise ValueError(f"u must be [B, D, L], got shape {list(u.shape)}")
    if u.numel() == 0:
        raise ValueError(f"u must not be empty, got shape {list(u.shape)}")
    if A.dim() not in (2, 3) or A.shape[-2] != u.shape[1] or A.numel() < 1:
        raise ValueError(f"A must be [D, N] with D = {u.shape[1]} from u and N >= 1, got {list(A.shape)}")
    if A.dim() == 3 and u.shape[0] % A.shape[0]:
        raise ValueError(
            f"A for G blocks of rows: G must divide the {u.shape[0]} rows of u, got {list(A.shape)}"
        )
    n_rows, width, length = u.shape
    projection, axes = [n_rows, A.shape[-1], length], "[B, N, L]"
    wanted = {"delta": (list(u.shape), "[B, D, L]"), "B": (projection, axes), "C": (projection, axes)}
    wanted |= dict.fromkeys(rows, (list(u.shape), "[B, D, L]")) | dict.fromkeys(
        vectors, ([*A.shape[:-2], width], "[D]" if A.dim() == 2 else "[G, D]")
    )
    for name, (shape, axes) in wanted.items():
        if name in given and list(given[name].shape) != shape:
            raise ValueError(f"{name} must be {axes} = {shape}, got {list(given[name].shape)}")
