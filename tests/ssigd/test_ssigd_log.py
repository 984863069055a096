"""What a run records: every series against a replay, the averages, checkpoints, and that recording aborts nothing."""

import dataclasses
import json
from itertools import count

import numpy as np
import pytest
import torch

from breaching_ext.ssigd import (
    DSBLO,
    SSIGD,
    DegenerateError,
    LICQError,
    QuadraticBilevelProblem,
    StronglyConvexBilevelProblem,
    descent,
    implicit_gradient,
)
from breaching_ext.ssigd.history import SERIES, load_checkpoint
from breaching_ext.ssigd.oracle import GradientOracle


@pytest.fixture
def drawn(monkeypatch):
    """Record what the oracle draws; the lower level comes back off its bounds, so that something is violated."""
    records, sample = [], GradientOracle.sample

    def recorded(self, x, q, rng):
        found = sample(self, x, q, rng)
        moved = dataclasses.replace(found.solution, y=found.solution.y + 0.1 * (1 + len(records)))
        records.append((x.copy(), q.copy(), dataclasses.replace(found, solution=moved)))
        return records[-1][2]

    monkeypatch.setattr(GradientOracle, "sample", recorded)
    return records


RUNS = {
    "strongly convex": lambda p: SSIGD(p, q_std=0.3, mu=0.5, lipschitz=2.0, seed=4),
    "convex": lambda p: SSIGD(p, q_std=0.3, regime="convex", step=1.5, seed=4),
    "DS-BLO": lambda p: DSBLO(p, q_std=0.3, beta=0.6, gamma1=0.2, gamma2=0.5, seed=4),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_series_is_what_it_says(name, drawn, monkeypatch):
    clock = count()
    monkeypatch.setattr(descent.time, "perf_counter", lambda: float(next(clock)))
    problem = StronglyConvexBilevelProblem(5, seed=1, constraints="coupled", x_bound=0.7)
    start = torch.tensor([1.5, -1.0, 0.5, 3.0, -1.5], dtype=torch.float64)
    result = RUNS[name](problem).solve(12, start)
    first = 1 if name == "DS-BLO" else 0  # its first draw starts the momentum
    x, momentum = problem.project(start).numpy(), drawn[0][2].gradient
    expected = {series: [] for series in SERIES}
    iterates = []
    rng = np.random.default_rng(4)
    q = 0.3 * rng.standard_normal(5)
    np.testing.assert_array_equal(drawn[0][1], q)
    for r, (at, perturbation, found) in enumerate(drawn[first:]):
        if name == "DS-BLO":
            step = 1.0 / (0.2 * np.linalg.norm(momentum) + 0.5)
            moved = problem.project(torch.from_numpy(x - step * momentum)).numpy()
            np.testing.assert_allclose(at, x + rng.uniform() * (moved - x), rtol=1e-12, atol=1e-14)
            x, q = moved, 0.3 * rng.standard_normal(5)
            momentum = 0.6 * momentum + 0.4 * found.gradient
        else:
            np.testing.assert_array_equal(at, x)
            step = min(1.0 / (0.5 * (r + 1)), 0.5) if name == "strongly convex" else 1.5 / 12**0.5
            x = problem.project(torch.from_numpy(x - step * found.gradient)).numpy()
            momentum = found.gradient
        np.testing.assert_array_equal(perturbation, q)
        active = set(found.solution.active.tolist())
        before = set(drawn[first + r - 1][2].solution.active.tolist()) if r else active
        excess = problem.A.numpy() @ at + problem.B.numpy() @ found.solution.y - problem.b.numpy()
        y = problem.solve_lower_level(torch.from_numpy(x))
        row = (
            float(problem.upper_objective(torch.from_numpy(x), y)), r + 1.0, np.linalg.norm(found.gradient),
            np.linalg.norm(momentum), step, len(active ^ before), found.solution.margin, max(0.0, excess.max()),
        )  # fmt: skip
        for series, value in zip(SERIES, row, strict=True):
            expected[series].append(value)
        iterates.append(x)
    assert len(iterates) == 12
    for series in SERIES:
        np.testing.assert_allclose(result.history[series], expected[series], rtol=1e-10, err_msg=series)
    assert max(expected["active_changes"]) > 0
    assert (np.abs(iterates[1:]) == 0.7).any()  # X is left, and projected onto
    assert (np.abs(iterates) < 0.7).any()
    assert max(expected["violation"]) > 0.1
    weights = np.arange(1, 13) if name == "strongly convex" else np.ones(12)
    points = {
        "last": iterates[-1], "best": iterates[int(np.argmin(expected["objective"]))],
        "average": np.average(iterates, axis=0, weights=weights),
    }  # fmt: skip
    for point, x in points.items():
        np.testing.assert_allclose(getattr(result, f"x_{point}").numpy(), x, rtol=1e-12, atol=1e-13)
        assert result.objectives[point] == pytest.approx(problem.objective(x), abs=1e-10)
    output = "last" if name == "DS-BLO" else "average"
    assert torch.equal(result.x, getattr(result, f"x_{output}"))
    assert result.objective == result.objectives[output]


def test_settings_are_those_of_the_run():
    problem = StronglyConvexBilevelProblem(3, seed=1)
    one = SSIGD(problem, regime="convex", step=0.3, q_std=0.01, noise_std=0.2, inexactness=0.1, seed=7)
    settings = one.solve(3, torch.ones(3)).settings
    versions = settings.pop("versions")
    assert versions.keys() == {"torch", "numpy", "daqp"}
    mu, lipschitz = settings.pop("mu"), settings.pop("lipschitz")
    assert (mu, lipschitz) == (one.mu, one.lipschitz)
    assert settings == {
        "algorithm": "SSIGD", "iterations": 3, "seed": 7, "q_std": 0.01, "noise_std": 0.2, "inexactness": 0.1,
        "backend": "kkt", "problem": repr(problem), "device": "cpu", "regime": "convex", "step": 0.3,
        "x0": [1.0, 1.0, 1.0],
    }  # fmt: skip
    other = DSBLO(problem, beta=0.5, gamma1=2.0, gamma2=3.0, option="II", noise_std=0.1).solve(1).settings
    assert other["algorithm"] == "DSBLO"
    assert {key: other[key] for key in ("beta", "gamma1", "gamma2", "option", "x0")} == {
        "beta": 0.5, "gamma1": 2.0, "gamma2": 3.0, "option": "II", "x0": None,
    }  # fmt: skip


def test_checkpoints_are_written_when_asked_and_at_the_end(tmp_path, monkeypatch):
    saved, save = [], descent.save_checkpoint

    def recorded(path, settings, snapshot, history):
        saved.append(snapshot.iteration)
        save(path, settings, snapshot, history)

    monkeypatch.setattr(descent, "save_checkpoint", recorded)
    problem, path = StronglyConvexBilevelProblem(3, seed=1), tmp_path / "run.json"
    algorithm = SSIGD(problem, seed=2)
    result = algorithm.solve(10, checkpoint=path, checkpoint_every=4)
    assert saved == [4, 8, 10]
    snapshot, history = load_checkpoint(path, result.settings)
    assert history == result.history
    assert snapshot.iteration == 10
    assert snapshot.seconds == result.history["seconds"][-1] > 0
    np.testing.assert_array_equal(snapshot.best_x, result.x_best.numpy())
    assert snapshot.best_objective == min(result.history["objective"])
    again = algorithm.solve(10, checkpoint=path)  # nothing is left to do
    assert again.history == result.history
    assert again.objectives == result.objectives


@pytest.mark.parametrize("make", [SSIGD, DSBLO])
def test_a_run_that_stops_in_its_first_iteration_resumes(make, tmp_path, monkeypatch):
    """No objective is known by then: the best is infinite."""
    problem, path = StronglyConvexBilevelProblem(3, seed=1), tmp_path / "run.json"
    whole = make(problem, q_std=0.1).solve(5)

    def stopped(self, *arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(make, "_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            make(problem, q_std=0.1).solve(5, checkpoint=path)
    assert json.loads(path.read_text())["snapshot"]["iteration"] == 0
    resumed = make(problem, q_std=0.1).solve(5, checkpoint=path)
    assert resumed.history["objective"] == whole.history["objective"]
    assert torch.equal(resumed.x_best, whole.x_best)


@pytest.mark.parametrize("text", ["not JSON", "[1, 2]", '{"settings": {}}', "3"])
def test_other_files_are_no_checkpoints(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a checkpoint; delete it"):
        SSIGD(StronglyConvexBilevelProblem(3)).solve(2, checkpoint=path)
    assert path.read_text() == text


def test_infinities_survive_the_checkpoint(tmp_path):
    """Without constraints every margin is infinite, which JSON does not know."""
    problem = QuadraticBilevelProblem(
        Q_upper=np.eye(2), x_target=[1.0, 0], c_upper=[1.0, 1], Q_lower=np.eye(2), c_lower=[0.0, 0], P=np.eye(2),
        A=np.zeros((0, 2)), B=np.zeros((0, 2)), b=[],
    )  # fmt: skip
    path = tmp_path / "run.json"
    first = SSIGD(problem).solve(3, checkpoint=path)
    assert first.history["margin"] == [np.inf] * 3
    assert json.loads(path.read_text())["history"]["margin"] == ["inf"] * 3
    assert SSIGD(problem).solve(3, checkpoint=path).history == first.history


@pytest.mark.parametrize("make", [SSIGD, DSBLO])
@pytest.mark.parametrize(("rows", "error"), [(1, DegenerateError), (2, LICQError)])
def test_the_log_does_not_abort_a_run(make, rows, error, monkeypatch):
    """The unperturbed y* = 1 is weakly active at every x, and with two equal rows doubly so; q pushes y* off them."""
    problem = QuadraticBilevelProblem(
        Q_upper=np.eye(1), x_target=[1.0], c_upper=[1.0], Q_lower=np.eye(1), c_lower=[-1.0], P=[[0.0]],
        A=np.zeros((rows, 1)), B=np.ones((rows, 1)), b=np.ones(rows), min_margin=1e-9,
    )  # fmt: skip
    with pytest.raises(error):
        implicit_gradient(problem, torch.zeros(1))
    with pytest.raises(error):
        problem.solve_lower_level(torch.zeros(1))
    assert problem.objective(torch.zeros(1)) == pytest.approx(1.5)
    monkeypatch.setattr(descent.BilevelDescent, "_draw_q", lambda self, rng: np.array([1e-3]))
    result = make(problem).solve(4)
    np.testing.assert_allclose(result.history["margin"], 1e-3)
    assert result.history["objective"] == sorted(result.history["objective"], reverse=True)
    assert result.objectives["last"] == result.history["objective"][-1] < 1.5
