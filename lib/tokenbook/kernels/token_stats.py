"""Statistics of a model's next-token distribution at each position, in one stream over the vocabulary.

For logits x [V] with p = softmax(x), a token y and m = max(x):

    log_prob    log p_y                      argmax      first index of m
    entropy     -sum_v p_v log p_v, nats     confidence  p_argmax
    rank        #{v: x_v > x_y}              mass_above  sum of p_v over {v: x_v >= x_y}, y and ties included

Cost: each logit is read once; O(N V) operations and O(N) memory for N positions. From hidden states h [N, D]
and the output matrix W [V, D] the logits are made and consumed a few rows at a time: [N, V] never exists.

Dtypes: float16, bfloat16 and float32 are computed in float32; float64 in float64 (torch path only).

Delicate:
  * Nearly deterministic rows. With s = sum over v != argmax of exp(x_v - m), the normaliser is log1p(s) and
    the entropy log1p(s) - sum_v p_v (x_v - m): sums of numbers of one sign, so that 1 - p = 1e-12 keeps its
    digits, where log_softmax in float32 answers 0.
  * rank and mass_above compare logits, never log-probabilities: after the subtraction two different logits
    may be equal, and the token itself may fall below itself.
  * A logit of -inf is a probability of 0 and adds 0 to the entropy (0 log 0 = 0, not nan).
  * Ties: argmax is the lowest index; rank counts strictly larger logits only.

Gradients: of log_prob, entropy, confidence and mass_above with respect to logits, hidden and weight.

Used by pawn (all six), prism (rank), learn2pd (argmax and confidence), toolgen (log_prob), refusal-cliff.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tokenbook.kernels._dispatch import choose_backend

CHUNK_VALUES = {
    "cpu": 2**18,
    "cuda": 2**26,
}  # logits a step of the torch path; on a CPU they stay in the cache
BUFFER_BYTES = {"cpu": 2**27, "cuda": 2**29}  # logits held at once when they are made from hidden states


class TokenStats(NamedTuple):
    """One value per position; argmax and rank are int64, the others float32 (float64 for float64 inputs)."""

    log_prob: Tensor
    entropy: Tensor
    argmax: Tensor
    confidence: Tensor
    rank: Tensor
    mass_above: Tensor


def token_stats(
    logits: Tensor | None = None,
    token_ids: Tensor | None = None,
    *,
    hidden: Tensor | None = None,
    weight: Tensor | None = None,
    backend: str = "auto",
) -> TokenStats:
    """Log-probability, entropy, argmax and its probability, rank and mass above, at every position.

    Args:
        logits: [..., V], any float dtype, contiguous along V for speed. Or, instead of logits:
        hidden, weight: hidden states [..., D] (behind the final norm) and output matrix [V, D] of one dtype.
        token_ids: integers [...] in 0..V-1: the token whose log_prob, rank and mass_above are wanted; None =
            the argmax, whose rank is 0.
        backend: "auto", "triton", "torch" or "reference".

    Returns: TokenStats of tensors [...].

    Raises ValueError for shapes, dtypes or devices that do not fit, ids outside the vocabulary, and rows
    without a softmax (nan or +inf among the logits, or all -inf).
    """
    values = _check_values(logits, hidden, weight)
    if token_ids is not None:
        _check_ids(token_ids, values.shape[:-1], len(weight) if logits is None else values.shape[-1])
    tensors = {"logits": logits, "hidden": hidden, "weight": weight, "token_ids": token_ids}
    chosen = choose_backend("token_stats", backend, tensors)
    rows = _as_rows(values)
    token_ids = None if token_ids is None else token_ids.reshape(rows.shape[:-1]).long()
    with torch.autocast(values.device.type, enabled=False):  # it would round the logits to bfloat16
        if chosen == "reference":
            found = token_stats_reference(logits, token_ids, hidden=hidden, weight=weight)
        elif weight is None:
            found = _FromLogits.apply(rows, token_ids, chosen)
        else:
            found = _FromHidden.apply(rows, weight, token_ids, chosen)
    stats = TokenStats(*(value.reshape(values.shape[:-1]) for value in found))
    entropy = stats.entropy  # finite exactly where the row has a softmax
    if not entropy.isfinite().all():
        where = (~entropy.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"logits must hold neither nan nor +inf nor rows of -inf only; see position {where}")
    return stats


def token_stats_reference(logits=None, token_ids=None, *, hidden=None, weight=None) -> TokenStats:
    """The definition, in the inputs' dtype; differentiable by torch."""
    x = hidden @ weight.T if logits is None else logits
    log_p = x.log_softmax(-1)
    p = log_p.exp()
    y = (x.argmax(-1) if token_ids is None else token_ids.reshape(x.shape[:-1])).unsqueeze(-1)
    x_y = x.gather(-1, y)
    return TokenStats(
        log_prob=log_p.gather(-1, y).squeeze(-1),
        entropy=-torch.where(p > 0, p * log_p.masked_fill(p == 0, 0), p).sum(-1),
        argmax=x.argmax(-1),
        confidence=p.amax(-1),
        rank=(x > x_y).sum(-1),
        mass_above=torch.where(x >= x_y, p, 0).sum(-1),
    )


def _check_values(logits, hidden, weight) -> Tensor:
    """The logits or the hidden states, whichever were given."""
    if (logits is None) == (hidden is None) or (hidden is None) != (weight is None):
        given = [
            n for n, t in {"logits": logits, "hidden": hidden, "weight": weight}.items() if t is not None
        ]
        raise ValueError(f"give either logits, or hidden and weight; got {' and '.join(given) or 'neither'}")
    name, width, values = ("logits", "V", logits) if hidden is None else ("hidden", "D", hidden)
    if values.ndim < 1 or values.numel() == 0 or not values.is_floating_point():
        raise ValueError(f"{name} must be non-empty floats [..., {width}], got {_described(values)}")
    if weight is not None and (
        weight.ndim != 2
        or len(weight) == 0
        or weight.shape[1] != values.shape[-1]
        or weight.dtype != values.dtype
    ):
        wanted = f"[V, {values.shape[-1]}] of {values.dtype}, as hidden is"
        raise ValueError(f"weight must be {wanted}, got {_described(weight)}")
    return values


def _check_ids(token_ids: Tensor, shape: torch.Size, n_vocabulary: int) -> None:
    integers = not (token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool)
    if token_ids.shape != shape or not integers:
        raise ValueError(f"token_ids must be integers {list(shape)}, got {_described(token_ids)}")
    low, high = (int(bound) for bound in token_ids.aminmax())
    if low < 0 or high >= n_vocabulary:
        raise ValueError(f"token_ids must lie in 0..{n_vocabulary - 1}, got {low if low < 0 else high}")


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _as_rows(values: Tensor) -> Tensor:
    """[B, T, V]: a slice such as logits[:, :-1] keeps its strides, for a copy would hold [N, V] once more."""
    rows = values if values.ndim == 3 else values.reshape(1, -1, values.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ids, backend):  # [B, T, V], [B, T] or None
        peak, others, stats = _forward(x, ids, backend)
        ctx.backend = backend
        ctx.save_for_backward(x, ids, peak, others, *stats)
        ctx.mark_non_differentiable(stats.argmax, stats.rank)
        return tuple(stats)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        x, ids, *saved = ctx.saved_tensors
        return _gradient(x, ids, saved, grads, ctx.backend), None, None


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ids, backend):  # [B, T, D], [V, D], [B, T] or None
        h = hidden.reshape(-1, hidden.shape[-1])
        ids = None if ids is None else ids.reshape(1, -1)
        found = []
        for rows, x in _logit_chunks(h, weight):
            peak, others, stats = _forward(x, None if ids is None else ids[:, rows], backend)
            found.append((peak, others, *stats))
        saved = [torch.cat(column, 1) for column in zip(*found, strict=True)]
        ctx.backend, ctx.shape = backend, hidden.shape
        ctx.save_for_backward(h, weight, ids, *saved)
        ctx.mark_non_differentiable(saved[4], saved[6])
        return tuple(saved[2:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        h, weight, ids, *saved = ctx.saved_tensors
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight, dtype=_compute_dtype(weight)) if ctx.needs_input_grad[1] else None
        for rows, x in _logit_chunks(h, weight):
            parts = ([tensor[:, rows] for tensor in tensors] for tensors in (saved, grads))
            dx = _gradient(x, None if ids is None else ids[:, rows], *parts, ctx.backend)[0]
            if dh is not None:
                dh[rows] = dx.to(weight.dtype) @ weight
            if dw is not None:
                dw += dx.T @ h[rows].to(dx.dtype)
        dh = None if dh is None else dh.view(ctx.shape)
        return dh, None if dw is None else dw.to(weight.dtype), None, None


def _forward(x, ids, backend) -> tuple[Tensor, Tensor, TokenStats]:
    """Each row's maximum, the exp-sum of the others relative to it, and the statistics; all [B, T]."""
    if backend == "triton":
        from tokenbook.kernels._token_stats_triton import partials
    else:
        partials = _partials_torch
    peak, others, slope, mass, rank, argmax = partials(x, ids)
    y = argmax if ids is None else ids
    above_peak = x.gather(-1, y[..., None]).squeeze(-1).to(peak.dtype) - peak  # <= 0
    log_norm, total = others.log1p(), 1 + others
    stats = TokenStats(
        log_prob=above_peak - log_norm,
        entropy=torch.where(peak.isfinite(), log_norm - slope / total, torch.nan),
        argmax=argmax,
        confidence=total.reciprocal(),
        rank=rank,
        mass_above=(mass / total).clamp(max=1),
    )
    return peak, others, stats


def _gradient(x, ids, saved, grads, backend) -> Tensor:
    """Gradient of the logits, [B, T, V] in their dtype."""
    peak, others, _, entropy, argmax, confidence, _, mass_above = saved
    g_log_prob, g_entropy, _, g_confidence, _, g_mass = grads
    y = argmax if ids is None else ids
    x_y = x.gather(-1, y[..., None]).squeeze(-1).to(peak.dtype)
    at_argmax = g_confidence * confidence
    constant = -g_log_prob - g_entropy * entropy - at_argmax - g_mass * mass_above
    scalars = torch.stack([peak, others.log1p(), constant, g_entropy, g_mass, x_y, g_log_prob, at_argmax])
    if backend == "triton":
        from tokenbook.kernels._token_stats_triton import gradient

        return gradient(x, y, argmax, scalars)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for index in _chunks(x):
        of_rows = scalars[(slice(None), *index)].unsqueeze(-1)
        peak, log_norm, constant, g_entropy, g_mass, x_y, at_y, at_argmax = of_rows
        rows = x[index].to(peak.dtype)
        log_p = rows - peak - log_norm
        p = _exp(log_p)
        dx = p * (constant + g_mass * (rows >= x_y) - g_entropy * log_p)
        dx.scatter_add_(1, y[index][:, None], at_y).scatter_add_(1, argmax[index][:, None], at_argmax)
        out[index] = dx
    return out


def _partials_torch(x: Tensor, ids: Tensor | None) -> list[Tensor]:
    """peak, others, slope, mass, rank and argmax, each [B, T]; a few rows at a time, in buffers that stay."""
    dtype = _compute_dtype(x)
    # Fresh temporaries of this size cost more in page faults than their arithmetic.
    scratch = torch.empty(2, min(x.shape[1], _chunk_rows(x)), x.shape[-1], dtype=dtype, device=x.device)
    found = []
    for batch, positions in _chunks(x):
        rows = x[batch, positions].to(dtype)
        gap, weight = scratch[:, : len(rows)]
        peak, argmax = _first_max(rows)
        _exp(torch.sub(rows, peak, out=gap), out=weight).scatter_(1, argmax, 0)
        others, slope = weight.sum(-1), gap.mul_(weight).sum(-1)
        # Comparisons go to floats: torch's sums of booleans are scalar code.
        if ids is None:
            mass, rank = torch.eq(rows, peak, out=gap).sum(-1), torch.zeros_like(others)
        else:
            x_y = rows.gather(1, ids[batch, positions, None])
            rank = torch.gt(rows, x_y, out=gap).sum(-1)
            mass = (
                torch.ge(rows, x_y, out=gap).mul_(weight).sum(-1) + 1
            )  # the argmax was taken out of `weight`
        found.append((peak[:, 0], others, slope, mass, rank.long(), argmax[:, 0]))
    return [torch.cat(column).view(x.shape[:2]) for column in zip(*found, strict=True)]


def _exp(gap: Tensor, out: Tensor | None = None) -> Tensor:
    """exp of gaps <= 0, which are clamped in place; exactly 0 below e^-87 (in float64 e^-700).

    exp takes 10 to 50 times as long where it underflows, -inf included, and 0 * -inf would be nan.
    """
    floor = -700.0 if gap.dtype == torch.float64 else -87.0
    return torch.threshold_(torch.exp(gap.clamp_(min=floor), out=out), 2 * math.exp(floor), 0.0)


def _first_max(x: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """Maximum and its first index, each [n, 1]; by blocks: amax is vectorised, max with an index is not."""
    n_blocks = x.shape[1] // block
    if n_blocks < 4:
        return x.max(1, keepdim=True)
    peak, first = x[:, : n_blocks * block].unflatten(1, (n_blocks, block)).amax(-1).max(1, keepdim=True)
    inside = x.gather(1, first * block + torch.arange(block, device=x.device))
    argmax = first * block + inside.argmax(1, keepdim=True)
    if x.shape[1] % block:
        tail, index = x[:, n_blocks * block :].max(1, keepdim=True)
        later = (tail > peak) | tail.isnan()
        peak, argmax = torch.where(later, tail, peak), torch.where(later, index + n_blocks * block, argmax)
    return peak, argmax


def _chunk_rows(x: Tensor) -> int:
    return max(1, CHUNK_VALUES["cuda" if x.is_cuda else "cpu"] // x.shape[-1])


def _chunks(x: Tensor):
    """Index pairs (batch, slice of positions) over [B, T, V]."""
    n_rows = _chunk_rows(x)
    for batch in range(x.shape[0]):
        for start in range(0, x.shape[1], n_rows):
            yield batch, slice(start, start + n_rows)


def _logit_chunks(h: Tensor, weight: Tensor):
    """(slice of rows, logits [1, n, V]) over h [N, D]. All share ONE buffer: use them before the next come.

    The logits have at least float32: rounded to bfloat16, the top of many a row would be a tie.
    """
    dtype = _compute_dtype(weight)
    most = max(1, BUFFER_BYTES["cuda" if h.is_cuda else "cpu"] // (dtype.itemsize * len(weight)))
    n_rows = -(-len(h) // -(-len(h) // most))  # equal chunks: a small last one would still read all of W
    buffer = torch.empty(n_rows, len(weight), dtype=dtype, device=h.device)
    for start in range(0, len(h), n_rows):
        part = h[start : start + n_rows]
        logits = buffer[: len(part)]
        if part.dtype == dtype:
            torch.mm(part, weight.T, out=logits)
        elif h.is_cuda:
            torch.mm(part, weight.T, out_dtype=dtype, out=logits)
        else:
            for columns in range(0, len(weight), 8192):  # a float32 copy of all of W is not wanted either
                block = weight[columns : columns + 8192].to(dtype)
                torch.mm(part.to(dtype), block.T, out=logits[:, columns : columns + 8192])
        yield slice(start, start + n_rows), logits[None]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
