"""The example, its configs and the files that a run leaves."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from breaching_ext.ssigd import SSIGD, SSIGDError, StronglyConvexBilevelProblem
from breaching_ext.ssigd.experiments import run_experiment
from breaching_ext.ssigd.history import SERIES, write_json
from breaching_ext.ssigd.plots import plot_runs, plot_scaling, save_figure

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "convex": {"dims": [3], "seeds": [0], "iterations": 40, "finish_gradients": 20},
    "nonconvex": {"dim": 2, "seeds": [0], "starts": 1, "iterations": 20},
    "dsblo_small": {"seeds": [0], "iterations": 10, "steps": [0.01, 0.1]},
    "dsblo_large": {"seeds": [0], "iterations": 5, "steps": [0.001]},
}


def load(name):
    return OmegaConf.to_container(OmegaConf.load(ROOT / "config" / "ssigd" / f"{name}.yaml"))


def test_every_config_has_a_small_version_here():
    assert {path.stem for path in (ROOT / "config" / "ssigd").glob("*.yaml")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_configs_run(name, tmp_path):
    report = run_experiment(load(name) | SMALL[name])
    assert report.runs
    assert all(np.isfinite(v) for row in report.summary["rows"] for v in row.values() if isinstance(v, float))
    gaps = [value for row in report.summary["rows"] for key, value in row.items() if key.startswith("gap_")]
    assert all(value >= -1e-9 for value in gaps)
    write_json(tmp_path / "summary.json", report.summary)
    assert json.loads((tmp_path / "summary.json").read_text())["config"]["experiment"] == load(name)["experiment"]
    save_figure(plot_runs(report.runs, report.reference), tmp_path / "runs.png")
    assert (tmp_path / "runs.png").stat().st_size > 10_000


def test_what_should_be_a_list_is_asked_for():
    with pytest.raises(SSIGDError, match=r"seeds=3 is not a list; expected for example \[3\]"):
        run_experiment(load("convex") | SMALL["convex"] | {"seeds": 3})


def test_paper_configs_have_the_papers_sizes():
    keys = ("upper", "lower", "constraints", "iterations")
    sizes = {name: tuple(load(name)[key] for key in keys) for name in SMALL if name.startswith("dsblo")}
    assert sizes == {"dsblo_small": (10, 10, 5, 100), "dsblo_large": (50, 50, 10, 100)}


def test_example_writes_its_files(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "ssigd_bilevel.py"), "convex", "dims=[3]", "seeds=[0]"]
    run = subprocess.run(
        [*command, "iterations=80", "--output", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["convex.json", "convex.png"]
    data = json.loads((tmp_path / "convex.json").read_text())
    assert data["config"]["iterations"] == 80
    assert "gap_finish" in run.stdout
    assert "Warning" not in run.stderr


def test_unknown_keys_are_named():
    with pytest.raises(SSIGDError, match="experiment='other' is unknown; expected one of"):
        run_experiment({"experiment": "other"})
    with pytest.raises(SSIGDError, match=r"keys \['speed'\] are unknown"):
        run_experiment(load("convex") | {"speed": 3})


def test_result_files_are_complete(tmp_path):
    result = SSIGD(StronglyConvexBilevelProblem(3), seed=5).solve(250)
    result.to_json(tmp_path / "run.json")
    data = json.loads((tmp_path / "run.json").read_text())
    assert data["settings"]["seed"] == 5
    assert set(data["settings"]["versions"]) == {"torch", "numpy", "daqp"}
    assert {name: len(values) for name, values in data["history"].items()} == dict.fromkeys(SERIES, 250)
    assert torch.equal(torch.tensor(data["x"], dtype=torch.float64), result.x)
    thin = result.thinned(50)
    assert thin["iteration"] == list(range(0, 250, 5))
    assert thin["objective"] == pytest.approx(result.history["objective"][::5], rel=1e-5)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "data.json"
    write_json(path, {"a": [1.0, float("inf")], "b": np.arange(2), "c": {}})
    before = path.read_text()
    assert json.loads(before) == {"a": [1.0, "inf"], "b": [0, 1], "c": {}}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["data.json"]


def test_scaling_figure_skips_what_was_not_run(tmp_path):
    save_figure(plot_scaling([5, 10], {"kkt": [0.1, 0.2], "fd": [10.0, None]}), tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").exists()
