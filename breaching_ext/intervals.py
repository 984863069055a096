"""Means over seeds with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import stats


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the mean and the half-width of its Student t-interval; the half-width is NaN for a single value.

    Args:
        values: independent results, for example one a seed.
        level: coverage of the interval.

    Raises:
        ValueError: for no values at all.
    """
    if not values:
        raise ValueError("No values: there is no mean.")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    quantile = float(stats.t.ppf(0.5 + level / 2, len(values) - 1))
    return mean, quantile * math.sqrt(variance / len(values))


def plus_minus(values: Sequence[float], digits: int = 2, sign: bool = False) -> str:
    """Return "mean ± half-width" (or the mean alone for a single value)."""
    mean, half = mean_interval(values)
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{digits}f}"
