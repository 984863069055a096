"""What changes over a MAGIA run: the size of the subset and the weight of the image prior."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..selection import subset_size

__all__ = ["Annealing", "Schedule"]


@dataclass(frozen=True)
class Schedule:
    """How many images a subset has, and how often it is drawn (see `breaching_ext.selection`).

    Attributes:
        mode, k, l_iter, a, b: as in `subset_size`.
        redraw: 'step' (once an outer step) or 'closure' (at every evaluation; makes L-BFGS's curvature noisy).

    Raises:
        ValueError: for an unknown mode or redraw, or l_iter < 1.
    """

    mode: str = "constk"
    k: int = 2
    l_iter: int = 100
    a: float = -0.1
    b: float = 200.0
    redraw: str = "step"

    def __post_init__(self) -> None:
        if self.redraw not in ("step", "closure"):
            raise ValueError(f"subset.redraw={self.redraw!r} is unknown; valid: step, closure.")
        subset_size(self.mode, 0, 1, 1, self.k, self.l_iter, self.a, self.b)

    def size(self, iteration: int, batch_size: int, n_iter: int) -> int:
        """S at an outer step."""
        return subset_size(self.mode, iteration, batch_size, n_iter, self.k, self.l_iter, self.a, self.b)


@dataclass(frozen=True)
class Annealing:
    """Weight of the image prior over the run: geometric from `first` to `last`, or constant.

    A strong prior at the start keeps the candidate smooth while the gradient settles which image has which label;
    it then fades so that detail is decided by the gradient.

    Attributes:
        last: weight at the end.
        first: weight at the start; None keeps `last` throughout.

    Raises:
        ValueError: for a weight that is negative or not finite, or a geometric run to or from 0.
    """

    last: float
    first: float | None = None

    def __post_init__(self) -> None:
        weights = [self.last] if self.first is None else [self.last, self.first]
        if not all(math.isfinite(w) and w >= 0 for w in weights) or (self.first is not None and 0 in weights):
            raise ValueError(
                f"image_prior.weight={self.last} with image_prior.anneal_from={self.first} is not possible; valid: "
                "numbers above 0 (0: off, with image_prior.anneal_from=null)."
            )

    def times(self, factor: float) -> Annealing:
        """The same course with every weight multiplied by a positive factor."""
        return Annealing(self.last * factor, None if self.first is None else self.first * factor)

    def at(self, progress: float) -> float:
        """Weight at progress in [0, 1] through the run."""
        if self.first is None:
            return self.last
        return self.first * (self.last / self.first) ** min(max(progress, 0.0), 1.0)
