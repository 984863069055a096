"""The closed-form decode: exact where the factors determine the gradient, and only there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from breaching_ext.lora.decode import (
    Factors,
    completed,
    cosine,
    determines,
    factor_gradients,
    is_determined,
    low_rank_sketch,
    minimum_norm,
    rank,
    unseen,
)
from breaching_ext.lora.whitening import whitened

EXACT = 0.999999


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def of_rank(rows: int, columns: int, q: int, seed: int) -> torch.Tensor:
    return gaussian(rows, q, seed=seed) @ gaussian(q, columns, seed=seed + 1)


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, Factors]:
    """A gradient (o, i), and factors whose ranks are drawn apart from r: B = 0, deficient, full."""
    o, i, r = (draw(st.integers(1, top)) for top in (7, 8, 9))
    rank_a, rank_b = draw(st.integers(1, min(r, i))), draw(st.integers(0, min(o, r)))
    seed = draw(st.integers(0, 10**6))
    a, b = of_rank(r, i, rank_a, seed), of_rank(o, r, rank_b, seed + 10)
    gradient = of_rank(o, i, draw(st.integers(1, min(o, i))), seed + 20)
    return gradient, Factors(a, b, draw(st.sampled_from([0.25, 1.0, 4.0, -2.0])))


@settings(max_examples=80, deadline=None)
@given(problems())
def test_the_minimum_norm_estimate_is_the_gradient_less_what_no_factor_sees(problem):
    gradient, factors = problem
    estimate = minimum_norm(*factor_gradients(gradient, factors), factors)
    torch.testing.assert_close(estimate, gradient - unseen(gradient, factors), rtol=1e-7, atol=1e-7)
    if determines(factors):
        assert cosine([estimate], [gradient]) >= EXACT


@settings(max_examples=80, deadline=None)
@given(problems())
def test_the_rank_condition_is_necessary(problem):
    """Without it there is another gradient with the same factor gradients: no decoder can be exact for both."""
    gradient, factors = problem
    kernel = unseen(gaussian(*gradient.shape, seed=10**7), factors)
    if determines(factors):
        assert kernel.norm() < 1e-8 * gradient.shape[0] * gradient.shape[1]
        return
    assert kernel.norm() > 1e-6
    seen, also_seen = factor_gradients(gradient, factors), factor_gradients(gradient + kernel, factors)
    for one, other in zip(seen, also_seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@settings(max_examples=80, deadline=None)
@given(problems())
def test_decoding_is_exact_exactly_where_the_test_says_so(problem):
    """For gradients in general position the decode is exact if, and only if, rank test or rank bound says so."""
    gradient, factors = problem
    bound = rank(gradient)
    decoded = completed(*factor_gradients(gradient, factors), factors, rank_bound=bound)
    if is_determined(factors, bound):
        assert cosine([decoded], [gradient]) >= EXACT
        return
    shown = rank(factors.b.T @ gradient @ factors.a.T)
    if shown >= min(rank(factors.a), rank(factors.b)):  # nothing says that its rank is low: no sketch is added
        torch.testing.assert_close(decoded, minimum_norm(*factor_gradients(gradient, factors), factors))
    if factors.b.any():
        assert (decoded - gradient).norm() > 1e-6 * gradient.norm()
    else:  # B = 0 shows the rows of A only
        assert cosine([decoded], [gradient]) == pytest.approx(
            float((gradient - unseen(gradient, factors)).norm() / gradient.norm())
        )


@pytest.mark.parametrize(("r", "exact"), [(7, False), (8, True), (12, True)])
def test_b_zero_needs_as_many_ranks_as_inputs(r, exact):
    gradient = gaussian(5, 8, seed=0)
    factors = Factors(gaussian(r, 8, seed=1), torch.zeros(5, r, dtype=torch.double), 2.0)
    decoded = minimum_norm(*factor_gradients(gradient, factors), factors)
    assert determines(factors) is exact
    assert (cosine([decoded], [gradient]) >= EXACT) is exact


@pytest.mark.parametrize(("r", "exact"), [(4, False), (5, True)])
def test_b_not_zero_needs_as_many_ranks_as_outputs(r, exact):
    gradient = gaussian(5, 8, seed=0)
    factors = Factors(gaussian(r, 8, seed=1), gaussian(5, r, seed=2), 2.0)
    decoded = minimum_norm(*factor_gradients(gradient, factors), factors)
    assert determines(factors) is exact
    assert (cosine([decoded], [gradient]) >= EXACT) is exact


def test_badly_conditioned_square_factors_still_decode():
    factors = Factors(
        gaussian(64, 64, seed=3) @ torch.diag(torch.logspace(0, -7, 64).double()), torch.zeros(16, 64).double(), 1.0
    )
    gradient = gaussian(16, 64, seed=4)
    decoded = minimum_norm(*factor_gradients(gradient, factors), factors)
    assert cosine([decoded], [gradient]) >= EXACT


def test_a_rank_one_gradient_is_given_away_by_a_rank_one_adapter():
    """One example through a linear layer: G = δ xᵀ, r = 1, B ≠ 0."""
    gradient = of_rank(6, 9, 1, seed=5)
    factors = Factors(gaussian(1, 9, seed=16), gaussian(6, 1, seed=17), 0.5)
    sent = factor_gradients(gradient, factors)
    assert cosine([minimum_norm(*sent, factors)], [gradient]) < 0.99
    torch.testing.assert_close(low_rank_sketch(*sent, factors), gradient)
    assert cosine([completed(*sent, factors, rank_bound=1)], [gradient]) >= EXACT


def test_the_sketch_is_not_added_without_a_reason():
    """A gradient of higher rank than r: the sketch would be wrong, and completed returns the minimum-norm estimate."""
    gradient = gaussian(6, 9, seed=5)
    factors = Factors(gaussian(2, 9, seed=16), gaussian(6, 2, seed=17), 1.0)
    sent = factor_gradients(gradient, factors)
    torch.testing.assert_close(completed(*sent, factors), minimum_norm(*sent, factors))
    assert cosine([low_rank_sketch(*sent, factors)], [gradient]) < 0.99


def test_a_known_rank_above_that_of_b_is_no_reason_for_the_sketch():
    """B has moved in two directions only: the core shows two of the gradient's four."""
    gradient = of_rank(9, 12, 4, seed=5)
    factors = Factors(gaussian(8, 12, seed=16), of_rank(9, 8, 2, seed=17), 1.0)
    assert not is_determined(factors, 4)
    sent = factor_gradients(gradient, factors)
    torch.testing.assert_close(completed(*sent, factors, rank_bound=4), minimum_norm(*sent, factors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_rounding_goes_by_the_type(dtype):
    """Factors of rank 2 that come in single precision have four singular values above 1e-10 times the largest."""
    gradient = of_rank(9, 12, 2, seed=5).to(dtype)
    factors = Factors(of_rank(4, 12, 2, seed=16).to(dtype), of_rank(9, 4, 2, seed=18).to(dtype), 1.0)
    assert (rank(factors.a), rank(factors.b), rank(gradient)) == (2, 2, 2)
    assert not determines(factors)
    sent = factor_gradients(gradient, factors)
    assert cosine([completed(*sent, factors, rank_bound=4)], [minimum_norm(*sent, factors)]) >= EXACT
    assert cosine([completed(*sent, factors, rank_bound=2)], [gradient]) >= EXACT
    new_a, new_b, white = whitened(*sent, factors)
    for found, expected in zip((new_a, new_b), factor_gradients(gradient, white), strict=True):
        assert (found - expected).norm() < 1e-4 * expected.norm()


def test_a_low_rank_that_shows_is_used_without_a_bound():
    gradient = of_rank(6, 9, 2, seed=5)
    factors = Factors(gaussian(4, 9, seed=16), gaussian(6, 4, seed=17), 1.0)
    sent = factor_gradients(gradient, factors)
    assert cosine([minimum_norm(*sent, factors)], [gradient]) < 0.9999
    assert cosine([completed(*sent, factors)], [gradient]) >= EXACT


@settings(max_examples=40, deadline=None)
@given(problems())
def test_whitened_factor_gradients_are_those_of_an_orthonormal_adapter(problem):
    gradient, factors = problem
    grad_a, grad_b, white = whitened(*factor_gradients(gradient, factors), factors)
    expected_a, expected_b = factor_gradients(gradient, white)
    torch.testing.assert_close(grad_a, expected_a, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_b, expected_b, rtol=1e-6, atol=1e-6)
    for matrix in (white.a @ white.a.T, white.b.T @ white.b):  # projections: ones and zeros
        torch.testing.assert_close(matrix @ matrix, matrix)
    if rank(factors.a) == factors.a.shape[1]:
        assert float(grad_b.norm()) == pytest.approx(float(gradient.norm()), rel=1e-6)


def test_cosine_of_a_zero_gradient_is_zero():
    assert cosine([torch.zeros(3)], [torch.ones(3)]) == 0.0
