"""The single QP: against a brute force over active sets, its certificate, and every kind of bad input."""

from itertools import combinations

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from breaching_ext.ssigd import (
    BatchedQP,
    DegenerateError,
    InfeasibleError,
    LICQError,
    NonFiniteError,
    NotStronglyConvexError,
    ParametricQP,
    SSIGDError,
)
from breaching_ext.ssigd import qp as qp_module
from breaching_ext.ssigd.reference import random_spd
from breaching_ext.ssigd.rows import pair_rows

BOX = np.vstack([np.eye(2), -np.eye(2)])


def brute_force(Q, G, c, h):
    """Try every active set; the one that satisfies the KKT signs is the solution."""
    n = len(c)
    for size in range(min(n, len(h)) + 1):
        for rows in combinations(range(len(h)), size):
            active = G[list(rows)]
            kkt = np.block([[Q, active.T], [active, np.zeros((size, size))]])
            if np.linalg.matrix_rank(kkt) < n + size:
                continue
            z = np.linalg.solve(kkt, np.r_[-c, h[list(rows)]])
            if (z[n:] >= 0).all() and (G @ z[:n] <= h + 1e-9).all():
                return z[:n], rows
    raise AssertionError("no active set satisfies the KKT conditions")


def random_qp(seed, n, extra):
    rng = np.random.default_rng(seed)
    G = np.vstack([np.eye(n), -np.eye(n), rng.standard_normal((extra, n))])
    h = np.r_[rng.uniform(0.2, 1.5, 2 * n), rng.uniform(0.05, 1.0, extra)]
    return random_spd(rng, n, 20.0), G, 2.0 * rng.standard_normal(n), h


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 3), extra=st.integers(0, 3))
def test_solution_is_that_of_the_brute_force(seed, n, extra):
    Q, G, c, h = random_qp(seed, n, extra)
    solution = ParametricQP(Q, G).solve(c, h)
    y, rows = brute_force(Q, G, c, h)
    np.testing.assert_allclose(solution.y, y, atol=1e-11)
    if solution.margin > 1e-8:
        assert set(solution.active.tolist()) == set(rows)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 12), extra=st.integers(0, 6))
def test_certificate_holds(seed, n, extra):
    Q, G, c, h = random_qp(seed, n, extra)
    solution = ParametricQP(Q, G).solve(c, h)
    multipliers, slack = solution.multipliers, h - G @ solution.y
    np.testing.assert_allclose(Q @ solution.y + c + G.T @ multipliers, 0.0, atol=1e-11)
    assert (multipliers >= 0).all()
    assert slack.min() >= -1e-11
    norms = np.linalg.norm(G, axis=1)
    both = np.maximum(multipliers * norms, slack / norms)
    assert solution.margin == pytest.approx(both.min(), abs=1e-11)
    assert solution.residual < 1e-13


@pytest.mark.parametrize("predict_from", [0, 10**9])
def test_warm_starts_and_predictions_change_nothing(monkeypatch, predict_from):
    Q, G, c, h = random_qp(3, 15, 10)
    rng = np.random.default_rng(0)
    cs = [c + rng.standard_normal(15) for _ in range(20)]
    fresh = [ParametricQP(Q, G).solve(c, h).y for c in cs]
    monkeypatch.setattr(qp_module, "PREDICT_FROM", predict_from)
    warm = ParametricQP(Q, G)
    for c, expected in zip(cs, fresh, strict=True):
        np.testing.assert_allclose(warm.solve(c, h).y, expected, atol=1e-12)
        np.testing.assert_allclose(warm.solve(c, 2 * h).y, ParametricQP(Q, G).solve(c, 2 * h).y, atol=1e-12)


def test_prediction_gives_way_to_daqp_where_it_does_not_settle(monkeypatch):
    Q, G, c, h = random_qp(5, 8, 8)
    expected = ParametricQP(Q, G).solve(c, h).y
    monkeypatch.setattr(qp_module, "PREDICT_FROM", 0)
    monkeypatch.setattr(qp_module, "MAX_PREDICTIONS", 0)
    np.testing.assert_allclose(ParametricQP(Q, G).solve(c, h).y, expected, atol=1e-13)
    monkeypatch.setattr(qp_module, "MAX_PREDICTIONS", 12)
    wrong = ParametricQP(Q, G)
    wrong._last = c * wrong.scaling.variables, np.ones(len(wrong.R))  # dependent rows: 16 in 8 dimensions
    np.testing.assert_allclose(wrong.solve(c, h).y, expected, atol=1e-13)


def test_prediction_begins_at_the_last_sides_where_c_is_near(monkeypatch):
    Q, G, c, h = random_qp(5, 8, 8)
    begun = []
    original = qp_module.KKTPoint

    def noted(kkt, side, *others):
        begun.append(side.copy())
        return original(kkt, side, *others)

    monkeypatch.setattr(qp_module, "PREDICT_FROM", 0)
    monkeypatch.setattr(qp_module, "KKTPoint", noted)
    solver = ParametricQP(Q, G)
    solver.solve(c, h)
    sides = begun[-1]
    fresh = ParametricQP(Q, G)
    for other, near in ((1.1 * c, True), (-2.0 * c, False), (0.0 * c, False)):
        solver._last = c * solver.scaling.variables, sides
        begun.clear()
        solver.solve(other, h)
        expected = begun[0]
        fresh._last = None
        begun.clear()
        fresh.solve(other, h)
        assert np.array_equal(expected, sides if near else begun[0])
    assert not np.array_equal(sides, begun[0])


@pytest.mark.parametrize("condition", [10.0, 1e4, 1e8])
def test_error_against_60_digits(condition):
    rng = np.random.default_rng(1)
    n = 6
    Q = random_spd(rng, n, condition)
    G, h = np.vstack([np.eye(n), -np.eye(n), np.ones((1, n))]), np.r_[np.ones(2 * n), 1.3]
    qp = ParametricQP(Q, G)
    solution = qp.solve(c := 0.02 * rng.standard_normal(n), h)
    v = rng.standard_normal(n)
    a, b = qp.adjoint(solution, v)
    k = len(solution.active)
    assert k < n
    with mpmath.workdps(60):
        kkt = mpmath.zeros(n + k)
        kkt[:n, :n] = mpmath.matrix(qp.Q.tolist())
        for i, row in enumerate(solution.active):
            for j in range(n):
                kkt[n + i, j] = kkt[j, n + i] = mpmath.mpf(G[row, j])
        y = mpmath.lu_solve(kkt, mpmath.matrix([*(-c), *h[solution.active]]))
        exact = mpmath.lu_solve(kkt, mpmath.matrix([*v, *([0] * k)]))
    extended = np.finfo(np.longdouble).eps < np.finfo(float).eps
    tolerance = 1e-12 if extended else max(1e-12, 1e-15 * condition)
    for value, reference in ((solution.y, list(y)[:n]), (np.r_[a, b], list(exact))):
        reference = np.array([float(item) for item in reference])
        assert np.linalg.norm(value - reference) <= tolerance * np.linalg.norm(reference)


@pytest.mark.parametrize("margin", [1e-4, 1e-7, 1e-10])
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_right_side_at_small_margins(margin, side):
    rng = np.random.default_rng(2)
    Q = random_spd(rng, 5, 50.0)
    G, h = np.vstack([np.eye(5), -np.eye(5)]), np.ones(10)
    qp = ParametricQP(Q, G)
    y = np.array([side, 0.2, -0.3, 0.5, -0.1])
    push = np.array([side * margin, 0, 0, 0, 0])
    active = qp.solve(-Q @ y - push, h)
    assert active.active.tolist() == [0 if side > 0 else 5]
    free = qp.solve(-Q @ (y - push), h)
    assert free.active.tolist() == []
    for solution in (active, free):
        assert solution.margin == pytest.approx(margin, rel=1e-4)


BAD = {
    "infeasible": (np.eye(2), [[1, 1], [-1, 0], [0, -1]], [0, 0], [-1, 0, 0], InfeasibleError, "is 0.333"),
    "crossed": (np.eye(2), BOX, [0, 0], [-1, 1, -1, 1], InfeasibleError, "cross by 2"),
    "indefinite": (np.diag([1, -1]), BOX, [0, 0], np.ones(4), NotStronglyConvexError, "eigenvalue is -1"),
    "singular": (np.diag([1, 0]), BOX, [0, 0], np.ones(4), NotStronglyConvexError, "not positive definite"),
    "nearly singular": (np.diag([1, 1e-15]), BOX, [0, 0], np.ones(4), NotStronglyConvexError, "condition"),
    "NaN c": (np.eye(2), BOX, [np.nan, 0], np.ones(4), NonFiniteError, "c holds NaN"),
    "infinite h": (np.eye(2), BOX, [0, 0], [np.inf, 1, 1, 1], NonFiniteError, "h holds NaN"),
    "NaN Q": (np.diag([np.nan, 1]), BOX, [0, 0], np.ones(4), NonFiniteError, "Q or G"),
    "duplicate": (np.eye(2), np.vstack([BOX, BOX[:1]]), [-3, 0], np.ones(5), LICQError, "duplicate"),
    "redundant": (np.eye(2), [[1, 0], [0, 1], [1, 1]], [-5, -5], [1, 1, 2], LICQError, "dependent"),
    "equal bounds": (np.eye(2), BOX, [0, 0], [0.5, 1, -0.5, 1], LICQError, "equal bounds"),
    "zero row": (np.eye(2), [[0, 0], [1, 0]], [0, 0], [1, 1], SSIGDError, "are zero"),
    "shape": (np.eye(2), BOX, [0, 0, 0], np.ones(4), SSIGDError, "expected (2,) and (4,)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("predict_from", [0, 100])
def test_bad_input_is_a_named_error(monkeypatch, name, predict_from):
    monkeypatch.setattr(qp_module, "PREDICT_FROM", predict_from)
    Q, G, c, h, error, message = BAD[name]
    with pytest.raises(error) as caught:
        ParametricQP(Q, G).solve(c, h)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_does_not_spoil_the_next_solve():
    G = np.array([[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    qp = ParametricQP(np.eye(2), G)
    with pytest.raises(InfeasibleError):
        qp.solve([0.0, 0.0], [-1.0, 0.0, 0.0])
    np.testing.assert_allclose(qp.solve([-2.0, -2.0], [1.0, 0.0, 0.0]).y, [0.5, 0.5])


def test_inactive_duplicates_are_harmless():
    solution = ParametricQP(np.eye(2), np.vstack([BOX, BOX])).solve([0.1, 0.2], np.ones(8))
    np.testing.assert_allclose(solution.y, [-0.1, -0.2])


def test_weakly_active_is_told_once_and_raised_on_demand(caplog):
    qp = ParametricQP(np.eye(2), BOX)
    solution = qp.solve([-1.0, 0.0], np.ones(4))
    assert solution.margin == 0.0
    assert not caplog.records  # y* itself is well defined
    qp.adjoint(solution, np.ones(2))
    qp.adjoint(solution, np.ones(2))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "weakly active" in caplog.text
    with pytest.raises(DegenerateError, match="min_margin=1e-08"):
        ParametricQP(np.eye(2), BOX, min_margin=1e-8).solve([-1.0, 0.0], np.ones(4))


def test_without_constraints_it_is_a_linear_solve():
    solution = ParametricQP(2.0 * np.eye(2), np.zeros((0, 2))).solve([1.0, 2.0], [])
    np.testing.assert_allclose(solution.y, [-0.5, -1.0])
    assert solution.margin == np.inf


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 4), m=st.integers(0, 8))
def test_pairing_loses_no_row(seed, n, m):
    rng = np.random.default_rng(seed)
    G = rng.integers(-1, 2, (m, n)).astype(float)
    G = G[G.any(axis=1)]
    rows, h, y = pair_rows(G), rng.standard_normal(len(G)), rng.standard_normal(n)
    lower, upper = rows.sides(h)
    Ry = rows.R @ y
    assert bool((G @ y <= h).all()) == bool(((lower <= Ry) & (Ry <= upper)).all())
    used = np.r_[rows.upper_of, rows.lower_of[rows.paired]]
    assert sorted(used.tolist()) == list(range(len(G)))


def test_large_linear_terms_are_certified():
    """y is then a small difference of large numbers, which one solve leaves off its bounds."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        Q, c = random_spd(rng, 20, 10), rng.normal(size=20) * 10.0 ** rng.uniform(3, 8)
        G, h = np.vstack([np.eye(20), -np.eye(20)]), np.ones(40)
        solution = ParametricQP(Q, G).solve(c, h)
        assert np.abs(Q @ solution.y + c + G.T @ solution.multipliers).max() <= 1e-9 * (1 + np.abs(c).max())
        assert np.abs(G[solution.active] @ solution.y - 1.0).max(initial=0) <= 1e-12 * 20


def test_nearly_opposite_rows_hold_at_both():
    """Row r is nearly -e_1: where both are active, they fix the second variable at 1/2."""
    n = 100
    row = np.zeros(n)
    row[:2] = -1.0, 1e-7
    G = np.vstack([np.eye(n), -np.eye(n), row])
    h, c = np.r_[1.0, np.full(2 * n - 1, 10.0), -1.0 + 0.5e-7], np.zeros(n)
    c[:2] = -3.0
    solution = ParametricQP(np.eye(n), G).solve(c, h)
    np.testing.assert_allclose(solution.y[:2], [1.0, 0.5], atol=1e-6)


def test_a_batch_with_large_linear_terms_is_on_its_bounds():
    rng = np.random.default_rng(0)
    single = ParametricQP(random_spd(rng, 20, 10), np.vstack([np.eye(20), -np.eye(20)]))
    c = torch.from_numpy(rng.normal(size=(40, 20)) * 10.0 ** rng.uniform(3, 8, (40, 1)))
    solution = BatchedQP(single).solve(c, torch.ones(40, 40, dtype=torch.float64))
    assert solution.fallbacks < 10
    assert bool((solution.residual <= 1e-12).all())
    assert float((solution.y.abs() - 1.0)[solution.side != 0].abs().max()) <= 2e-12
    for row, y in zip(c, solution.y, strict=True):
        np.testing.assert_allclose(y, single.solve(row, np.ones(40)).y, atol=1e-11)


@pytest.mark.parametrize("tilt", [1e-6, 1e-7, 3e-8])
def test_the_gradient_at_nearly_opposite_rows(tilt):
    """Both active rows fix the first two variables: a is zero, and b solves a two by two system."""
    n = 100
    pair = np.array([[1.0, 0.0], [-1.0, tilt]])
    G = np.vstack([np.eye(n), -np.eye(n), np.r_[pair[1], np.zeros(n - 2)]])
    h, c, v = np.r_[1.0, np.full(2 * n - 1, 10.0), -1.0 + 0.5 * tilt], np.zeros(n), np.zeros(n)
    c[:2], v[:2] = -3.0, (0.3, 1.0)
    expected = np.linalg.solve(pair.T, v[:2])
    single = ParametricQP(np.eye(n), G)
    solution = single.solve(c, h)
    assert solution.active.tolist() == [0, 2 * n]
    a, b = single.adjoint(solution, v)
    np.testing.assert_allclose(a, 0.0, atol=1e-9)
    np.testing.assert_allclose(b, expected, rtol=1e-9)
    batched = BatchedQP(single)
    many = batched.solve(*(torch.from_numpy(np.stack([value, value])) for value in (c, h)))
    a, b = batched.adjoint(many, torch.from_numpy(np.stack([v, v])))
    np.testing.assert_allclose(a, 0.0, atol=1e-9)
    np.testing.assert_allclose(batched.row_values(b, many.side)[0][[0, 2 * n]], expected, rtol=1e-9)


def test_widths_of_a_failed_solve_are_not_kept():
    solver = ParametricQP(np.eye(2), BOX)
    c = np.array([-3.0, 0.0])
    margin = solver.solve(c, np.ones(4)).margin
    assert margin == pytest.approx(1.0)
    with pytest.raises(InfeasibleError):
        solver.solve(c, np.array([-1.0, 1.0, -1.0, 1.0]))
    assert solver.solve(c, np.ones(4)).margin == margin


def box(n):
    """The rows of -1 <= y <= 1."""
    return np.vstack([np.eye(n), -np.eye(n)])


@pytest.mark.parametrize(
    ("first", "second", "large"), [(-2.0, -1.0 + 5e-7, 1e6), (0.5, -1.0 - 5e-7, 1e6), (-2.0, -1.0 + 5e-5, 1e8)]
)
def test_a_set_of_another_solution_is_not_taken_where_a_large_entry_hides_its_error(first, second, large):
    """Signs are judged relative to the largest entry of c; a set that is carried over must not pass by that."""
    n = 100
    c, h = np.zeros(n), np.ones(2 * n)
    c[0] = large
    warm = ParametricQP(np.eye(n), box(n))
    for value in (first, second):
        c[1] = value
        found = warm.solve(c, h)
    fresh = ParametricQP(np.eye(n), box(n))
    expected = fresh.solve(c, h)
    assert expected.y[1] == pytest.approx(np.clip(-second, -1.0, 1.0), abs=1e-13)
    np.testing.assert_array_equal(found.y, expected.y)
    direction = np.eye(n)[1]
    np.testing.assert_array_equal(warm.adjoint(found, direction)[0], fresh.adjoint(expected, direction)[0])


def test_members_of_a_batch_on_both_sides_of_a_kink():
    n = 100
    c = torch.zeros(2, n, dtype=torch.float64)
    c[:, 0], c[0, 1], c[1, 1] = 1e6, -1.0 - 5e-7, -1.0 + 5e-7
    single = ParametricQP(np.eye(n), box(n))
    found = BatchedQP(single).solve(c, torch.ones(2, 2 * n, dtype=torch.float64))
    assert found.y[:, 1].tolist() == pytest.approx([1.0, 1.0 - 5e-7], abs=1e-13)


@pytest.mark.parametrize("large", [1e6, 1e8, 1e10, 1e12])
def test_entries_that_cancel_are_refined_though_the_active_rows_are_exact(large):
    """y₂ = −0.6 is a difference of numbers of that size, and the only active row, y₁ ≤ 1, does not show it."""
    qp = ParametricQP(np.array([[2.0, 0.7], [0.7, 1.0]]), np.r_[np.eye(2), -np.eye(2)])
    c = np.array([-large, -0.1])
    one = qp.solve(c, np.ones(4))
    assert one.y == pytest.approx([1.0, -0.6], abs=1e-12)
    several = BatchedQP(qp).solve(torch.from_numpy(c)[None], torch.ones(1, 4, dtype=torch.float64))
    assert several.y[0].numpy() == pytest.approx([1.0, -0.6], abs=1e-12)
