"""SSIGD, DS-BLO and the certified finish: convergence, the papers' rules, resuming."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from breaching_ext.ssigd import (
    DSBLO,
    SSIGD,
    InfeasibleError,
    LICQError,
    NonFiniteError,
    NotCertifiedError,
    QuadraticBilevelProblem,
    SSIGDError,
    StronglyConvexBilevelProblem,
    certified_finish,
    convex_instance,
    convex_optimum,
    dsblo_example,
    enumerate_optimum,
    theorem_parameters,
)
from breaching_ext.ssigd import finish as finish_module
from breaching_ext.ssigd.history import SERIES
from breaching_ext.ssigd.oracle import GradientOracle, inexact_solution


def start(problem, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.uniform(-1.5, 1.5, problem.dim))


@pytest.mark.parametrize("seed", range(4))
def test_two_independent_optima_agree(seed):
    problem = convex_instance(4, seed)
    first, second = convex_optimum(problem), enumerate_optimum(problem)
    assert first.objective == pytest.approx(second.objective, abs=1e-9)
    assert problem.objective(first.x) == pytest.approx(first.objective, abs=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_brute_force_is_below_a_fine_random_search(seed):
    problem = StronglyConvexBilevelProblem(2, seed=seed, constraints="coupled", upper_y_weight=0.5)
    optimum = enumerate_optimum(problem)
    assert problem.objective(optimum.x) == pytest.approx(optimum.objective, abs=1e-9)
    x = torch.from_numpy(np.random.default_rng(seed).uniform(-2, 2, (5000, 2)))
    values = problem.upper_objective(x, problem.solve_lower_level(x))
    assert optimum.objective <= float(values.min()) <= optimum.objective + 0.1


@pytest.mark.parametrize("seed", range(3))
def test_ssigd_and_the_finish_reach_the_convex_optimum(seed):
    problem = convex_instance(5, seed)
    optimum = convex_optimum(problem).objective
    result = SSIGD(problem, q_std=1e-9, seed=seed).solve(300)
    first = problem.objective(torch.zeros(5, dtype=torch.float64)) - optimum
    gaps = {name: value - optimum for name, value in result.objectives.items()}
    assert all(-1e-9 <= gap < 0.02 * first for gap in gaps.values())
    assert gaps["best"] <= min(gaps.values())
    assert len(result.history["objective"]) == 300  # a kink's gradient does not vanish: it never stops early
    finish = certified_finish(problem, [result.x_last, result.x_average])
    assert finish.lower_bound - 1e-10 <= optimum <= finish.objective + 1e-10
    assert finish.objective - optimum <= 1e-6
    assert finish.gap <= 1e-9


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), dim=st.integers(1, 6), budget=st.integers(2, 6))
@example(seed=131, dim=2, budget=2)  # where daqp cycles at its least tolerance
def test_lower_bound_holds_before_the_gap_closes(seed, dim, budget):
    problem = convex_instance(dim, seed)
    finish = certified_finish(problem, [start(problem, seed)], max_gradients=budget)
    optimum = convex_optimum(problem).objective
    assert -math.inf < finish.lower_bound <= optimum + 1e-8
    assert optimum <= finish.objective + 1e-8
    assert finish.gradients <= budget


def test_step_sizes_are_those_of_the_theorems():
    problem = convex_instance(3)
    strong = SSIGD(problem, mu=0.5, lipschitz=4.0)
    assert [strong.step_size(r, 100) for r in (0, 7, 9)] == pytest.approx([0.25, 0.25, 0.2])
    for regime in ("convex", "weakly_convex"):
        constant = SSIGD(problem, regime=regime, step=2.0)
        assert constant.step_size(0, 400) == constant.step_size(399, 400) == pytest.approx(0.1)
    values = torch.linalg.eigvalsh(problem.Q_upper)
    default = SSIGD(problem)
    assert (default.mu, default.lipschitz) == pytest.approx((float(values[0]), float(values[-1])))
    assert SSIGD(problem, regime="convex").step == pytest.approx(1.0 / float(values[-1]))


@pytest.mark.parametrize("make", [
    lambda p: SSIGD(p, regime="weakly_convex", q_std=1e-3, noise_std=0.1, seed=3),
    lambda p: DSBLO(p, option="II", noise_std=0.1, inexactness=1e-3, seed=3),
])  # fmt: skip
def test_interrupted_runs_resume_as_if_they_had_not_been(make, tmp_path, monkeypatch):
    problem = StronglyConvexBilevelProblem(4, seed=1, constraints="coupled")
    whole = make(problem).solve(40, start(problem))
    path, sample, calls = tmp_path / "run.json", GradientOracle.sample, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 23:
            raise KeyboardInterrupt
        return sample(self, *arguments)

    monkeypatch.setattr(GradientOracle, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(problem).solve(40, start(problem), checkpoint=path)
    assert 15 <= json.loads(path.read_text())["snapshot"]["iteration"] <= 23
    resumed = make(problem).solve(40, start(problem), checkpoint=path)
    for name in ("x_last", "x_average", "x_best"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))
    for name in set(SERIES) - {"seconds"}:
        assert resumed.history[name] == whole.history[name]
    other = StronglyConvexBilevelProblem(4, seed=2, constraints="coupled")
    for changed in (
        lambda: make(problem).solve(41, start(problem), checkpoint=path),
        lambda: make(problem).solve(40, start(problem, 1), checkpoint=path),
        lambda: make(other).solve(40, start(problem), checkpoint=path),
    ):
        with pytest.raises(ValueError, match="other settings"):
            changed()
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_non_finite_gradients_stop_the_run_and_keep_the_checkpoint(tmp_path, monkeypatch):
    problem = StronglyConvexBilevelProblem(3, seed=1)
    original, calls = StronglyConvexBilevelProblem.upper_gradients, []

    def broken(self, x, y):
        calls.append(1)
        gradients = original(self, x, y)
        return (gradients[0] * np.nan, gradients[1]) if len(calls) == 8 else gradients

    monkeypatch.setattr(StronglyConvexBilevelProblem, "upper_gradients", broken)
    with pytest.raises(NonFiniteError, match="reduce the step size"):
        SSIGD(problem).solve(20, checkpoint=tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["snapshot"]["iteration"] == 7


def test_a_problem_is_known_by_its_data():
    first, again, other = (convex_instance(4, seed) for seed in (0, 0, 1))
    assert repr(first) == repr(again) != repr(other)
    assert "dim=4" in repr(first)


def test_same_seed_same_run_and_other_seed_another():
    problem = StronglyConvexBilevelProblem(4, seed=1)
    runs = [DSBLO(problem, seed=seed, q_std=0.05).solve(20).history["objective"] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_dsblo_stays_in_the_box():
    """A long first step out of it ends on its border."""
    problem = StronglyConvexBilevelProblem(4, seed=1)
    last = DSBLO(problem, gamma1=1e-6, gamma2=1e-6).solve(3).x_last
    assert torch.equal(last, problem.project(last))
    assert ((last == problem.x_lower) | (last == problem.x_upper)).all()


def test_dsblo_follows_algorithm_1(monkeypatch):
    problem = dsblo_example(4, 3, 2, low=-1.0)
    algorithm = DSBLO(problem, beta=0.7, gamma1=2.0, gamma2=5.0, q_std=1e-2)
    seen, sample = [], GradientOracle.sample

    def recorded(self, x, q, rng):
        seen.append((x.copy(), q.copy(), sample(self, x, q, rng)))
        return seen[-1][2]

    monkeypatch.setattr(GradientOracle, "sample", recorded)
    result = algorithm.solve(12, start(problem))
    x, momentum = start(problem).numpy(), seen[0][2].gradient
    np.testing.assert_array_equal(seen[0][0], x)
    for t, (between, q, drawn) in enumerate(seen[1:]):
        step = 1.0 / (2.0 * np.linalg.norm(momentum) + 5.0)
        moved = x - step * momentum
        share = (between - x) / (moved - x)
        np.testing.assert_allclose(share, share[0], rtol=1e-6)  # one scalar
        assert 0.0 <= share[0] <= 1.0
        assert result.history["step"][t] == pytest.approx(step)
        x, momentum = moved, 0.7 * momentum + 0.3 * drawn.gradient
        assert result.history["momentum_norm"][t] == pytest.approx(np.linalg.norm(momentum))
        assert not np.allclose(q, seen[t][1])  # fresh in every iteration
    np.testing.assert_allclose(result.x_last.numpy(), x, rtol=1e-12)


def test_ssigd_draws_q_once(monkeypatch):
    problem = StronglyConvexBilevelProblem(3, seed=0)
    perturbations, sample = [], GradientOracle.sample
    monkeypatch.setattr(
        GradientOracle,
        "sample",
        lambda self, x, q, rng: (perturbations.append(q), sample(self, x, q, rng))[1],
    )
    algorithm = SSIGD(problem, q_std=0.1, noise_std=0.2)
    algorithm.solve(5)
    assert all(np.array_equal(q, algorithm.perturbation().numpy()) for q in perturbations)


def test_theorem_parameters_are_the_papers():
    parameters = theorem_parameters(epsilon=0.1, radius=0.5, variance=4.0, lipschitz=3.0)
    assert parameters["beta"] == pytest.approx(1 - 0.01 / (960 * 22))
    window = math.log(32 * 8 / 0.1) / math.log(1 / parameters["beta"])
    assert parameters["gamma1"] == pytest.approx(window / 0.5)
    assert parameters["gamma2"] == pytest.approx(4 * parameters["gamma1"] * 8)
    DSBLO(dsblo_example(3, 3, 2), **parameters)


def test_paper_example_is_the_papers_formula():
    problem = dsblo_example(6, 4, 3, seed=2)
    rng = np.random.default_rng(2)
    Q1, Q2 = (torch.from_numpy(rng.uniform(size=(6, 4))) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (6, 4))
    f = x @ x + 0.1 * x @ Q1 @ y + y @ y + x.sum() + y.sum()
    torch.testing.assert_close(problem.upper_objective(x, y), f)
    torch.testing.assert_close(problem.lower_objective(x, y), x @ Q2 @ y + y @ y)  # without ‖x‖², constant in y
    result = DSBLO(problem, gamma2=20.0).solve(100, start(problem))
    assert result.history["objective"][-1] < result.history["objective"][0]
    assert max(result.history["violation"]) < 1e-9


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), delta=st.floats(1e-6, 1.0), kind=st.sampled_from(["box", "coupled"]))
def test_inexact_solution_satisfies_assumption_2(seed, delta, kind):
    problem = StronglyConvexBilevelProblem(5, seed=seed, constraints=kind)
    x = start(problem, seed).numpy()
    solution = problem.certified_solution(x)
    y = inexact_solution(problem, x, solution, delta, np.random.default_rng(seed))
    slack = problem.right_hand_side(x) - problem.B.numpy() @ y
    assert np.linalg.norm(y - solution.y) <= delta * (1 + 1e-9)
    np.testing.assert_allclose(slack[solution.active], 0.0, atol=1e-9)
    others = np.setdiff1d(np.arange(len(slack)), solution.active)
    assert (slack[others] > 0).all()
    if len(solution.active) < 5:
        assert np.linalg.norm(y - solution.y) > 0


def test_sampled_gradients_are_unbiased():
    problem = StronglyConvexBilevelProblem(4, seed=2)
    x, q, rng = start(problem).numpy(), np.zeros(4), np.random.default_rng(0)
    exact = GradientOracle(problem).sample(x, q, rng).gradient
    oracle = GradientOracle(problem, noise_std=0.5)
    drawn = np.array([oracle.sample(x, q, rng).gradient for _ in range(2000)])
    error = drawn.std(axis=0) / len(drawn) ** 0.5
    assert (error > 0).all()
    assert (np.abs(drawn.mean(axis=0) - exact) < 5 * error).all()


def test_backends_give_the_same_run():
    pytest.importorskip("cvxpylayers")
    problem = StronglyConvexBilevelProblem(3, seed=1)
    runs = [SSIGD(problem, backend=backend).solve(5, start(problem)).x_last for backend in ("kkt", "cvxpylayers")]
    torch.testing.assert_close(*runs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("make", "message"), [
    (lambda p: SSIGD(p, regime="smooth"), "regime='smooth'"),
    (lambda p: SSIGD(p, mu=0.0), "mu=0.0"),
    (lambda p: SSIGD(p, q_std=-1.0), "q_std=-1.0"),
    (lambda p: SSIGD(p, backend="fd", noise_std=0.1), "noise_std=0.1"),
    (lambda p: SSIGD(p, backend="magic"), "backend='magic'"),
    (lambda p: DSBLO(p, option="III"), "option='III'"),
    (lambda p: DSBLO(p, option="II"), "does not fit"),
    (lambda p: DSBLO(p, beta=1.0), "beta=1.0"),
    (lambda p: DSBLO(p, gamma1=0.0), "gamma1=0.0"),
    (lambda p: SSIGD(p).solve(0), "iterations=0"),
    (lambda p: SSIGD(p).solve(5, torch.zeros(2)), "x0 has shape"),
    (lambda p: convex_optimum(p), "expected a diagonal"),
    (lambda p: certified_finish(p, []), "at least one point"),
    (lambda p: enumerate_optimum(StronglyConvexBilevelProblem(12)), "too many"),
])  # fmt: skip
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(SSIGDError, match=message):
        make(StronglyConvexBilevelProblem(3))


def test_enumeration_without_a_feasible_piece_says_so():
    eye = torch.eye(1, dtype=torch.float64)
    problem = QuadraticBilevelProblem(
        Q_upper=eye, x_target=[0], c_upper=[1], Q_lower=eye, c_lower=[0], P=eye, A=[[0.0], [0.0]],
        B=[[1.0], [-1.0]], b=[-1.0, 0.5], x_lower=-1.0, x_upper=1.0,
    )  # fmt: skip
    with pytest.raises(InfeasibleError):
        enumerate_optimum(problem)


def test_ssigd_with_its_finish_reaches_the_optimum_within_the_budget():
    for seed in range(3):
        problem = convex_instance(5, seed)
        result, finish = SSIGD(problem, q_std=1e-9, seed=seed).solve_certified(300, finish_gradients=40)
        assert len(result.history["step"]) + finish.gradients <= 300
        assert finish.objective - convex_optimum(problem).objective <= 1e-6
        assert finish.gap <= 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_the_dual_value_is_the_least_value_of_a_plane_and_the_quadratic_part(seed):
    """From any x, and exactly so where the quadratic part is a multiple of ‖x‖²."""
    rng = np.random.default_rng(seed)
    eye, target, slope, x = np.eye(4), *rng.uniform(-1.5, 1.5, (3, 4))
    problem = QuadraticBilevelProblem(
        Q_upper=2.0 * eye, x_target=target, c_upper=-np.ones(4), Q_lower=eye, c_lower=np.zeros(4), P=eye,
        A=np.zeros((4, 4)), B=eye, b=np.ones(4), x_lower=-1.0, x_upper=1.0,
    )  # fmt: skip
    least = np.clip(target - slope / 2.0, -1.0, 1.0)
    expected = ((least - target) ** 2).sum() + slope @ least + 0.3
    assert finish_module._dual_value(problem, slope, 0.3, np.clip(x, -1.0, 1.0)) == pytest.approx(expected)


@pytest.mark.parametrize("solved", [0, 2])
def test_a_finish_that_fails_on_the_way_returns_what_it_has(monkeypatch, caplog, solved):
    problem, models, minimise = convex_instance(5, 1), [], finish_module._minimise_model

    def failing(*arguments):
        models.append(arguments)
        if len(models) > solved:
            raise NotCertifiedError("for the test")
        return minimise(*arguments)

    monkeypatch.setattr(finish_module, "_minimise_model", failing)
    finish = certified_finish(problem, [start(problem, seed) for seed in range(2)])
    assert finish.gradients == 2 + solved
    assert finish.objective == pytest.approx(problem.objective(finish.x), abs=1e-12)
    assert (finish.lower_bound == -math.inf) == (solved == 0)
    assert finish.lower_bound <= convex_optimum(problem).objective + 1e-10
    assert "for the test" in caplog.text


def test_a_finish_that_cannot_start_does_not_lose_the_run(monkeypatch, caplog):
    problem = convex_instance(5, 1)

    def failing(*arguments, **more):
        raise LICQError("for the test")

    monkeypatch.setattr(finish_module, "adjoint_gradient", failing)
    result, finish = SSIGD(problem, q_std=1e-6).solve_certified(40, finish_gradients=20)
    assert len(result.history["step"]) == 20
    assert torch.equal(finish.x, result.x_best)
    assert (finish.objective, finish.gap, finish.gradients) == (result.objectives["best"], math.inf, 0)
    assert "for the test" in caplog.text


@pytest.mark.parametrize("reserved", [2, 300])
def test_a_finish_needs_gradients_and_leaves_some(reserved):
    with pytest.raises(SSIGDError, match="finish_gradients"):
        SSIGD(convex_instance(5, 0)).solve_certified(300, finish_gradients=reserved)


def test_a_certified_point_is_no_worse_than_the_run():
    """With few gradients left the finish may end above the best iterate."""
    for dim, left in ((20, 5), (50, 8)):
        result, found = SSIGD(convex_instance(dim, 0)).solve_certified(100, finish_gradients=left)
        assert len(result.history["step"]) == 100 - left
        assert found.gradients <= left
        assert found.objective <= result.objectives["best"]
        assert found.lower_bound <= found.objective


def test_single_precision_is_taken_everywhere():
    problem = dsblo_example(3, 4, 5)
    x = torch.full((problem.x_lower.shape[0],), 0.1)
    y = problem.solve_lower_level(x)
    double = x.double()
    assert torch.equal(problem.upper_objective(x, y), problem.upper_objective(double, y))
    assert torch.equal(problem.lower_objective(x, y), problem.lower_objective(double, y))
    for one, other in zip(problem.upper_gradients(x, y), problem.upper_gradients(double, y), strict=True):
        assert torch.equal(one, other)


def test_a_flat_upper_objective_needs_no_lipschitz_constant_where_a_step_is_given():
    problem = StronglyConvexBilevelProblem(3)
    flat = SSIGD(problem, regime="convex", lipschitz=0.0, step=0.1)
    assert flat.step_size(0, 4) == pytest.approx(0.05)
    with pytest.raises(SSIGDError, match=r"lipschitz=0\.0"):
        SSIGD(problem, regime="convex", lipschitz=0.0)
