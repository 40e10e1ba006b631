"""How closely two models, two caches or two strings agree."""

import torch
from torch import Tensor


def kl_from_logits(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) at each position, in nats: sum_v p_v (log p_v - log q_v), computed in float64.

    Args:
        p_logits, q_logits: [..., V], any float dtype. A logit of -inf is a probability of 0: it adds nothing
            to p's sum, and where only q has it the divergence is infinite.

    Returns: float64 [...], never below 0.

    Raises ValueError for shapes that differ, an empty vocabulary, nan, or a row of -inf only.
    """
    p_logits, q_logits = _logits_pair(p_logits, q_logits)
    log_p, log_q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
    p = log_p.exp()
    kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
    if kl.isnan().any():
        raise ValueError("p_logits and q_logits must not hold nan or +inf, or rows of -inf only")
    return kl.clamp_min(0)  # rounding leaves -1e-17 where the two agree


def top1_agreement(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """Whether both prefer the same token, at each position (ties: the lowest index).

    Args: p_logits, q_logits [..., V]. Returns: bool [...]; `.double().mean()` is the rate of agreement.

    Raises ValueError for shapes that differ, an empty vocabulary or nan.
    """
    p_logits, q_logits = _logits_pair(p_logits, q_logits)
    return _first_argmax("p_logits", p_logits) == _first_argmax("q_logits", q_logits)


def rms_error(got: Tensor, wanted: Tensor) -> float:
    """RMS of the error over RMS of the reference, in float64: how far `got` is from `wanted`, relatively.

    Raises ValueError for shapes that differ, and for a reference of zeros (no scale).
    """
    if got.shape != wanted.shape:
        raise ValueError(f"got and wanted must have one shape, got {[*got.shape]} and {[*wanted.shape]}")
    got, wanted = got.detach().double(), wanted.detach().double()
    if not wanted.any():
        raise ValueError("wanted must not be zeros only: a relative error needs a scale")
    return float((got - wanted).norm() / wanted.norm())


def key_cosine(keys_a: Tensor, keys_b: Tensor) -> float:
    """Mean cosine between the cached keys of two caches, over all leading dimensions, in float64.

    Args: keys_a, keys_b [..., d], such as one layer's [B, H, S, d].

    Raises ValueError for shapes that differ, empty tensors, and keys of length zero (no direction).
    """
    if keys_a.shape != keys_b.shape or keys_a.numel() == 0:
        raise ValueError(
            "keys_a and keys_b must be non-empty and of one shape [..., d], got "
            f"{tuple(keys_a.shape)} and {tuple(keys_b.shape)}"
        )
    a, b = keys_a.double(), keys_b.double()
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    if not (lengths > 0).all():
        raise ValueError("keys_a and keys_b must have directions: some key has length zero (or is nan)")
    return ((a * b).sum(-1) / lengths).mean().item()


def exact_match(prediction: str, gold: str) -> bool:
    """Whether two strings are equal but for white space: `prediction.split() == gold.split()`.

    Source: RepoBench, evaluation/metrics.py.
    """
    _check_strings(prediction, gold)
    return prediction.split() == gold.split()


def edit_similarity(a: str, b: str) -> int:
    """Indel similarity of two strings, rounded to an integer in 0..100.

    100 (1 - indel / (len(a) + len(b))), where indel counts insertions and deletions only: a substitution
    costs two. Two empty strings are equal, hence 100. Cost: O(len(a) len(b) / 64).

    Source: the `ratio` of fuzzywuzzy with its C back end, as in RepoBench, evaluation/metrics.py.
    """
    _check_strings(a, b)
    total = len(a) + len(b)
    return 100 if total == 0 else round(100 * (2 * _common_subsequence_length(a, b)) / total)


def _common_subsequence_length(a: str, b: str) -> int:
    """Length of the longest common subsequence, by Hyyrö's bit-parallel recurrence (2004)."""
    positions: dict[str, int] = {}
    for i, character in enumerate(a):
        positions[character] = positions.get(character, 0) | 1 << i
    full = (1 << len(a)) - 1
    row = full  # a zero bit marks a position of `a` that lengthens the subsequence
    for character in b:
        matches = row & positions.get(character, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def _logits_pair(p_logits: Tensor, q_logits: Tensor) -> tuple[Tensor, Tensor]:
    if p_logits.shape != q_logits.shape or p_logits.ndim == 0 or p_logits.shape[-1] == 0:
        raise ValueError(
            "p_logits and q_logits must share one shape [..., V] with V >= 1, got "
            f"{tuple(p_logits.shape)} and {tuple(q_logits.shape)}"
        )
    return p_logits, q_logits


def _first_argmax(name: str, logits: Tensor) -> Tensor:
    largest = logits.amax(-1, keepdim=True)
    if largest.isnan().any():
        raise ValueError(f"{name} must not hold nan, got {int(logits.isnan().sum())} of {logits.numel()}")
    return logits.argmax(-1)  # the first of several


def _check_strings(a: str, b: str) -> None:
    if not isinstance(a, str) or not isinstance(b, str):
        raise ValueError(f"both arguments must be strings, got {type(a).__name__} and {type(b).__name__}")
