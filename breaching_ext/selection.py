"""Subset sizes S for MAGIA's random-subset matching: how many images of the batch a step looks at.

Pure functions of the iteration i (0-based), the batch size B and the run's length n_iter, every one of them clamped
to 1 ≤ S ≤ B:

==================  ==================================================  ===========================
mode                S                                                   after l_iter steps
==================  ==================================================  ===========================
const1              1
constk              k
linear_inc_l        ⌈B (i + 1) / l_iter⌉                                B
linear_inc_total    ⌈B (i + 1) / n_iter⌉
linear_dec_l        ⌈B (1 − i / l_iter)⌉                                1
linear_dec_total    ⌈B (1 − i / n_iter)⌉
sigmoid             ⌈B / (1 + exp(−a (i − b)))⌉
==================  ==================================================  ===========================

With the default a < 0 the sigmoid falls from B to 1 around i = b. Its formula is not published with the code; it is
the usual logistic curve, and so a guess.

The ceilings of the linear modes are exact: they are taken of a ratio of integers, not of a floating-point number
to which an offset was added.

References:
    "MAGIA: Sensing Per-Image Signals from Single-Round Averaged Gradients for Label-Inference-Free Gradient
    Inversion", arXiv 2509.18170.
"""

from __future__ import annotations

import math

from .values import is_whole

__all__ = ["MODES", "subset_size"]

#: The seven schedules.
MODES = (
    "const1",
    "constk",
    "linear_inc_l",
    "linear_inc_total",
    "linear_dec_l",
    "linear_dec_total",
    "sigmoid",
)


def subset_size(
    mode: str,
    iteration: int,
    batch_size: int,
    n_iter: int,
    k: int = 2,
    l_iter: int = 100,
    a: float = -0.1,
    b: float = 200.0,
) -> int:
    """Number of images in the subset of one outer step.

    Args:
        mode: one of `MODES`.
        iteration: the step, counted from 0; values of `n_iter` and above are allowed (the formulas go on).
        batch_size: B, images in the batch.
        n_iter: outer steps of the whole run.
        k: size in mode 'constk'; outside 1 … B it is clamped.
        l_iter: steps over which 'linear_inc_l' and 'linear_dec_l' reach their end.
        a: slope of 'sigmoid' per step; negative falls.
        b: step at which 'sigmoid' stands at B/2.

    Returns:
        S, 1 ≤ S ≤ B.

    Raises:
        ValueError: for an unknown mode, `batch_size`, `n_iter` or `l_iter` below 1, a negative iteration, or a
            sigmoid with a parameter that is not finite.
        TypeError: for a step, batch size or k that is not a whole number: a size must be one.
    """
    if mode not in MODES:
        raise ValueError(f"sel_mode={mode!r} is unknown; valid: {', '.join(MODES)}.")
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("n_iter", n_iter, 1),
        ("l_iter", l_iter, 1),
        ("iteration", iteration, 0),
        ("k", k, -math.inf),
    ):
        if not is_whole(value):
            raise TypeError(f"{name}={value!r} is not a whole number.")
        if value < least:
            raise ValueError(f"{name}={value} is out of range; valid: {least} or more.")
    if mode == "sigmoid" and not (math.isfinite(a) and math.isfinite(b)):
        raise ValueError(f"sel_mode='sigmoid' needs finite a and b, got a={a}, b={b}.")
    size = {
        "const1": lambda: 1,
        "constk": lambda: k,
        "linear_inc_l": lambda: _ceil_div(batch_size * (iteration + 1), l_iter),
        "linear_inc_total": lambda: _ceil_div(batch_size * (iteration + 1), n_iter),
        "linear_dec_l": lambda: _ceil_div(batch_size * (l_iter - iteration), l_iter),
        "linear_dec_total": lambda: _ceil_div(batch_size * (n_iter - iteration), n_iter),
        "sigmoid": lambda: math.ceil(batch_size * _logistic(a * (iteration - b))),
    }[mode]()
    return int(max(1, min(batch_size, size)))


def _ceil_div(numerator: int, denominator: int) -> int:
    """⌈numerator / denominator⌉ in integers."""
    return -(-numerator // denominator)


def _logistic(z: float) -> float:
    """1 / (1 + exp(−z)) without overflow."""
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))
