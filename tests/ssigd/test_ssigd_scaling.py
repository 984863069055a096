"""Units do not matter: rows, variables and whole problems of any size, and large entries beside small rows."""

import re
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from breaching_ext.ssigd import (
    BatchedQP,
    InfeasibleError,
    LICQError,
    NotCertifiedError,
    ParametricQP,
    QPLayer,
    SSIGDError,
    StronglyConvexBilevelProblem,
)
from breaching_ext.ssigd.kkt_point import KKTPoint
from breaching_ext.ssigd.reference import random_spd

BOX = np.vstack([np.eye(2), -np.eye(2)])


def alone(Q, G, c, h, v):
    """Return y, multipliers, margin, kink and the adjoint (a, b over all rows) of the single solver."""
    solver = ParametricQP(Q, G)
    solution = solver.solve(c, h)
    a, b = solver.adjoint(solution, v)
    rows = np.zeros(len(G))
    rows[solution.active] = b
    return solution.y, solution.multipliers, solution.margin, solution.kink, a, rows


def in_a_batch(Q, G, c, h, v):
    """As `alone`, for the batched solver."""
    batched = BatchedQP(ParametricQP(Q, G))
    c, h, v = (torch.from_numpy(np.stack([value, value])) for value in (c, h, v))
    solution = batched.solve(c, h)
    a, b = batched.adjoint(solution, v)
    multipliers, rows = (batched.row_values(value, solution.side) for value in (solution.signed, b))
    found = (solution.y, multipliers, solution.margin, solution.kink, a, rows)
    return tuple(value[0].numpy() for value in found)


def assert_close(value, reference):
    np.testing.assert_allclose(value, reference, rtol=0, atol=1e-7 * np.abs(reference).max(initial=0.0))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), extra=st.integers(0, 4), whole=st.integers(-12, 12))
@example(seed=184, n=3, extra=2, whole=0)
@example(seed=44, n=5, extra=4, whole=-12)
def test_units_of_rows_and_variables_change_nothing(seed, n, extra, whole):
    rng = np.random.default_rng(seed)
    Q, G = random_spd(rng, n, 20.0), np.vstack([np.eye(n), -np.eye(n), rng.standard_normal((extra, n))])
    h = np.r_[rng.uniform(0.2, 1.5, 2 * n), rng.uniform(0.05, 1.0, extra)]
    c, v = 3.0 * rng.standard_normal(n), rng.standard_normal(n)
    y, multipliers, margin, _, a, b = alone(Q, G, c, h, v)
    if margin < 1e-4:
        return
    rows, units = 10.0 ** rng.uniform(-6, 6, len(G)), 10.0 ** rng.uniform(-3, 3, n)
    size = 10.0**whole  # of y: the objective is of the second degree
    scaled = Q * np.outer(units, units), rows[:, None] * G * units, size * c * units, size * rows * h
    for solve in (alone, in_a_batch):
        other = solve(*scaled, v * units)
        assert_close(other[0] * units / size, y)
        np.testing.assert_array_equal(other[1] > 0, multipliers > 0)
        assert_close(other[1] * rows / size, multipliers)
        assert not other[3]
        assert_close(other[4] * units, a)
        assert_close(other[5] * rows, b)


@pytest.mark.parametrize("size", [1e-300, 1e-20, 1e-12, 1e-6, 1e10, 1e20, 1e100])
@pytest.mark.parametrize("hessian", [False, True])
def test_problems_of_any_size_are_solved(size, hessian, caplog):
    """Either (Q, c) or (c, h) is of that size."""
    layer = QPLayer(size * np.eye(2) if hessian else np.eye(2), BOX)
    c, h = size * np.array([-3.0, 0.5]), np.ones(4) if hessian else np.full(4, size)
    unit = 1.0 if hessian else size
    for batch in (False, True):
        linear = torch.from_numpy(np.stack([c, c]) if batch else c).requires_grad_()
        y = layer(linear, torch.from_numpy(h))
        (gradient,) = torch.autograd.grad(y.sum(), linear)
        expected = np.array([[1.0, -0.5]] * 2 if batch else [1.0, -0.5])
        np.testing.assert_allclose(y.detach().numpy() / unit, expected, rtol=1e-12)
        np.testing.assert_allclose(
            gradient.numpy() * (size if hessian else 1.0), 0.0 * expected - [0.0, 1.0], atol=1e-9
        )
        margin = np.atleast_1d(layer.last_solution.margin)  # min of a multiplier of 2, a slack of 1/2
        np.testing.assert_allclose(margin / size, min(2.0, 0.5 / size) if hessian else 0.5, rtol=1e-9)
    assert "weakly active" not in caplog.text


@pytest.mark.parametrize("large", [1e4, 1e6, 1e8, 1e10])
def test_a_large_entry_does_not_make_small_rows_look_active(large, caplog):
    """y₁ is large and in no row; y₂ = y₃ = 1 are on their bounds, their sum is 1e-5 below its own."""
    G, h = np.array([[0, 1.0, 0], [0, 0, 1], [0, 1, 1]]), np.array([1, 1, 2.00001])
    for solve in (alone, in_a_batch):
        y, multipliers, margin, kink, a, _ = solve(np.eye(3), G, np.array([-large, -2, -2]), h, np.ones(3))
        np.testing.assert_allclose(y, [large, 1.0, 1.0], rtol=1e-14)
        np.testing.assert_allclose(multipliers, [1.0, 1.0, 0.0], atol=1e-12)
        assert margin == pytest.approx(1e-5 / 2**0.5, rel=1e-5)
        assert not kink
        np.testing.assert_allclose(a, [1.0, 0.0, 0.0], atol=1e-14)
    assert not caplog.records


@pytest.mark.parametrize("large", [1e4, 1e8])
@pytest.mark.parametrize(("beyond", "rows"), [(1e-9, [0, 1]), (-1e-9, [0])])
def test_a_large_entry_does_not_hide_on_which_side_of_a_kink_a_small_row_is(large, beyond, rows, caplog):
    Q = np.array([[2.0, 0.7], [0.7, 1.0]])
    qp = ParametricQP(Q, BOX)
    solution = qp.solve([-large, -1.7 - beyond], np.ones(4))
    assert solution.active.tolist() == rows
    assert not solution.kink
    assert solution.margin == pytest.approx(1e-9, rel=1e-3)
    qp.adjoint(solution, np.ones(2))
    assert not caplog.records


@pytest.mark.parametrize("large", [1.0, 1e8])
@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_rows_that_do_repeat_are_still_found(large, factor):
    """An active row once more, in other units, beside a large entry."""
    G, h = np.array([[0, 1.0, 0], [0, 0, 1], [0, factor, 0]]), np.array([1, 1, factor])
    for solve in (alone, in_a_batch):
        with pytest.raises(LICQError, match="dependent"):
            solve(np.eye(3), G, np.array([-large, -2, -2]), h, np.ones(3))


@pytest.mark.parametrize("unit", [1e-12, 1e-9, 1.0, 1e9])
@pytest.mark.parametrize("violation", [1e-8, 1.0, 1e6])
def test_infeasible_rows_of_any_size_are_called_so(unit, violation):
    G = unit * np.array([[1.0, 1], [-1, 0], [0, -1]])
    with pytest.raises(InfeasibleError, match=re.escape(f"violation is {unit * violation / 3:.3g};")):
        ParametricQP(np.eye(2), G).solve(np.zeros(2), unit * violation * np.array([-1.0, 0, 0]))


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e9])
def test_bounds_that_nearly_meet_are_told_from_bounds_that_meet(unit):
    """The gap counts in units of the bounds."""
    solver = ParametricQP(np.eye(2), BOX)
    h = unit * np.array([0.5, 1.0, -0.5, 1.0])
    with pytest.raises(LICQError, match="equal bounds"):
        solver.solve(np.zeros(2), h)
    h[0] += 1e-9 * unit
    assert solver.solve(np.zeros(2), h).active.tolist() == [2]


@pytest.mark.parametrize("large", [1e12, 1e15, 1e20])
def test_bounds_far_below_the_linear_term(large):
    """Divided by a typical number, the problem is beyond daqp; divided by the largest one it is not."""
    Q = np.eye(2) + 0.3
    solution = ParametricQP(Q, BOX).solve([-3.0 * large, 0.5], np.ones(4))
    np.testing.assert_allclose(solution.y, [1.0, -0.8 / 1.3], rtol=1e-12)


def test_a_point_off_its_bounds_is_not_certified():
    """1 is lost beside 1e100: the solver finds no better point than y = 0, and says so."""
    with pytest.raises(NotCertifiedError, match="off their bounds"):
        ParametricQP(np.eye(2) + 0.3, BOX).solve([-3e100, 0.5], np.ones(4))


@pytest.mark.parametrize(("flag", "sides"), [(-4, np.zeros(3)), (1, np.ones(3))])
def test_a_warm_start_that_leads_astray_gives_way_to_a_cold_one(flag, sides):
    """It fails, or finds rows that are dependent."""
    solver = ParametricQP(np.eye(2), [[1.0, 0], [0, 1], [1, 1]])
    first = solver.solve([-3.0, 0.5], np.ones(3))
    warm = SimpleNamespace(update=lambda **_: 0, solve=lambda: (None, None, flag, {"lam": sides}))
    solver._sides_by_daqp._model = warm
    np.testing.assert_array_equal(solver.solve([-3.0, 0.5], np.ones(3)).y, first.y)


def test_a_gradient_that_is_small_beside_what_the_rows_take_is_exact():
    """The cotangent is large where a row fixes y, and the free part of the gradient is a remainder of it."""
    Q = np.array([[1.0, 0.5], [0.5, 1.0]])
    solver = ParametricQP(Q, BOX[[0, 2]])
    solution = solver.solve([-9.0, 0.1], np.ones(2))
    assert solution.active.tolist() == [0]
    v = np.array([1e9, 1.0])
    a, _ = solver.adjoint(solution, v)
    np.testing.assert_allclose(a, [0.0, 1.0], rtol=0, atol=1e-12)
    batched = BatchedQP(solver)
    found = batched.solve(torch.tensor([[-9.0, 0.1]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))
    a, _ = batched.adjoint(found, torch.from_numpy(v)[None])
    np.testing.assert_allclose(a[0].numpy(), [0.0, 1.0], rtol=0, atol=1e-12)


def test_at_a_vertex_nothing_moves():
    Q = random_spd(np.random.default_rng(0), 3, 20.0)
    solver = ParametricQP(Q, np.eye(3))
    solution = solver.solve(-Q @ np.ones(3) - 1.0, np.ones(3))
    a, b = solver.adjoint(solution, v := np.array([0.3, 1.0, -2.0]))
    assert (a == 0).all()
    np.testing.assert_allclose(b, v, rtol=1e-13)
    batched = BatchedQP(solver)
    found = batched.solve(torch.from_numpy(-Q @ np.ones(3) - 1.0)[None], torch.ones(1, 3, dtype=torch.float64))
    assert bool((batched.adjoint(found, torch.from_numpy(v)[None])[0] == 0).all())


@pytest.mark.parametrize("tilt", [1.0, 1e-4, 1e-7])
def test_tolerances_bound_the_error_of_a_refined_point(tilt):
    """Row by row, against 60 digits, where bounds are 1e9 apart in size and the active rows nearly parallel."""
    rng = np.random.default_rng(3)
    G = rng.standard_normal((5, 4))
    G[1] = G[0] + tilt * G[1]
    kkt = ParametricQP(random_spd(rng, 4, 20.0), G).kkt
    c, upper = np.array([1e8, -1.0, 2.0, 0.3]), np.array([1.0, 1.0 + 1e-3 * tilt, 1e6, 1e7, 1e7])
    side = np.array([1.0, 1.0, 0.0, 0.0, 0.0])
    point = KKTPoint(kkt, side, c, np.full(5, -np.inf), upper)
    point.settled()
    with mpmath.workdps(60):
        system = mpmath.zeros(6)
        system[:4, :4] = mpmath.matrix(kkt.Q.tolist())
        for i in range(2):
            for j in range(4):
                system[4 + i, j] = system[j, 4 + i] = mpmath.mpf(kkt.R[i, j])
        exact = mpmath.lu_solve(system, mpmath.matrix([*(-c), *upper[:2]]))
        slack = [float(upper[i] - sum(mpmath.mpf(kkt.R[i, j]) * exact[j] for j in range(4))) for i in range(2, 5)]
    assert (np.abs(point.slack[2:] - slack) <= point._slack_zero[2:]).all()
    assert (np.abs(point.force - [float(value) for value in exact[4:]]) <= point._force_zero).all()
    assert (point._slack_zero[2:] <= 1e-3 * np.abs(slack)).all()  # and they are no larger than they must be
    assert (point._force_zero <= 1e-3 * np.abs(point.force).max()).all()


EIGHTHS = np.array([[2.0, 0.625, -0.25], [0.625, 1.5, 0.375], [-0.25, 0.375, 1.0]])


@pytest.mark.parametrize("large", [2.0**10, 2.0**20, 2.0**27])
def test_entries_without_a_row_are_exact_beside_a_large_force(large):
    """All data are small multiples of a power of two, so y = (1, 3/8, −1/4) is the exact minimiser."""
    y = np.array([1.0, 0.375, -0.25])
    c = -EIGHTHS @ y - large * np.eye(3)[0]
    solver = ParametricQP(EIGHTHS, np.vstack([np.eye(3), -np.eye(3)]))
    np.testing.assert_allclose(solver.solve(c, np.ones(6)).y, y, rtol=0, atol=1e-15)
    found = BatchedQP(solver).solve(torch.from_numpy(c)[None], torch.ones(1, 6, dtype=torch.float64))
    np.testing.assert_allclose(found.y[0].numpy(), y, rtol=0, atol=1e-15)


@pytest.mark.parametrize("large", [0.0, 1.0, 2.0**10, 2.0**27])
@pytest.mark.parametrize("weak", [1.0, -1.0])
def test_a_kink_is_a_kink_beside_a_large_force(large, weak, caplog):
    """y₂ is on its bound and not pushed; rounding at the size of the largest entry would make that a clear sign."""
    y = np.array([1.0, weak, -0.25])
    c = -EIGHTHS @ y - large * np.eye(3)[0]
    for solve in (alone, in_a_batch):
        found, _, margin, kink, _, _ = solve(EIGHTHS, np.vstack([np.eye(3), -np.eye(3)]), c, np.ones(6), np.ones(3))
        np.testing.assert_allclose(found, y, rtol=0, atol=1e-15)
        assert margin <= 1e-15
        assert kink
        assert caplog.text.count("weakly active") == 1
        caplog.clear()


@pytest.mark.parametrize(("large", "coupling"), [(36625021.0, 0.7), (46796953.0, 0.8)])
def test_cancelled_entries_are_refined_where_all_signs_are_clear(large, coupling):
    """y₁ = 1 is exact, and y₂ = 1/10 − coupling is left off by 1e-9 by one solve."""
    Q = np.array([[2.0, coupling], [coupling, 1.0]])
    for solve in (alone, in_a_batch):
        y = solve(Q, BOX, np.array([-large, -0.1]), np.ones(4), np.ones(2))[0]
        np.testing.assert_allclose(y, [1.0, 0.1 - coupling], rtol=0, atol=1e-13)


@pytest.mark.parametrize(("rows", "c"), [([[-1.0], [-3.0]], 1.0), ([[1.0], [-3.0]], -1.0), ([[1.0], [-3.0]], 1.0)])
def test_redundant_rows_at_a_vertex_in_the_origin(rows, c):
    """Terms in y vanish there with y itself, which is a residue of rounding; what y was computed from does not."""
    solver = ParametricQP([[7.0]], rows)
    with pytest.raises(LICQError):
        solver.solve([c], [0.0, 0.0])
    assert abs(solver.solve([c], [0.0, 0.0], degenerate=True).y[0]) < 1e-16


def test_redundant_rows_at_the_vertex_of_a_cone():
    rng = np.random.default_rng(0)
    for _ in range(60):
        n = int(rng.integers(2, 6))
        square = rng.standard_normal((n, n))
        G = np.vstack([-np.eye(n), -rng.uniform(0.1, 1.0, (2, n))])  # y ≥ 0, and two rows that follow from it
        c = rng.uniform(0.1, 1.0, n)
        solver = ParametricQP(np.eye(n) + 0.02 * square @ square.T, G)
        if (solver.Q @ np.zeros(n) + c <= 0).any():
            continue
        with pytest.raises(LICQError):
            solver.solve(c, np.zeros(n + 2))
        assert np.abs(solver.solve(c, np.zeros(n + 2), degenerate=True).y).max() < 1e-15


@pytest.mark.parametrize("sizes", [(1e-290, 1e200), (1e290, 1e-200)])
def test_sizes_whose_quotients_overflow_are_refused(sizes):
    with pytest.raises(SSIGDError, match="rescale Q and G"):
        ParametricQP(sizes[0] * np.eye(2), sizes[1] * BOX)


def test_lengths_of_rows_whose_squares_overflow():
    point = ParametricQP(np.eye(2), 1e200 * BOX, min_margin=0.1).solve([-0.5, 0.25], np.full(4, 1e200))
    assert point.margin == pytest.approx(0.5)


def test_a_box_of_x_may_have_no_end_and_a_bound_one_entry():
    assert StronglyConvexBilevelProblem(3, x_bound=float("inf")).certified_solution(torch.zeros(3)).residual < 1e-12
    with pytest.raises(SSIGDError, match="x_bound"):
        StronglyConvexBilevelProblem(3, constraints="coupled", x_bound=float("inf"))
