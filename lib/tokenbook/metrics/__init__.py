"""What the chapters measure, with intervals.

Statistics come from scipy and scikit-learn, which are imported when a function first needs them; this package
itself costs no more than numpy and torch.

    intervals      bootstrap_interval, wilson_interval, permutation_test, relative_change
    estimates      estimate: a statistic with its interval, as the ledger takes it
    detection      auroc, tpr_at_fpr
    agreement      kl_from_logits, top1_agreement, key_cosine, rms_error, exact_match, edit_similarity
    distributions  frechet_distance, frechet_distance_of_moments
    cost           count_flops, time_call
"""

from tokenbook.metrics.agreement import (
    edit_similarity,
    exact_match,
    key_cosine,
    kl_from_logits,
    rms_error,
    top1_agreement,
)
from tokenbook.metrics.cost import Timing, count_flops, time_call
from tokenbook.metrics.detection import auroc, tpr_at_fpr
from tokenbook.metrics.distributions import frechet_distance, frechet_distance_of_moments
from tokenbook.metrics.estimates import Estimate, estimate
from tokenbook.metrics.intervals import (
    Interval,
    PermutationTest,
    bootstrap_interval,
    permutation_test,
    relative_change,
    wilson_interval,
)

__all__ = [
    "Estimate",
    "Interval",
    "PermutationTest",
    "Timing",
    "auroc",
    "bootstrap_interval",
    "count_flops",
    "edit_similarity",
    "estimate",
    "exact_match",
    "frechet_distance",
    "frechet_distance_of_moments",
    "key_cosine",
    "kl_from_logits",
    "permutation_test",
    "relative_change",
    "rms_error",
    "time_call",
    "top1_agreement",
    "tpr_at_fpr",
    "wilson_interval",
]
