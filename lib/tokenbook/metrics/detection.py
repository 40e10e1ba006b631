"""How well a score separates two classes (scikit-learn's curves behind checked arguments)."""

import numpy as np


def auroc(labels, scores) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting one half.

    Args:
        labels: [n], 1 or True for the positive class, 0 or False for the negative.
        scores: [n], larger = more positive.

    Returns: a number in [0, 1]; 0.5 is chance.

    Raises ValueError for unequal lengths, labels other than 0 and 1, one class only, nan scores.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*_labels_and_scores(labels, scores)))


def tpr_at_fpr(labels, scores, fpr: float = 0.01) -> float:
    """Largest true positive rate among the thresholds whose false positive rate is at most `fpr`.

    No interpolation between thresholds: the rate returned is one that a real threshold attains. With n
    negatives the false positive rate moves in steps of 1/n, so an `fpr` below 1/n allows none.

    Args: labels and scores as in `auroc`; fpr: a fraction in [0, 1].

    Raises ValueError as `auroc`, and for fpr outside [0, 1].
    """
    from sklearn.metrics import roc_curve

    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr must be a fraction in [0, 1], got {fpr}")
    false_rate, true_rate, _ = roc_curve(*_labels_and_scores(labels, scores), drop_intermediate=False)
    return float(true_rate[false_rate <= fpr].max())


def _labels_and_scores(labels, scores) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(
            "labels and scores must be one-dimensional and equally long, got shapes "
            f"{labels.shape} and {scores.shape}"
        )
    if np.isnan(scores).any():
        raise ValueError(f"scores must not hold nan, got {int(np.isnan(scores).sum())} of {scores.size}")
    classes = np.unique(labels)
    if not np.isin(classes, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {classes[:5].tolist()}")
    if len(classes) < 2:
        raise ValueError(
            f"labels must hold both classes, got only {classes.tolist()} in {labels.size} labels"
        )
    return labels.astype(np.int64), scores
