"""Strong-Wolfe line search as a coroutine, so that many searches can share one evaluation.

The scalar logic is that of ``torch.optim.lbfgs._strong_wolfe`` (itself a port of minFunc's ``lswolfe``).
Written as a generator, a search *asks* for the step length that it wants evaluated next and is *sent* the value
found there. A driver can therefore advance the searches of N candidates in lock-step: one evaluation of the
stacked objective answers all of them, and every candidate still walks exactly its own path.

References:
    J. Nocedal and S. Wright, "Numerical Optimization", algorithms 3.5 and 3.6.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch

__all__ = ["Point", "SearchResult", "cubic_interpolate", "strong_wolfe"]


@dataclass
class Point:
    """The objective along a search direction, at one step length.

    Attributes:
        t: step length.
        f: objective value there.
        slope: directional derivative there.
        grad: the candidate's gradient there, (D,).
    """

    t: float
    f: float
    slope: float
    grad: torch.Tensor


@dataclass
class SearchResult:
    """Where a search ended (`point`) and how many evaluations it asked for (`evals`)."""

    point: Point
    evals: int


def cubic_interpolate(a: Point, b: Point, bounds: tuple[float, float] | None = None) -> float:
    """Minimise the cubic through two points with their slopes (Nocedal and Wright, equation 3.59).

    Args:
        a: one end.
        b: the other end.
        bounds: interval to which the minimiser is clipped; default: the one between the two points.

    Returns:
        The minimiser, or the interval's middle where the cubic has none or a value is not finite.
    """
    low, high = bounds if bounds is not None else (min(a.t, b.t), max(a.t, b.t))
    middle = (low + high) / 2.0
    if a.t == b.t or not all(map(math.isfinite, (a.f, a.slope, b.f, b.slope))):
        return middle
    d1 = a.slope + b.slope - 3.0 * (a.f - b.f) / (a.t - b.t)
    square = d1 * d1 - a.slope * b.slope
    if not square >= 0:
        return middle
    left, right = (a, b) if a.t <= b.t else (b, a)
    d2 = math.sqrt(square)
    denominator = right.slope - left.slope + 2.0 * d2
    if denominator == 0:
        return middle
    minimiser = right.t - (right.t - left.t) * ((right.slope + d2 - d1) / denominator)
    return min(max(minimiser, low), high)


def _evaluate(t: float) -> Generator[float, Point, Point]:
    """Ask for step length t; a NaN counts as infinitely bad, so that the search steps back from it."""
    point = yield t
    if math.isnan(point.f) or math.isnan(point.slope):
        return Point(t, math.inf, math.inf, point.grad)
    return point


def _trial_step(first: Point, second: Point, insufficient: bool) -> tuple[float, bool]:
    """Next step length inside the bracket, kept a tenth of its length away from the ends if it must be.

    Args:
        first: one end of the bracket.
        second: its other end.
        insufficient: whether the trial before this one was already close to an end.

    Returns:
        The step length, and whether it is close to an end.
    """
    t = cubic_interpolate(first, second)
    lower, upper = min(first.t, second.t), max(first.t, second.t)
    margin = 0.1 * (upper - lower)
    if min(upper - t, t - lower) >= margin:
        return t, False
    if not (insufficient or t >= upper or t <= lower):
        return t, True
    return (upper - margin if abs(t - upper) < abs(t - lower) else lower + margin), False


def strong_wolfe(
    start: Point,
    t: float,
    d_norm: float,
    *,
    c1: float = 1e-4,
    c2: float = 0.9,
    tolerance_change: float = 1e-9,
    max_ls: int = 25,
) -> Generator[float, Point, SearchResult]:
    """Search a step length that satisfies the strong Wolfe conditions.

    Args:
        start: the point at step 0 (`start.slope` < 0).
        t: first step length to try.
        d_norm: largest absolute entry of the direction.
        c1: sufficient-decrease constant.
        c2: curvature constant.
        tolerance_change: the bracket is given up once it moves no entry by more than this.
        max_ls: most iterations; one more evaluation than this is possible.

    Yields:
        A step length; the driver sends the `Point` found there.

    Returns:
        The `SearchResult`; its point may be non-finite if nothing finite was found.
    """
    new = yield from _evaluate(t)
    evals, iteration = 1, 0
    previous = start
    bracket: list[Point] | None = None
    done = False
    while iteration < max_ls:
        if new.f > start.f + c1 * new.t * start.slope or (iteration > 1 and new.f >= previous.f):
            bracket = [previous, new]
            break
        if abs(new.slope) <= -c2 * start.slope:
            bracket, done = [new], True
            break
        if new.slope >= 0:
            bracket = [previous, new]
            break
        t = cubic_interpolate(previous, new, (new.t + 0.01 * (new.t - previous.t), new.t * 10.0))
        previous = new
        new = yield from _evaluate(t)
        evals, iteration = evals + 1, iteration + 1
    if bracket is None:
        bracket = [start, new]
    low, high = (0, 1) if bracket[0].f <= bracket[-1].f else (1, 0)
    if done:
        return SearchResult(bracket[0], evals)

    insufficient = False
    while not done and iteration < max_ls:
        if abs(bracket[1].t - bracket[0].t) * d_norm < tolerance_change:
            break
        t, insufficient = _trial_step(bracket[0], bracket[1], insufficient)
        new = yield from _evaluate(t)
        evals, iteration = evals + 1, iteration + 1
        if new.f > start.f + c1 * new.t * start.slope or new.f >= bracket[low].f:
            bracket[high] = new
            low, high = (0, 1) if bracket[0].f <= bracket[1].f else (1, 0)
            continue
        if abs(new.slope) <= -c2 * start.slope:
            done = True
        elif new.slope * (bracket[high].t - bracket[low].t) >= 0:
            bracket[high] = bracket[low]
        bracket[low] = new
    return SearchResult(bracket[low], evals)
