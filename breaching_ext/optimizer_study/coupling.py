"""A number for how strongly the best weight decay depends on the learning rate.

For each learning rate, the weight decay that does a fixed amount of harm is located: the one at which the
test loss is 1.25 times that row's loss without weight decay. Its logarithm is regressed on that of the
learning rate. A slope of 0 means that learning rate and weight decay act apart (decoupled); −1 means that
only their product matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .config import require
from .records import OptimizerExperiment

DEFAULT_RATIO = 1.25
MIN_ROWS = 3


@dataclass(frozen=True)
class Coupling:
    """The slope of log₂(weight decay) on log₂(learning rate) at equal harm.

    Attributes:
        slope: The coupling number; NaN with fewer than three rows.
        standard_error: Of the slope, from the residuals; NaN with fewer than three rows.
        lr_multipliers: The rows that reach the ratio within the grid.
        wd_multipliers: Where each does.
        rows: Rows with a finite loss without weight decay.
        ratio: The factor on the loss.
    """

    slope: float
    standard_error: float
    lr_multipliers: tuple[float, ...]
    wd_multipliers: tuple[float, ...]
    rows: int
    ratio: float


def coupling(experiment: OptimizerExperiment, ratio: float = DEFAULT_RATIO) -> Coupling:
    """Measure the coupling of an experiment.

    Rows that never reach the ratio, that exceed it at the smallest positive weight decay already, or whose
    run without weight decay diverged, have no such point within the grid and are left out. A diverged cell
    counts as harm.

    Args:
        experiment: A grid with a column for weight decay 0.
        ratio: Factor on the row's loss without weight decay, > 1.

    Raises:
        ValueError: If the grid has no such column or ``ratio`` is not above 1.
    """
    require(ratio > 1, "ratio", ratio, "a number > 1")
    data, lrs, wds = experiment.get_heatmap_data()
    require(wds[:1] == [0.0], "wd_multipliers", wds, "a grid that contains 0")
    points = [(lr, crossing(wds[1:], (row[1:] / row[0]).tolist(), ratio)) for lr, row in zip(lrs, data, strict=True)]
    found = [(lr, wd) for lr, wd in points if wd is not None]
    rows = int(np.isfinite(data[:, 0]).sum())
    slope, error = _regress([math.log2(lr) for lr, _ in found], [math.log2(wd) for _, wd in found])
    return Coupling(slope, error, tuple(lr for lr, _ in found), tuple(wd for _, wd in found), rows, ratio)


def crossing(wds: Sequence[float], harm: Sequence[float], ratio: float) -> float | None:
    """The weight decay at which ``harm`` first rises through ``ratio``, or None.

    Between two points of the grid the logarithm of the harm is taken as linear in that of the weight decay.

    Args:
        wds: Positive weight decays, ascending.
        harm: Loss at each, relative to no weight decay; NaN (diverged) counts as infinite.
        ratio: Level to cross.
    """
    harm = [math.inf if math.isnan(value) else value for value in harm]
    if not harm or harm[0] >= ratio:
        return None
    above = next((index for index, value in enumerate(harm) if value >= ratio), None)
    if above is None:
        return None
    low, high = math.log(harm[above - 1]), math.log(harm[above])
    share = 1.0 if math.isinf(high) else (math.log(ratio) - low) / (high - low)
    return float(wds[above - 1] ** (1 - share) * wds[above] ** share)


def _regress(x: list[float], y: list[float]) -> tuple[float, float]:
    """Least-squares slope and its standard error."""
    if len(x) < MIN_ROWS:
        return math.nan, math.nan
    dx, dy = np.asarray(x) - np.mean(x), np.asarray(y) - np.mean(y)
    slope = float(dx @ dy / (dx @ dx))
    residual = dy - slope * dx
    return slope, float(math.sqrt(residual @ residual / (len(x) - 2) / (dx @ dx)))
