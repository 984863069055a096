"""The command, as a user starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.types import RunMode
from omegaconf import OmegaConf
from PIL import Image
from scipy.optimize import linear_sum_assignment

from breaching_ext import cli
from breaching_ext.candidate_sheet import save_candidate_sheet
from breaching_ext.environment import overrides
from breaching_ext.registration import register
from breaching_ext.run import _buffers_known, _labels_known, run


def breaching_ext(root, cwd, *overrides: str, home: str = "") -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    if home:
        env["TORCH_HOME"] = home
    return subprocess.run(
        [sys.executable, "-m", "breaching_ext", *overrides], cwd=cwd, env=env, capture_output=True, text=True
    )


def only_run(folder):
    (found,) = folder.glob("outputs/*/*/*")
    return found


def test_default_run_is_clean_and_complete(root, tmp_path):
    done = breaching_ext(root, tmp_path, "attack.optim.max_iterations=4", "name=short", home=str(tmp_path / "nothing"))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr + done.stdout
    assert "mean" in done.stdout
    folder = only_run(tmp_path)
    assert folder.parts[-3] == "short"
    record = json.loads((folder / "metrics.json").read_text())
    for key in ("psnr", "ssim", "label_acc", "mse"):
        assert len(record["per_image"][key]) == 4
        assert record[key] == pytest.approx(sum(record["per_image"][key]) / 4)
    tensors, data = torch.load(folder / "candidates.pt"), record["config"]["case"]["data"]
    mean, std = (torch.tensor(data[key]).view(-1, 1, 1) for key in ("mean", "std"))
    found, true = ((tensors[key] * std + mean).clamp(0, 1) for key in ("data", "true_data"))
    errors = (found.unsqueeze(0) - true.unsqueeze(1)).square().flatten(2).mean(dim=2).double()  # (true, found)
    order = linear_sum_assignment(errors.numpy())[1]
    assert record["order"] == order.tolist()
    expected = errors[range(4), order]
    assert record["per_image"]["mse"] == pytest.approx(expected.tolist(), rel=1e-4)
    assert record["per_image"]["psnr"] == pytest.approx((-10 * expected.log10()).tolist(), rel=1e-4)
    assert record["labels_known"] is True
    assert record["lpips"] is None
    assert "alexnet" in record["lpips_reason"]
    assert record["gradient_evaluations"] == 4 * 4
    assert record["seed"] == 0
    assert record["engine"] == "vmap"
    assert {"seconds", "device", "versions", "config"} <= set(record)
    assert tensors["candidates"].shape == (4, 4, 3, 32, 32)
    assert Image.open(folder / "reconstruction.png").size[0] > 400
    assert Image.open(folder / "candidates.png").size[1] > 400
    assert (folder / "config.yaml").exists()
    assert (folder / ".hydra" / "overrides.yaml").exists()


def in_folder(monkeypatch, folder, mode=RunMode.RUN):
    """Let the command believe that Hydra gave it this folder."""
    hydra = SimpleNamespace(runtime=SimpleNamespace(output_dir=folder), mode=mode)
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: hydra)


def configured(*overrides: str):
    register()
    with initialize_config_module("breaching.config", version_base="1.3"):
        return compose("breaching_ext", overrides=list(overrides))


def test_another_seed_is_another_model_and_start_on_the_same_images():
    options = ["attack.optim.max_iterations=1", "case.model=lenet_zhu"]
    one, two = (run(configured(*options, f"seed={seed}")) for seed in (0, 1))
    assert torch.equal(one.true_data["data"], two.true_data["data"])
    assert not torch.allclose(one.reconstruction["candidates"], two.reconstruction["candidates"], atol=0.1)
    assert one.record["opt_value"] != two.record["opt_value"]


@pytest.mark.parametrize(
    ("overrides", "labels", "buffers"),
    [
        (["case.user.provide_labels=true"], True, False),
        (["case.user.provide_labels=false", "case.user.provide_buffers=true"], False, True),
        (["case/user=local_updates", "case.user.provide_labels=false"], True, False),
        (["attack=magia", "case.user.provide_labels=true"], False, False),
        (["attack=kkt", "case=kkt_fashion_mnist", "case.user.provide_labels=true"], True, True),
        (
            [
                *("attack=kkt", "case=kkt_fashion_mnist", "case.user.provide_labels=true"),
                "attack.extraction.candidate_labels=balanced",
            ],
            False,
            True,
        ),
    ],
)
def test_what_the_attack_knew_is_recorded(overrides, labels, buffers):
    cfg = configured("case.server.provide_public_buffers=false", "case.user.provide_buffers=false", *overrides)
    assert _labels_known(cfg) is labels
    assert _buffers_known(cfg) is buffers


def test_same_command_same_result(root, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        done = breaching_ext(root, tmp_path / name, "attack.optim.max_iterations=3", "seed=4")
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(only_run(tmp_path / name) / "candidates.pt") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_an_attack_and_case_of_breachings_own(root, tmp_path):
    """Breaching's attacks run through our command; they return no candidates, and nothing depends on them."""
    overrides = ["attack=invertinggradients", "attack.optim.max_iterations=2", "case.model=lenet_zhu"]
    done = breaching_ext(root, tmp_path, *overrides)
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path)
    assert (folder / "reconstruction.png").exists()
    assert not (folder / "candidates.png").exists()
    assert "candidates.png" not in done.stdout


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["attack.restarts.scoring=magic"], ["restarts.scoring", "magic"]),
        (["case.user.provide_num_data_points=False"], ["number of data points", "provide_num_data_points"]),
        (["device=warp"], ["device=warp"]),
        (["case.user.num_data_points=65"], ["case.user.num_data_points=65", "1 to 64"]),
        (["case=kkt_fashion_mnist"], ["joint-candidates needs a gradient", "trained_model", "attack=kkt"]),
    ],
    ids=["scoring", "points", "device", "more than there are", "weights"],
)
def test_an_error_is_one_line_and_is_recorded(monkeypatch, caplog, tmp_path, overrides, words):
    in_folder(monkeypatch, tmp_path)
    with pytest.raises(SystemExit) as left:
        cli._run_and_tell(configured(*overrides), run)
    assert left.value.code == 1
    (said,) = [record for record in caplog.records if record.levelname == "ERROR"]
    error = json.loads((tmp_path / "metrics.json").read_text())["error"]
    for text in (said.getMessage(), error):
        assert "\n" not in text
        assert all(word in text for word in words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"case.data.shape": "???"}, "case.data.shape: Missing mandatory value: case.data.shape"),
        ({"case.user.num_data_points": "${foo}"}, "case.user.num_data_points: Interpolation key 'foo' not found"),
    ],
)
def test_a_value_that_is_missing_or_refers_to_nothing(monkeypatch, caplog, tmp_path, changes, words):
    in_folder(monkeypatch, tmp_path)
    cfg = configured()
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value)
    with pytest.raises(SystemExit):
        cli._run_and_tell(cfg, run)
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said.startswith(words)
    assert "\n" not in said


def test_an_override_that_refers_to_another_value_is_recorded_as_it_was_written(monkeypatch):
    """Hydra's own config, which holds the overrides, does not know the values."""
    task = OmegaConf.create({"overrides": {"task": ["seed=${attack.restarts.num_trials}"]}})
    monkeypatch.setattr(cli.HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: task)
    assert overrides() == ["seed=${attack.restarts.num_trials}"]


def test_a_user_sees_one_line_of_an_error(root, tmp_path):
    done = breaching_ext(root, tmp_path, "attack.restarts.scoring=magic")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if "restarts.scoring" in line and "magic" in line]) == 1
    assert "magic" in json.loads((only_run(tmp_path) / "metrics.json").read_text())["error"]


@pytest.mark.parametrize("mode", [RunMode.RUN, RunMode.MULTIRUN])
def test_ctrl_c_ends_a_sweep_after_the_files_of_its_job(monkeypatch, tmp_path, capsys, request, mode):
    """An attack ends with its best so far on Ctrl-C, which is then evaluated; the jobs that follow are not run."""
    in_folder(monkeypatch, tmp_path, mode)
    monkeypatch.setattr(cli, "summary", lambda record: "a table")

    def run(cfg, folder):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return SimpleNamespace(record={"psnr": 12.0}, reconstruction={})

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell starts it aside
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    if mode == RunMode.MULTIRUN:
        with pytest.raises(KeyboardInterrupt):
            cli._run_and_tell({}, run)
    else:
        assert cli._run_and_tell({}, run) == 12.0
    assert "a table" in capsys.readouterr().out


def test_torchrun_with_a_device_that_is_not_there(root, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "WORLD_SIZE": "2", "RANK": "0"}
    command = [sys.executable, "-m", "breaching_ext", "device=warp"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "device=warp" in json.loads((only_run(tmp_path) / "metrics.json").read_text())["error"]


def test_a_column_of_the_candidates_picture_shows_one_image(monkeypatch, tmp_path):
    """Attacks that do not know labels put each candidate's images in an order of its own."""
    true = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    orders = [[2, 0, 3, 1], [1, 3, 0, 2], [0, 1, 2, 3]]
    tensors = {"candidates": torch.stack([true[o] for o in orders]), "candidate_scores": torch.tensor([2.0, 1.0, 3.0])}
    shown = []
    monkeypatch.setattr(
        "breaching_ext.candidate_sheet.save_candidates",
        lambda path, true, rows, consensus, *_: shown.extend([*rows, consensus]),
    )
    save_candidate_sheet(tmp_path / "sheet.png", true, tensors, None, None, "")
    assert len(shown) == 4
    for row in shown:
        torch.testing.assert_close(row.float(), true, atol=1e-5, rtol=0)


def test_the_candidates_picture_shows_the_consensus_where_that_is_the_result(monkeypatch, tmp_path):
    noise = torch.rand(4, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    candidates = 0.9 * noise[0] + 0.1 * noise[1:]
    tensors = {"candidates": candidates, "candidate_scores": torch.tensor([2.0, 1.0, 3.0])}
    tensors["data"] = (0.9 * candidates[1])[[2, 0, 3, 1]]  # a registered consensus, in another order
    found = {}
    monkeypatch.setattr(
        "breaching_ext.candidate_sheet.save_candidates",
        lambda path, true, rows, last, names, title, last_name: found.update(last=last, names=[*names, last_name]),
    )
    save_candidate_sheet(tmp_path / "sheet.png", candidates[1], tensors, None, None, "", True)
    torch.testing.assert_close(found["last"].float(), 0.9 * candidates[1], atol=1e-5, rtol=0)
    assert ["chosen" in name for name in found["names"]] == [False, False, False, True]
    save_candidate_sheet(tmp_path / "sheet.png", candidates[1], tensors, None, None, "")
    assert ["chosen" in name for name in found["names"]] == [False, True, False, False]
    nothing = {**tensors, "candidate_scores": torch.full((3,), float("inf"))}
    save_candidate_sheet(tmp_path / "sheet.png", candidates[1], nothing, None, None, "")
    assert not any("chosen" in name for name in found["names"])
    save_candidate_sheet(tmp_path / "sheet.png", candidates[1], tensors, None, None, "")
    torch.testing.assert_close(found["last"].float(), candidates.mean(dim=0), atol=1e-5, rtol=0)


def test_a_fishing_server(tmp_path):
    """The server singles out one image; pictures and candidates have the whole batch's places."""
    options = ["case/server=malicious-fishing", "case.model=cnn6", "attack.optim.max_iterations=2"]
    register()
    with initialize_config_module("breaching.config", version_base="1.3"):
        cfg = compose("breaching_ext", overrides=options)
    result = run(cfg, tmp_path)
    assert result.reconstruction["candidates"].shape[1:] == result.true_data["data"].shape
    assert (tmp_path / "candidates.png").exists()
