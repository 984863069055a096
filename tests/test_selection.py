"""Subset sizes against rational arithmetic, and their limits."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from breaching_ext.selection import MODES, subset_size

SIZES = st.integers(1, 300)
STEPS = st.integers(1, 1000)


def expected(mode: str, i: int, batch: int, n_iter: int, k: int, l_iter: int) -> int:
    """The formulas in exact rationals."""
    value = {
        "const1": Fraction(1),
        "constk": Fraction(k),
        "linear_inc_l": batch * Fraction(i + 1, l_iter),
        "linear_inc_total": batch * Fraction(i + 1, n_iter),
        "linear_dec_l": batch * (1 - Fraction(i, l_iter)),
        "linear_dec_total": batch * (1 - Fraction(i, n_iter)),
    }[mode]
    return min(batch, max(1, math.ceil(value)))


@given(st.sampled_from(MODES[:-1]), st.integers(0, 1200), SIZES, STEPS, st.integers(-5, 400), STEPS)
def test_equals_the_formula_in_rational_arithmetic(mode, i, batch, n_iter, k, l_iter):
    assert subset_size(mode, i, batch, n_iter, k, l_iter) == expected(mode, i, batch, n_iter, k, l_iter)


@given(st.sampled_from(MODES), st.integers(0, 10**6), SIZES, STEPS, st.integers(-(10**6), 10**6))
def test_stays_within_the_batch(mode, i, batch, n_iter, k):
    size = subset_size(mode, i, batch, n_iter, k)
    assert isinstance(size, int)
    assert 1 <= size <= batch


@given(SIZES, st.integers(0, 1000), st.floats(-3, 3), st.floats(-500, 500))
def test_sigmoid_is_the_logistic_curve(batch, i, a, b):
    size = subset_size("sigmoid", i, batch, 1000, a=a, b=b)
    z = a * (i - b)
    if abs(z) < 30:
        exact = batch / (1 + math.exp(-z))
        assert size - 1 - 1e-9 <= max(exact, 1) <= max(size, 1) + 1e-9
    else:
        assert size == (batch if z > 0 else 1)


def test_linear_modes_reach_their_ends():
    sizes = {mode: [subset_size(mode, i, 16, 300, l_iter=100) for i in range(300)] for mode in MODES}
    assert sizes["linear_inc_l"][0] == 1
    assert sizes["linear_inc_l"][99:] == [16] * 201
    assert sizes["linear_inc_total"][-1] == 16
    assert sizes["linear_dec_l"][0] == 16
    assert sizes["linear_dec_l"][100:] == [1] * 200
    assert sizes["linear_dec_total"][0] == 16
    assert sizes["linear_dec_total"][-1] == 1
    assert sizes["sigmoid"][0] == 16
    assert sizes["sigmoid"][-1] == 1
    assert sizes["sigmoid"][200] == 8
    for mode in ("linear_inc_l", "linear_inc_total"):
        assert sizes[mode] == sorted(sizes[mode])
    for mode in ("linear_dec_l", "linear_dec_total", "sigmoid"):
        assert sizes[mode] == sorted(sizes[mode], reverse=True)


def test_exact_where_floating_point_rounds_up():
    """Many steps at which the same formula in floating point is one too large."""
    rounded_up = [
        (i, n)
        for n in range(1, 60)
        for i in range(n)
        if math.ceil(15 * (1 - i / n)) != math.ceil(15 * Fraction(n - i, n))
    ]
    assert rounded_up  # the trap exists
    for i, n in rounded_up:
        assert subset_size("linear_dec_l", i, 15, n, l_iter=n) == math.ceil(15 * Fraction(n - i, n))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("cubic", 0, 8, 10), MODES),
        (("const1", 0, 0, 10), ("batch_size=0",)),
        (("const1", -1, 8, 10), ("iteration=-1",)),
        (("const1", 0, 8, 0), ("n_iter=0",)),
        (("linear_inc_l", 0, 8, 10, 2, 0), ("l_iter=0",)),
        (("sigmoid", 0, 8, 10, 2, 5, float("nan")), ("sigmoid", "nan")),
    ],
)
def test_bad_values_are_named(arguments, names):
    with pytest.raises(ValueError, match=r"valid|finite") as error:
        subset_size(*arguments)
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    ("mode", "changes"),
    [("constk", {"k": 2.5}), ("constk", {"k": None}), ("linear_inc_l", {"l_iter": 2.5}), ("const1", {"n_iter": 10.0})],
)
def test_a_size_is_a_whole_number(mode, changes):
    """A float would end in slices outside: where images are chosen."""
    name = next(iter(changes))
    with pytest.raises(TypeError, match=f"{name}={changes[name]} is not a whole number"):
        subset_size(mode, **{"iteration": 0, "batch_size": 8, "n_iter": 10, **changes})
