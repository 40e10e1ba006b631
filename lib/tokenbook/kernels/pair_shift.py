"""How far two models' next-token distributions lie apart at each position: KL divergence, and ranks in both.

For logits x, y [V] of models p and q and a token z:

    kl                       KL(p || q) = sum_v p_v (log p_v - log q_v), nats
    rank_p, rank_q           #{v: x_v > x_z}, #{v: y_v > y_z}
    log_prob_p, log_prob_q   log p_z, log q_z
    argmax_p, argmax_q       first index of the maximum

Two streams over the vocabulary: the first is that of `token_stats`, the second sums the divergence. O(N V)
operations, O(N) memory; no array [N, V] is made.

Dtypes: float16, bfloat16 and float32 are computed in float32; float64 in float64 (torch path only).

Delicate: sum p (log p - log q) cancels where the models agree: 1e-4 nats are a difference of terms of size 1.
With u = log q - log p, and because p and q both sum to 1,

    KL = sum_v p_v (exp(u_v) - 1 - u_v)

whose terms are never negative; for small u the bracket is a power series. An error delta in a normaliser then
costs delta^2 / 2, not delta. KL is infinite exactly where q excludes (-inf) a token that p does not.

No gradient: this is a measurement.

Used by urial (shifted positions, base rank of the aligned model's token).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tokenbook.kernels._dispatch import choose_backend
from tokenbook.kernels.token_stats import (
    _as_rows,
    _check_ids,
    _chunks,
    _described,
    _exp,
    _forward,
)

SERIES = tuple(1 / math.factorial(k) for k in range(2, 10))  # of (exp(u) - 1 - u) / u^2


class PairShift(NamedTuple):
    """One value per position; ranks and argmax are int64, the others float32 (float64 for float64 logits)."""

    kl: Tensor
    rank_p: Tensor
    rank_q: Tensor
    log_prob_p: Tensor
    log_prob_q: Tensor
    argmax_p: Tensor
    argmax_q: Tensor


def pair_shift(
    p_logits: Tensor, q_logits: Tensor, token_ids: Tensor | None = None, *, backend: str = "auto"
) -> PairShift:
    """KL(p || q), and the log-probability and rank of a token under both models, at every position.

    Args:
        p_logits, q_logits: [..., V] over one vocabulary, any float dtypes.
        token_ids: integers [...] in 0..V-1; None = p's argmax (the token that model p would write).
        backend: "auto", "triton", "torch" or "reference".

    Returns: PairShift of tensors [...], without gradient.

    Raises ValueError for shapes, dtypes or devices that do not fit, ids outside the vocabulary, and rows
    without a softmax (nan or +inf among the logits, or all -inf).
    """
    for name, logits in (("p_logits", p_logits), ("q_logits", q_logits)):
        if logits.ndim < 1 or logits.numel() == 0 or not logits.is_floating_point():
            raise ValueError(f"{name} must be non-empty floats [..., V], got {_described(logits)}")
    if p_logits.shape != q_logits.shape:
        shapes = f"{list(p_logits.shape)} and {list(q_logits.shape)}"
        raise ValueError(f"p_logits and q_logits must have one shape, got {shapes}")
    shape = p_logits.shape[:-1]
    if token_ids is not None:
        _check_ids(token_ids, shape, p_logits.shape[-1])
    tensors = {"p_logits": p_logits, "q_logits": q_logits, "token_ids": token_ids}
    chosen = choose_backend("pair_shift", backend, tensors)
    with torch.no_grad():
        x, y = _as_rows(p_logits), _as_rows(q_logits)
        ids = None if token_ids is None else token_ids.reshape(x.shape[:2]).long()
        found = pair_shift_reference(x, y, ids) if chosen == "reference" else _streamed(x, y, ids, chosen)
    found = PairShift(*(value.reshape(shape) for value in found))
    for name, log_prob in (("p_logits", found.log_prob_p), ("q_logits", found.log_prob_q)):
        if log_prob.isnan().any():
            where = log_prob.isnan().nonzero()[0].tolist()
            raise ValueError(
                f"{name} must hold neither nan nor +inf nor rows of -inf only; see position {where}"
            )
    return found


def pair_shift_reference(p_logits: Tensor, q_logits: Tensor, token_ids: Tensor | None = None) -> PairShift:
    """The definition, in the inputs' dtype."""
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    z = (p_logits.argmax(-1) if token_ids is None else token_ids).unsqueeze(-1)
    return PairShift(
        kl=torch.where(p_logits == -math.inf, 0, log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0),
        rank_p=(p_logits > p_logits.gather(-1, z)).sum(-1),
        rank_q=(q_logits > q_logits.gather(-1, z)).sum(-1),
        log_prob_p=log_p.gather(-1, z).squeeze(-1),
        log_prob_q=log_q.gather(-1, z).squeeze(-1),
        argmax_p=p_logits.argmax(-1),
        argmax_q=q_logits.argmax(-1),
    )


def _streamed(x: Tensor, y: Tensor, ids: Tensor | None, backend: str) -> PairShift:
    x_peak, x_others, p = _forward(x, ids, backend)
    y_peak, y_others, q = _forward(y, p.argmax if ids is None else ids, backend)
    dtype = torch.promote_types(x_peak.dtype, y_peak.dtype)
    x_norm, y_norm = (
        peak.to(dtype) + others.log1p() for peak, others in ((x_peak, x_others), (y_peak, y_others))
    )
    if backend == "triton":
        from tokenbook.kernels._pair_shift_triton import divergence
    else:
        divergence = _divergence_torch
    # An entropy of nan marks a row without a softmax; its log_prob may still be -inf.
    log_prob_p, log_prob_q = (torch.where(s.entropy.isnan(), torch.nan, s.log_prob) for s in (p, q))
    kl = divergence(x, y, x_norm, y_norm)
    return PairShift(kl, p.rank, q.rank, log_prob_p, log_prob_q, p.argmax, q.argmax)


def _divergence_torch(x: Tensor, y: Tensor, x_norm: Tensor, y_norm: Tensor) -> Tensor:
    near = 0.1 if x_norm.dtype == torch.float64 else 0.5  # where the series is good to the last digit
    found = []
    for index in _chunks(x):
        a, b = x[index].to(x_norm.dtype), y[index].to(x_norm.dtype)
        a_norm, b_norm = x_norm[index][:, None], y_norm[index][:, None]
        # The difference of the logits first: it is exact where the models agree.
        u = (b - a).sub_(b_norm - a_norm)
        u = u.nan_to_num_(nan=0.0, posinf=1e4, neginf=-math.inf)  # +inf: p = 0, and the term is q
        excluded = u.amin(-1) == -math.inf
        u.clamp_(min=-1e30)
        p, q = _exp(a - a_norm), _exp(b - b_norm)
        series = torch.full_like(u, SERIES[-1])
        for coefficient in SERIES[-2::-1]:
            series.mul_(u).add_(coefficient)
        series.mul_(u).mul_(u).mul_(p)
        total = torch.where(u.abs() < near, series, q - p - p * u).sum(-1)
        found.append(total.masked_fill_(excluded, math.inf))
    return torch.cat(found).view(x.shape[:2])
