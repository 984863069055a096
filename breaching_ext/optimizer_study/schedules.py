"""Learning-rate schedules: the factor η_t by which a step size is multiplied at a moment of the run.

Time is measured in epochs and may be fractional: like the AdamW paper (its T_cur is updated at every batch),
the trainers ask for the factor at every step, not once an epoch.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable

from ..values import is_number, is_whole
from .config import require, require_choice

SCHEDULES: tuple[str, ...] = ("fixed", "step_drop", "cosine", "warm_restarts")
RESTART_ENDS: tuple[str, ...] = ("down", "up", "exact")


class LRScheduler(ABC):
    """The factor η_t over a run of ``epochs`` epochs.

    Attributes:
        epochs: Epochs that the run lasts; a restart schedule may have rounded the number it was given.
    """

    name: str = ""

    def __init__(self, epochs: int) -> None:
        """Remember the length of the run.

        Raises:
            ValueError: If ``epochs`` is below one.
        """
        require(is_whole(epochs) and epochs >= 1, "epochs", epochs, "a whole number >= 1")
        self.epochs = epochs

    @abstractmethod
    def factor(self, epoch: float) -> float:
        """η at ``epoch`` (fractional, from 0 on)."""

    def period(self, epoch: float) -> float:
        """T of the normalized decay, in epochs: the length of the run, or of the current restart period."""
        return float(self.epochs)

    def describe(self) -> dict[str, object]:
        """What a record of the run needs to know about the schedule (JSON types)."""
        return {"name": self.name, "epochs": self.epochs}

    def __repr__(self) -> str:
        """Name and length."""
        return f"{type(self).__name__}(epochs={self.epochs})"


class Fixed(LRScheduler):
    """η = 1 throughout."""

    name = "fixed"

    def factor(self, epoch: float) -> float:
        """η at ``epoch``."""
        return 1.0


class StepDrop(LRScheduler):
    """η drops by ``gamma`` at given fractions of the run (30, 60 and 80 of 100 epochs)."""

    name = "step_drop"

    def __init__(self, epochs: int, fractions: tuple[float, ...] = (0.3, 0.6, 0.8), gamma: float = 0.1) -> None:
        """Place the drops.

        Args:
            epochs: Length of the run.
            fractions: Where the drops lie, increasing, as fractions of the run.
            gamma: Factor of each drop.

        Raises:
            ValueError: If a fraction lies outside (0, 1), they do not increase, or gamma lies outside (0, 1].
        """
        super().__init__(epochs)
        fractions = tuple(fractions) if isinstance(fractions, Iterable) else fractions
        listed = isinstance(fractions, tuple) and all(map(is_number, fractions))
        require(listed, "fractions", fractions, "a list of increasing numbers in (0, 1)")
        increasing = all(a < b for a, b in zip((0.0, *fractions), (*fractions, 1.0), strict=True))
        require(increasing, "fractions", fractions, "increasing numbers in (0, 1)")
        require(is_number(gamma) and 0 < gamma <= 1, "gamma", gamma, "a number in (0, 1]")
        self.gamma = gamma
        # Rounded so that 0.3 of 100 epochs is epoch 30, not the float just below or above it.
        self.milestones = [round(fraction * epochs, 9) for fraction in fractions]

    def factor(self, epoch: float) -> float:
        """η at ``epoch``."""
        return self.gamma ** bisect_right(self.milestones, epoch)

    def describe(self) -> dict[str, object]:
        """Name, length, drops and their factor."""
        return {**super().describe(), "milestones": self.milestones, "gamma": self.gamma}


class Cosine(LRScheduler):
    """η = ½ + ½·cos(π·epoch/epochs), from 1 to 0."""

    name = "cosine"

    def factor(self, epoch: float) -> float:
        """η at ``epoch``."""
        return 0.5 + 0.5 * math.cos(math.pi * min(epoch / self.epochs, 1.0))


class WarmRestarts(LRScheduler):
    """Cosine annealing restarted after T₀, T₀·m, T₀·m² … epochs (SGDR, Loshchilov & Hutter 2017).

    With T₀ = 10 and m = 2 the periods end at 10, 30, 70, 150: a run of 100 epochs would be judged in the
    middle of a period, at a high step size. By default the run therefore ends with the last period that fits.
    """

    name = "warm_restarts"

    def __init__(self, epochs: int, t0: int = 10, t_mult: int = 2, end: str = "down") -> None:
        """Lay out the periods.

        Args:
            epochs: Length asked for.
            t0: Length of the first period in epochs.
            t_mult: Factor from one period to the next.
            end: ``"down"`` ends the run at the last period end within ``epochs`` (70 for 100; a run shorter
                than the first period is left as it is), ``"up"`` at the first one not before it (150),
                ``"exact"`` keeps ``epochs``. `describe` records whether the run ends at a period's end.

        Raises:
            ValueError: If a number is below one or ``end`` is unknown.
        """
        for key, value in (("t0", t0), ("t_mult", t_mult), ("epochs", epochs)):
            require(is_whole(value) and value >= 1, key, value, "a whole number >= 1")
        require_choice("end", end, RESTART_ENDS)
        self.t0, self.t_mult = t0, t_mult
        below, above = self._around(epochs)
        super().__init__({"down": below or epochs, "up": above, "exact": epochs}[end])

    def _around(self, epochs: int) -> tuple[int, int]:
        """The last period end that is at most ``epochs`` (0 if there is none) and the first that is at least
        it."""
        end, length, below = self.t0, self.t0, 0
        while end < epochs:
            below, length = end, length * self.t_mult
            end += length
        return (end if end == epochs else below), end

    def locate(self, epoch: float) -> tuple[float, int]:
        """Epochs since the last restart, and the length of the current period."""
        since, length = epoch, self.t0
        while since >= length:
            since, length = since - length, length * self.t_mult
        return since, length

    def factor(self, epoch: float) -> float:
        """η at ``epoch``."""
        since, length = self.locate(epoch)
        return 0.5 + 0.5 * math.cos(math.pi * since / length)

    def period(self, epoch: float) -> float:
        """T of the normalized decay: the length of the current period."""
        return float(self.locate(epoch)[1])

    def describe(self) -> dict[str, object]:
        """Name, length, periods and whether the run ends with a period."""
        ends = self._around(self.epochs)[1] == self.epochs
        return {**super().describe(), "t0": self.t0, "t_mult": self.t_mult, "ends_at_period_end": ends}


def create_schedule(name: str, epochs: int, **options: object) -> LRScheduler:
    """Build a schedule by name.

    Args:
        name: One of `SCHEDULES`.
        epochs: Length of the run in epochs.
        **options: The schedule's own arguments, such as ``end`` of `WarmRestarts`.

    Raises:
        ValueError: If the name or an option's value is not valid.
    """
    require_choice("schedule", name, SCHEDULES)
    kinds: dict[str, Callable[..., LRScheduler]] = {k.name: k for k in (Fixed, StepDrop, Cosine, WarmRestarts)}
    valid = [key for key in inspect.signature(kinds[name]).parameters if key != "epochs"]
    for key in options:
        require(key in valid, f"schedule_options of {name}", key, ", ".join(valid) or "none")
    return kinds[name](epochs, **options)
