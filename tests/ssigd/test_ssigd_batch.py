"""The certificate of a batch: what it cannot vouch for is solved alone, and every figure is the single solver's."""

import numpy as np
import pytest
import torch

from breaching_ext.ssigd import (
    BatchedQP,
    DegenerateError,
    ParametricQP,
    StronglyConvexBilevelProblem,
    batched_implicit_gradient,
    implicit_gradient,
)
from breaching_ext.ssigd.reference import random_spd

BOX = np.vstack([np.eye(3), -np.eye(3)])


@pytest.fixture
def batch():
    """Return a batched solver in odd units, linear terms with active rows on both sides, and right-hand sides."""
    rng = np.random.default_rng(0)
    rows = np.array([2.0, 1e3, 0.5, 2.0, 1e3, 0.5])
    single = ParametricQP(random_spd(rng, 3, 20.0), rows[:, None] * BOX)
    c = torch.from_numpy(4.0 * rng.standard_normal((6, 3)))
    return BatchedQP(single), c, torch.from_numpy(rows).expand(6, 6)


def assert_is_the_loop(batched, solution, c, h):
    """Compare every figure of the certificate, and the gradient, with the single solver's."""
    v = torch.linspace(-1.0, 1.0, 3, dtype=torch.float64).expand(len(c), 3)
    a, b = batched.adjoint(solution, v)
    multipliers, rows = (batched.row_values(value, solution.side) for value in (solution.signed, b))
    for i in range(len(c)):
        one = batched.single.solve(c[i].numpy(), h[i].numpy())
        np.testing.assert_allclose(solution.y[i].numpy(), one.y, rtol=0, atol=1e-13)
        np.testing.assert_allclose(multipliers[i].numpy(), one.multipliers, rtol=1e-11, atol=1e-13)
        assert float(solution.margin[i]) == pytest.approx(one.margin, rel=1e-9, abs=1e-13)
        assert bool(solution.kink[i]) == one.kink
        assert float(solution.residual[i]) <= 1e-12
        one_a, one_b = batched.single.adjoint(one, v[i].numpy())
        np.testing.assert_allclose(a[i].numpy(), one_a, rtol=0, atol=1e-13)
        np.testing.assert_allclose(rows[i].numpy()[one.active], one_b, rtol=1e-10, atol=1e-13)


def test_a_certified_batch_is_the_loop(batch):
    batched, c, h = batch
    solution = batched.solve(c, h)
    assert solution.fallbacks == 0
    assert {-1.0, 0.0, 1.0} == set(solution.side.flatten().tolist())
    assert_is_the_loop(batched, solution, c, h)


def test_members_that_are_solved_alone_are_the_loop_too(batch, monkeypatch):
    """The guess is that nothing is active, and no active-set step mends it."""
    batched, c, h = batch
    monkeypatch.setattr(batched._guess, "sides", lambda c, free, lower, upper: torch.zeros_like(free))
    batched.polish_steps = 0
    solution = batched.solve(c, h)
    assert solution.fallbacks == 6
    alone = [batched.single.solve(ci, hi).residual for ci, hi in zip(c.numpy(), h.numpy(), strict=True)]
    assert solution.residual.tolist() == alone
    assert_is_the_loop(batched, solution, c, h)


@pytest.mark.parametrize("kind", ["box", "coupled"])
def test_gradients_of_an_ill_conditioned_batch_are_refined(kind):
    problem = StronglyConvexBilevelProblem(8, seed=1, constraints=kind, condition=1e8)
    x = torch.from_numpy(np.random.default_rng(0).uniform(-2.0, 2.0, (16, 8)))
    each = torch.stack([implicit_gradient(problem, point) for point in x])
    difference = (batched_implicit_gradient(problem, x) - each).norm(dim=1) / each.norm(dim=1)
    assert float(difference.max()) <= 1e-9


@pytest.mark.parametrize("member", [0, 3])
def test_a_member_that_does_not_solve_its_equations_is_solved_alone(batch, monkeypatch, member):
    """It is moved where its active rows do not see it."""
    batched, c, h = batch
    right = batched.solve(c, h)
    free = (right.side[member] == 0).double()
    assert bool(free.any())
    solve = batched.kkt.solve

    def wrong(factor, r, e):
        y, signed = solve(factor, r, e)
        if len(y) == len(c):
            y[member] += 1e-9 * free / batched._variables
        return y, signed

    monkeypatch.setattr(batched.kkt, "solve", wrong)
    found = batched.solve(c, h)
    assert found.fallbacks == 1
    torch.testing.assert_close(found.y, right.y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("refined", [True, False])
def test_a_member_off_its_bounds_is_refined_and_else_solved_alone(batch, monkeypatch, refined):
    batched, c, h = batch
    right = batched.solve(c, h)
    active = (right.side != 0).double()
    member = int(active.any(dim=1).nonzero()[0, 0])
    solve, once = batched.kkt.solve, batched.kkt.once

    def wrong(factor, r, e):
        monkeypatch.setattr(batched.kkt, "once", once)
        y, signed = solve(factor, r, e)
        # stationary still, because the multipliers move with y
        y[member] += 1e-9 * batched.kkt.T @ active[member]
        signed[member] -= 1e-9 * active[member]
        if not refined:
            monkeypatch.setattr(batched.kkt, "once", lambda factor, r, e: (0.0 * r, 0.0 * e))
        return y, signed

    monkeypatch.setattr(batched.kkt, "solve", wrong)
    found = batched.solve(c, h)
    assert found.fallbacks == (0 if refined else 1)
    torch.testing.assert_close(found.y, right.y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("tilt", [1e-4, 1e-5])
def test_nearly_dependent_rows_are_solved_alone(tilt):
    """Rows -y₁ ≤ -1 and y₁ + tilt y₂ ≤ 1 + tilt/2 fix y₂ at 1/2; the factor of a batch is not sound there."""
    G, h = np.array([[-1.0, 0, 0], [1.0, tilt, 0]]), np.array([-1.0, 1.0 + 0.5 * tilt])
    batched = BatchedQP(ParametricQP(np.eye(3), G))
    c = torch.tensor([[3.0, -3.0, 0.2]] * 2, dtype=torch.float64)
    found = batched.solve(c, torch.from_numpy(h).expand(2, 2))
    assert found.fallbacks == 2
    np.testing.assert_allclose(found.y.numpy(), [[1.0, 0.5, -0.2]] * 2, rtol=0, atol=1e-15 / tilt)


def test_the_kink_of_one_member_is_told_with_its_margin(batch, caplog):
    batched, c, h = batch
    v = torch.ones_like(c)
    batched.adjoint(batched.solve(c, h), v)
    assert not caplog.records
    y = np.array([0.5, 1.0, -0.25])
    c[4] = torch.from_numpy(-batched.single.Q @ y)
    solution = batched.solve(c, h)
    assert solution.kink.tolist() == [False] * 4 + [True, False]
    assert solution.fallbacks == 1
    batched.adjoint(solution, v)
    batched.adjoint(solution, v)
    assert [f"margin {float(solution.margin[4]):.1e}" in record.message for record in caplog.records] == [True]


def test_the_member_below_the_margin_is_named(batch):
    batched, c, h = batch
    margins = batched.solve(c, h).margin
    worst = int(margins.argmin())
    assert worst != 0
    strict = BatchedQP(ParametricQP(batched.single.Q, batched.single.G, min_margin=1.01 * float(margins.min())))
    with pytest.raises(DegenerateError, match=f"member {worst}: .* margin {float(margins.min()):.3g} is below"):
        strict.solve(c, h)


def test_a_batch_may_be_empty():
    batched = BatchedQP(ParametricQP(np.eye(3), BOX))
    solution = batched.solve(torch.zeros(0, 3), torch.ones(0, 6))
    assert solution.y.shape == (0, 3)
    assert batched.adjoint(solution, torch.zeros(0, 3, dtype=torch.float64))[0].shape == (0, 3)


def test_the_opposite_side_of_a_thin_pair_counts_in_the_margin():
    """The rows 0 ≤ y₁ ≤ 1e-3 are closer to each other than y₁'s multiplier is large."""
    batched = BatchedQP(ParametricQP(np.eye(2), 2.0 * np.array([[1.0, 0], [-1, 0]])))
    c, h = torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), torch.tensor([[2e-3, 0.0]] * 2, dtype=torch.float64)
    np.testing.assert_allclose(batched.solve(c, h).margin.numpy(), 1e-3, rtol=1e-12)


@pytest.mark.parametrize("tilt", [1e-6, 3e-8])
def test_a_gradient_that_leaves_nearly_opposite_rows_is_solved_alone(tilt):
    """They fix y₁ and y₂, so a is zero there; another entry is free, so that a is not small beside the cotangent."""
    n = 100
    pair = np.array([[1.0, 0.0], [-1.0, tilt]])
    G = np.vstack([np.eye(n), -np.eye(n), np.r_[pair[1], np.zeros(n - 2)]])
    h, c, v = np.r_[1.0, np.full(2 * n - 1, 10.0), -1.0 + 0.5 * tilt], np.zeros(n), np.zeros(n)
    c[:2], v[:2], v[50] = -3.0, (0.3, 1.0), 1.0
    batched = BatchedQP(ParametricQP(np.eye(n), G))
    many = batched.solve(torch.from_numpy(c)[None], torch.from_numpy(h)[None])
    a, b = batched.adjoint(many, torch.from_numpy(v)[None])
    np.testing.assert_allclose(a[0].numpy(), np.eye(n)[50], rtol=0, atol=1e-13)
    rows = batched.row_values(b, many.side)[0][[0, 2 * n]]
    np.testing.assert_allclose(rows, np.linalg.solve(pair.T, v[:2]), rtol=1e-9)
