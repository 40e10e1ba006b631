"""Uncertainty of a measured number: bootstrap and Wilson intervals, the permutation test, relative change."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Draws are evaluated in batches of about this many resampled values: 2000 draws of 100,000 values then need
# tens of megabytes instead of 1.6 GB.
_BATCH_VALUES = 2_000_000


class Interval(NamedTuple):
    """The two ends of an interval, in the unit of the statistic."""

    low: float
    high: float


class PermutationTest(NamedTuple):
    """The observed statistic and the probability of one at least as extreme under exchange of the labels."""

    statistic: float
    p_value: float


def bootstrap_interval(
    values,
    statistic: Callable = np.mean,
    n_draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    paired_with=None,
    clusters=None,
    combine: Callable = np.subtract,
) -> Interval:
    """Percentile bootstrap interval of a statistic, or of a paired difference of two.

    What is resampled:
      * `values` [n]: the n values;
      * `values` [n] with `clusters` [n]: in two stages, first whole clusters (seeds, texts, prompts), then
        the values inside each drawn cluster; with one cluster only its values. For items that differ by seed.
      * `values` [S, n]: rows and columns independently. For the SAME n items measured under S seeds; with one
        row only the columns.
    Intervals over a handful of seeds are too narrow (three seeds cannot show how seeds vary): say how many.

    Args:
        values: numbers, or a tuple of arrays of one shape that are resampled together and passed on as the
            statistic's arguments, as in `bootstrap_interval((labels, scores), metrics.auroc)`.
        statistic: from the resampled array(s) to one number. Evaluated for many draws at once if it takes
            `axis` (as np.mean, np.median and np.std do), otherwise draw by draw on flat arrays. A two-stage
            draw from clusters of unequal size is always evaluated draw by draw.
        n_draws: number of bootstrap draws.
        level: coverage, between 0 and 1.
        seed: seed of the draws; the same seed gives the same interval.
        paired_with: second measurement of the same items, shaped as `values` and resampled with it: the
            interval is that of `combine(statistic(values), statistic(paired_with))`.
        clusters: one label per value.
        combine: how two statistics become one number: np.subtract, or `metrics.relative_change`.

    Returns: Interval(low, high).

    Raises ValueError for fewer than two values, shapes that do not agree, nan in the values, a level outside
    (0, 1), and a statistic that is nan in some draw (such as an AUROC of draws that hold one class only).

    Source: Efron and Tibshirani (1993), An Introduction to the Bootstrap, ch. 13 (percentiles); Davison and
    Hinkley (1997), section 3.8 (two stages); Owen (2007), The pigeonhole bootstrap (rows and columns).
    """
    first = _as_samples("values", values)
    second = None if paired_with is None else _as_samples("paired_with", paired_with)
    shape = _check_bootstrap(first, second, n_draws, level, clusters)
    rng = np.random.default_rng(seed)
    batch = max(1, _BATCH_VALUES // first[0].size)

    def evaluate(index: np.ndarray) -> np.ndarray:  # index into the flat values [draws, size]
        found = _statistic_of(statistic, first, index)
        if second is not None:
            found = combine(found, _statistic_of(statistic, second, index))
        if np.isnan(found).any():
            raise ValueError(
                "statistic must be a number in every bootstrap draw, it was nan in "
                f"{int(np.isnan(found).sum())} of the first {len(found)} draws of {first[0].size} values"
            )
        return found

    if clusters is not None:
        draws = _draw_clusters(np.asarray(clusters), n_draws, batch, rng)
    elif len(shape) == 2:
        draws = _draw_rows_and_columns(shape, n_draws, batch, rng)
    else:
        draws = None
    with np.errstate(invalid="ignore", divide="ignore"):
        if draws is None:
            found = _plain_draws(evaluate, first[0].size, n_draws, batch, rng)
        else:
            found = np.concatenate([evaluate(index) for index in draws])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion, as fractions between 0 and 1 (scipy's `binomtest`).

    Raises ValueError for n below 1, successes outside 0..n or a level outside (0, 1).
    """
    from scipy.stats import binomtest

    _check_level(level)
    if int(n) != n or n < 1:
        raise ValueError(f"n must be a whole number of at least 1, got {n}")
    if int(successes) != successes or not 0 <= successes <= n:
        raise ValueError(f"successes must be a whole number in 0..n = 0..{n}, got {successes}")
    low, high = binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    return Interval(float(low), float(high))


def permutation_test(
    a,
    b,
    statistic: Callable | None = None,
    *,
    paired: bool = False,
    alternative: str = "two-sided",
    n_draws: int = 9999,
    seed: int = 0,
) -> PermutationTest:
    """Test whether two samples could be exchanged (scipy's `permutation_test`; exact where draws suffice).

    Args:
        a, b: samples [n] and [m]; with `paired=True` both [n], and only the members of a pair are exchanged.
        statistic: function (a, b, axis) -> number; None = difference of means, mean(a) - mean(b).
        alternative: "two-sided", "greater" (a above b) or "less".
        n_draws: random exchanges; all are enumerated where there are no more than that.
        seed: seed of the random exchanges.

    Returns: PermutationTest(statistic, p_value).

    Raises ValueError for empty, multi-dimensional or nan samples, and for pairs of unequal length.
    """
    from scipy.stats import permutation_test as scipy_permutation_test

    a, b = _as_samples("a", a)[0], _as_samples("b", b)[0]
    if a.ndim != 1 or b.ndim != 1:
        raise ValueError(f"a and b must be one-dimensional, got shapes {a.shape} and {b.shape}")
    if paired and a.shape != b.shape:
        raise ValueError(f"paired samples must have one length, got {len(a)} in a and {len(b)} in b")
    _check_count("n_draws", n_draws)
    result = scipy_permutation_test(
        (a, b),
        statistic or _difference_of_means,
        permutation_type="samples" if paired else "independent",
        alternative=alternative,
        n_resamples=n_draws,
        batch=max(1, _BATCH_VALUES // (a.size + b.size)),
        rng=np.random.default_rng(seed),
    )
    return PermutationTest(float(result.statistic), float(result.pvalue))


def relative_change(value, base):
    """How far `value` lies from `base`, in percent of |base|: 100 (value - base) / |base|.

    Args: numbers or arrays that broadcast. Returns: a float, or a float64 array.

    Raises ValueError where the base is 0.
    """
    value, base = np.asarray(value, dtype=np.float64), np.asarray(base, dtype=np.float64)
    if (base == 0).any():
        raise ValueError(f"base must not be 0: a relative change from 0 is undefined; got {_shown(base)}")
    change = 100 * (value - base) / np.abs(base)
    return float(change) if change.ndim == 0 else change


def _as_samples(name: str, values) -> tuple[np.ndarray, ...]:
    """One array or a tuple of arrays, each as float64 (or as given, if not numbers), none holding nan."""
    arrays = tuple(np.asarray(v) for v in (values if isinstance(values, tuple) else (values,)))
    for array in arrays:
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{name} must hold numbers, got dtype {array.dtype}")
        if array.size == 0 or array.ndim == 0:
            raise ValueError(f"{name} must be a non-empty array, got shape {array.shape}")
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise ValueError(f"{name} must not hold nan, got {int(np.isnan(array).sum())} of {array.size}")
    return tuple(a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays)


def _check_bootstrap(first, second, n_draws, level, clusters) -> tuple[int, ...]:
    _check_level(level)
    _check_count("n_draws", n_draws)
    shape = first[0].shape
    for name, arrays in (("values", first), ("paired_with", second or ())):
        for array in arrays:
            if array.shape != shape:
                raise ValueError(f"{name} must have one shape throughout: got {array.shape} beside {shape}")
    if len(shape) > 2:
        raise ValueError(f"values must be [n] or [S, n], got shape {shape}")
    if shape[-1] < 2 and math.prod(shape) < 2:
        raise ValueError(f"values must hold at least 2 numbers to resample, got {math.prod(shape)}")
    if clusters is not None and np.asarray(clusters).shape != shape[:1]:
        raise ValueError(f"clusters must hold one label per value, {shape[:1]}; got {np.shape(clusters)}")
    if clusters is not None and len(shape) == 2:
        raise ValueError(f"clusters go with values [n]; values [S, n] has seeds as rows, got shape {shape}")
    return shape


def _statistic_of(statistic: Callable, arrays: Sequence[np.ndarray], index: np.ndarray) -> np.ndarray:
    samples = [array.reshape(-1)[index] for array in arrays]  # each [draws, size]
    if _takes_axis(statistic):
        return np.asarray(statistic(*samples, axis=-1), dtype=np.float64)
    return np.array([statistic(*rows) for rows in zip(*samples, strict=True)], dtype=np.float64)


def _takes_axis(statistic: Callable) -> bool:
    try:
        return "axis" in inspect.signature(statistic).parameters
    except (TypeError, ValueError):  # some built-ins carry no signature
        return False


def _plain_draws(evaluate: Callable, size: int, n_draws: int, batch: int, rng) -> np.ndarray:
    from scipy.stats import bootstrap

    # scipy resamples the INDEX, so that tuples, pairs and any statistic are served by one call.
    result = bootstrap(
        (np.arange(size),),
        lambda index, axis: evaluate(index) if index.ndim == 2 else evaluate(index[None])[0],
        n_resamples=n_draws,
        batch=batch,
        vectorized=True,
        method="percentile",
        rng=rng,
    )
    return result.bootstrap_distribution


def _draw_rows_and_columns(shape, n_draws: int, batch: int, rng) -> Iterator[np.ndarray]:
    n_rows, n_columns = shape
    for start in range(0, n_draws, batch):
        count = min(batch, n_draws - start)
        rows = rng.integers(n_rows, size=(count, n_rows, 1))
        columns = rng.integers(n_columns, size=(count, 1, n_columns))
        yield (rows * n_columns + columns).reshape(count, -1)


def _draw_clusters(labels: np.ndarray, n_draws: int, batch: int, rng) -> Iterator[np.ndarray]:
    _, cluster_of = np.unique(labels, return_inverse=True)
    sizes = np.bincount(cluster_of)
    members = np.split(np.argsort(cluster_of, kind="stable"), np.cumsum(sizes)[:-1])
    n_clusters = len(members)
    if (sizes == sizes[0]).all():
        table = np.stack(members)  # [C, size]
        for start in range(0, n_draws, batch):
            count = min(batch, n_draws - start)
            drawn = rng.integers(n_clusters, size=(count, n_clusters, 1))
            within = rng.integers(sizes[0], size=(count, n_clusters, sizes[0]))
            yield table[drawn, within].reshape(count, -1)
        return
    for _ in range(n_draws):
        drawn = rng.integers(n_clusters, size=n_clusters)
        yield np.concatenate([members[c][rng.integers(sizes[c], size=sizes[c])] for c in drawn])[None]


def _difference_of_means(a, b, axis):
    return np.mean(a, axis=axis) - np.mean(b, axis=axis)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")


def _check_count(name: str, count: int) -> None:
    if isinstance(count, bool) or int(count) != count or count < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {count}")


def _shown(array: np.ndarray) -> str:
    return str(array) if array.size <= 8 else f"{int((array == 0).sum())} zeros among {array.size} bases"
