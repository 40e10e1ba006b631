"""A number with its interval, as the ledger takes it: one call for what every chapter measures."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tokenbook.metrics.intervals import Interval, bootstrap_interval


class Estimate(NamedTuple):
    """A statistic and its bootstrap interval, both in the unit of the statistic."""

    value: float
    interval: Interval


def estimate(
    statistic: Callable, *arrays, clusters=None, same_items: bool = False, n_draws: int = 1000, seed: int = 0
) -> Estimate:
    """`statistic(*arrays)` with its 95 % bootstrap interval, for `Ledger.measure`.

    Args:
        statistic: from as many arrays as are given to one number; takes `axis` where it can (it is then
            evaluated for many draws at once, see `bootstrap_interval`).
        arrays: all of one shape. [n]: n items. [S, n]: n items under each of S seeds; whole seeds are drawn,
            then the items inside each.
        clusters: labels that stand in the place of the rows, one per value, in the arrays' order.
        same_items: the n items of [S, n] are the same under all seeds: seeds and items are drawn apart.
        n_draws, seed: of the bootstrap.

    Returns: Estimate(value, interval). Fewer than two values have no interval, its ends are nan: a ledger
    takes that for an interval that excludes nothing, and a long run does not end at its last step.

    Raises ValueError for arrays of different shapes, and what `bootstrap_interval` refuses.
    """
    arrays = tuple(np.ascontiguousarray(a, dtype=float) for a in arrays)
    if len({a.shape for a in arrays}) != 1 or arrays[0].ndim > 2:
        shapes = ", ".join(str(a.shape) for a in arrays) or "none"
        raise ValueError(f"arrays must have one shape, [n] or [S, n]; got {shapes}")
    flat = tuple(a.ravel() for a in arrays)
    if arrays[0].size < 2:
        value = float(statistic(*flat)) if arrays[0].size else math.nan
        return Estimate(value, Interval(math.nan, math.nan))
    values = arrays if same_items and arrays[0].ndim == 2 else flat
    if clusters is None and arrays[0].ndim == 2 and not same_items:
        clusters = np.repeat(np.arange(len(arrays[0])), arrays[0].shape[1])
    interval = bootstrap_interval(values, statistic, n_draws=n_draws, clusters=clusters, seed=seed)
    return Estimate(float(statistic(*flat)), interval)
