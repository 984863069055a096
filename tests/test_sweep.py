"""A sweep through a launcher, and its collection: a failed job is a row that says why."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_module

from breaching_ext.collect import main
from breaching_ext.registration import register


@pytest.mark.parametrize(
    ("launch", "plugin", "target"),
    [
        ("joblib", "hydra_joblib_launcher", "JoblibLauncher"),
        ("slurm", "hydra_submitit_launcher", "SlurmLauncher"),
    ],
)
def test_launchers_are_configured_for_every_attack(launch, plugin, target):
    pytest.importorskip(f"hydra_plugins.{plugin}", reason="needs the extra [sweep]")
    register()
    for attack in ("joint_candidates", "magia", "invertinggradients"):
        with initialize_config_module("breaching.config", version_base="1.3"):
            cfg = compose("breaching_ext", [f"+launch={launch}", f"attack={attack}"], return_hydra_config=True)
        assert cfg.hydra.launcher._target_.endswith(target)
        assert cfg.attack.impl.progress is False


def test_a_sweep_and_its_table(root, tmp_path, capsys):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra [sweep]")
    overrides = ["-m", "+launch=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep"]
    overrides += ["attack.restarts.scoring=cosine-similarity,magic", "seed=0,1", "case.model=lenet_zhu"]
    overrides += ["attack.optim.max_iterations=2", "attack.restarts.num_trials=2", "case.user.num_data_points=1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "TORCH_HOME": str(tmp_path / "nothing")}
    command = [sys.executable, "-m", "breaching_ext", *overrides]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0  # a sweep with failed jobs does not look like a success
    assert main([str(tmp_path / "sweep")]) == 0
    assert "2 of 4 runs failed" in capsys.readouterr().out
    with (tmp_path / "sweep" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], bool(row["psnr"])) for row in rows] == [("0", True), ("1", True), ("0", False), ("1", False)]
    assert all("restarts.scoring='magic'" in row["error"] for row in rows[2:])
    assert all(row["error"] == "" for row in rows[:2])
