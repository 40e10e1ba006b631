"""Distances between two sets of feature vectors."""

import numpy as np


def frechet_distance(features_a, features_b) -> float:
    """Frechet distance between the normal distributions fitted to two sets of features, in float64.

    Args: features [n, D] and [m, D], at least two rows each; the covariances divide by n - 1 as in FID.
    With fewer rows than dimensions the covariances are singular, which is no error; but the distance is then
    biased upwards, the more the fewer rows: compare only distances of equally many rows.

    Raises ValueError for shapes that do not agree, fewer than two rows, values that are not finite.
    """
    moments = []
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name} must be [n, D] with at least 2 rows, got shape {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError(f"{name} must be finite, got {int((~np.isfinite(features)).sum())} that are not")
        moments += [features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))]
    return frechet_distance_of_moments(*moments)


def frechet_distance_of_moments(mean_a, covariance_a, mean_b, covariance_b) -> float:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), never below 0.

    The trace of the root is taken as that of (S_a^(1/2) S_b S_a^(1/2))^(1/2), whose matrix is symmetric: no
    complex roots, and singular covariances need no offset on the diagonal.

    Args: means [D], covariances [D, D], symmetric and positive semi-definite.

    Source: Dowson and Landau (1982); Heusel et al. (2017), equation 6.

    Raises ValueError for shapes that do not agree and values that are not finite.
    """
    mean_a, covariance_a = np.asarray(mean_a, dtype=np.float64), np.asarray(covariance_a, dtype=np.float64)
    mean_b, covariance_b = np.asarray(mean_b, dtype=np.float64), np.asarray(covariance_b, dtype=np.float64)
    shapes = [np.shape(x) for x in (mean_a, covariance_a, mean_b, covariance_b)]
    width = mean_a.size
    if shapes != [(width,), (width, width)] * 2:
        raise ValueError(f"means must be [D] and covariances [D, D] with one D, got {shapes}")
    if not all(np.isfinite(x).all() for x in (mean_a, covariance_a, mean_b, covariance_b)):
        raise ValueError("means and covariances must be finite, got nan or infinity")
    root = _root(covariance_a)
    roots = np.sqrt(np.clip(np.linalg.eigvalsh(root @ covariance_b @ root), 0, None))
    shift = mean_a - mean_b
    distance = shift @ shift + np.trace(covariance_a) + np.trace(covariance_b) - 2 * roots.sum()
    return max(float(distance), 0.0)


def _root(matrix: np.ndarray) -> np.ndarray:
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(eigenvalues, 0, None))) @ vectors.T
