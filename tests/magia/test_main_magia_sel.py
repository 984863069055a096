"""The command that MAGIA's users know: every line that is documented, what it writes, and bad input."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

SCRIPT = Path(__file__).parents[2] / "examples" / "main_magia_sel.py"
#: makes any of the command lines quick; a later option wins over an earlier one
QUICK = ["--n_iter", "2", "--batch_size", "2"]


def load_script():
    spec = importlib.util.spec_from_file_location("main_magia_sel", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Call the command with a line of options; returns the folder, the metrics and what was printed."""
    module = load_script()

    def call(*options: str):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options, "--out", str(tmp_path / "out")])
        module.main()
        metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
        return tmp_path / "out", metrics, capsys.readouterr()

    return call


def documented() -> list[str]:
    """The options of every line with the script's name in its own help and in docs/magia.md."""
    texts = SCRIPT.read_text(encoding="utf-8") + (SCRIPT.parents[1] / "docs" / "magia.md").read_text(encoding="utf-8")
    return sorted({m.strip() for m in re.findall(r"^ *python examples/main_magia_sel\.py([^#\n]*)", texts, re.M)})


@pytest.mark.parametrize("line", documented())
def test_documented_lines_run_as_written(line, command, cifar100):
    _, metrics, _ = command(*shlex.split(line), *QUICK, "--data_path", cifar100)
    assert metrics["gradient_evaluations"] > 0
    assert metrics["options"]["n_iter"] == 2


def test_everything_is_recorded(command):
    out, metrics, printed = command("--seed", "3", "--indices", "5,9", "--sel_k", "7", "--tv_weight", "0.01", *QUICK)
    for name in ("final.png", "history.png", "schedules.png", "final.pt", "checkpoints/step_00000.pt"):
        assert (out / name).stat().st_size > 0
    assert "--indices 5,9" in metrics["command"]
    assert len(metrics["git_commit"]) == 40
    assert metrics["indices"] == [5, 9]
    assert metrics["options"]["seed"] == 3
    assert metrics["options"]["sel_mode"] == "constk"
    assert metrics["options"]["tv_weight"] == 0.01
    for kind in ("one_to_one", "best_match"):
        assert set(metrics[kind]["overall"]) == {"mse", "rmse", "psnr", "ssim", "reconstruction_rate"}
        values = metrics[kind]["per_image"]["mse"]
        overall = metrics[kind]["overall"]["mse"]
        assert overall["mean"] == pytest.approx(np.mean(values))
        assert overall["std"] == pytest.approx(np.std(values))
        assert metrics[kind]["per_image"]["rmse"] == pytest.approx(np.sqrt(values))
    assert sorted(metrics["one_to_one"]["order"]) == [0, 1]
    assert "--sel_k=7 is outside 1 ... 2: clamped" in printed.out
    assert "±" in printed.out


def test_the_default_does_not_diverge(command):
    """The fixed step of plain L-BFGS diverges within the first outer steps of most runs; the default searches."""
    _, metrics, _ = command("--n_iter", "10", "--batch_size", "4")
    assert len(metrics["losses"]) == 10
    assert np.isfinite(metrics["losses"]).all()
    assert metrics["losses"][-1] < metrics["losses"][0]
    assert metrics["options"]["line_search"] == "strong_wolfe"


def test_same_seed_same_result(command):
    first, *_ = command(*QUICK)
    pixels = torch.load(first / "final.pt")["pixels"]
    again, *_ = command(*QUICK)
    assert torch.equal(torch.load(again / "final.pt")["pixels"], pixels)


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        (["--sel_mode", "linear_warmup", "--l_iter", "150"], {"sel_mode": "linear_inc_l", "sel_l_iter": 150}),
        (["--sel_mode", "linear_increase"], {"sel_mode": "linear_inc_total"}),
        (["--sel_mode", "linear_decrease"], {"sel_mode": "linear_dec_l"}),
        (["--sel_mode", "constant", "--sel_const", "1"], {"sel_mode": "constk", "sel_k": 1}),
        (["--sel_mode", "sigmoid", "--a", "-0.2", "--b", "7"], {"sel_mode": "sigmoid", "sig_a": -0.2, "sig_b": 7.0}),
    ],
)
def test_the_published_scripts_options_mean_the_same(published, ours, command):
    options = command(*published, *QUICK)[1]["options"]
    assert {key: options[key] for key in ours} == ours


@pytest.mark.parametrize(
    ("options", "part", "expected"),
    [
        (["--sel_mode", "linear_dec_l", "--sel_l_iter", "7"], "schedule", {"mode": "linear_dec_l", "l_iter": 7}),
        (["--sel_mode", "sigmoid", "--sig_a", "0.5", "--sig_b", "1"], "schedule", {"a": 0.5, "b": 1.0}),
        (["--sel_k", "1"], "schedule", {"mode": "constk", "k": 1}),
        (
            ["--subset_term", "mean", "--alpha", "0.5", "--rescaling", "2"],
            "subset",
            {"kind": "mean", "alpha": 0.5, "rescaling": 2.0},
        ),
        (["--subset_term", "none"], "subset", {"kind": "none"}),
        (["--rescaling", "ratio"], "subset", {"kind": "released", "alpha": 0.999, "rescaling": "ratio"}),
        (["--tv_weight", "0.02"], "image_prior", {"last": 0.02, "first": 3.0}),
        (["--tv_weight", "5"], "image_prior", {"last": 5.0, "first": 5.0}),
        (["--tv_weight", "0"], "image_prior", {"last": 0.0, "first": None}),
        (["--optimizer", "adam"], "optimizer", {"name": "adam", "step_size": 0.05}),
        (["--line_search", "none", "--step_size", "0.5"], "optimizer", {"step_size": 0.5, "line_search": None}),
        ([], "optimizer", {"name": "l-bfgs", "step_size": 1.0, "line_search": "strong_wolfe"}),
    ],
)
def test_every_option_reaches_the_engine(options, part, expected, monkeypatch):
    """What the engine holds is what metrics.json records: both come from the script's own `method`."""
    module = load_script()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *QUICK, *options])
    args = module.parse()
    images, labels, _, classes = module.load(args)
    found = module.method(module.build(args, images, labels, classes))[part]
    assert {key: found[key] for key in expected} == expected


def test_double_precision_and_the_seed_reach_the_run(command):
    single, record, _ = command(*QUICK)
    assert record["method"]["dtype"] == "float32"
    pixels = torch.load(single / "final.pt")["pixels"]
    double, record, _ = command(*QUICK, "--double")
    assert record["method"]["dtype"] == "float64"
    assert torch.load(double / "final.pt")["pixels"].dtype == torch.float64
    other, *_ = command(*QUICK, "--seed", "1", "--indices", ",".join(map(str, record["indices"])))
    assert not torch.allclose(torch.load(other / "final.pt")["pixels"], pixels)


def test_metrics_are_of_images_that_belong_together(command):
    """One to one, every reconstruction is compared once; the published script takes the most alike, repeats allowed."""
    module = load_script()
    true = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    shuffled = true[[2, 0, 1]] + 0.05  # image i came back as order[i]
    found = module.reference_metrics(shuffled, true, [1, 2, 0])
    assert found["per_image"]["rmse"] == pytest.approx([0.05] * 3)
    assert found["overall"]["reconstruction_rate"]["mean"] == 1.0
    far = module.reference_metrics(true + 0.2, true, [0, 1, 2])
    assert far["overall"]["reconstruction_rate"]["mean"] == 0.0
    repeated = module.best_match(true[[1, 1, 2]], true)
    assert repeated["order"] == [1, 1, 2]
    assert repeated["per_image"]["mse"] == [0.0] * 3


def test_checkpoints_of_an_earlier_run_do_not_stay(command):
    folder, *_ = command(*QUICK, "--n_iter", "3", "--checkpoint_every", "1")
    assert len(list((folder / "checkpoints").iterdir())) == 3
    command(*QUICK, "--n_iter", "1")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000.pt"]


def test_a_file_is_no_folder_for_results(command, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit):
        command(*QUICK)
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--batch_size", "0"], "batch_size=0"),
        (["--sel_l_iter", "0"], "sel_l_iter=0"),
        (["--n_iter", "0"], "n_iter=0"),
        (["--alpha", "1.5"], "alpha=1.5"),
        (
            ["--sel_mode", "cubic"],
            "const1, constk, linear_inc_l, linear_inc_total, linear_dec_l, linear_dec_total, sigmoid",
        ),
        (["--rescaling", "0"], "rescaling=0.0"),
        (["--rescaling", "binomial"], "none, ratio, variance"),
        (["--indices", "1,two"], "indices"),
        (["--indices", "1,100000"], "out of range"),
        (["--step_size", "0"], "--step_size=0"),
        (["--step_size", "nan"], "--step_size=nan"),
        (["--tv_weight", "-1"], "--tv_weight=-1.0"),
        (["--seed", "9" * 23], "--seed=999"),
    ],
)
def test_bad_options_end_in_one_line(options, text, command, capsys):
    with pytest.raises(SystemExit) as stop:
        command(*QUICK, *options)
    assert text in f"{stop.value} {capsys.readouterr().err}"


def test_help_states_every_default(command, capsys):
    with pytest.raises(SystemExit):
        command("-h")
    text = " ".join(capsys.readouterr().out.split())
    for option, default in (("--sel_k", 2), ("--sel_l_iter", 100), ("--sig_b", 200.0), ("--n_iter", 300)):
        assert option in text
        assert f"(default: {default})" in text
    assert "(default: None)" not in text


@pytest.fixture
def cifar100(tmp_path, monkeypatch) -> str:
    """Sixty random images in CIFAR-100's own file layout; returns the folder."""
    folder = tmp_path / "data" / "cifar-100-python"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (60, 3072), dtype=np.uint8)
    train = {"data": images, "fine_labels": [i % 100 for i in range(60)]}
    sums = {}
    for name, content in (("train", train), ("meta", {"fine_label_names": [str(i) for i in range(100)]})):
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    dataset = torchvision.datasets.CIFAR100
    monkeypatch.setattr(dataset, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(dataset, "test_list", [])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": sums["meta"]})
    return str(tmp_path / "data")


def test_cifar100_where_there_is_none_says_so(command, tmp_path):
    def offline(*_args, **_kwargs):
        raise OSError("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets.CIFAR100, "download", offline)
        with pytest.raises(SystemExit, match=r"cifar100 is not in .*no network"):
            command("--dataset", "cifar100", "--data_path", str(tmp_path), *QUICK)


def test_ctrl_c_keeps_the_last_whole_step_at_full_size_and_says_so(command, monkeypatch):
    """Within a step the images stand on the coarse grid of the pyramid, or at a point that a line search tries."""
    from breaching_ext.matching.magia_engine import MagiaEngine

    step, whole = MagiaEngine.step, []

    def interrupted(self, iteration, alive, progress=None):
        if iteration == 1:
            self.overwrite([torch.zeros_like(p) for p in self.parameters])
            raise KeyboardInterrupt
        values = step(self, iteration, alive, progress)
        whole.append(self.parameters[0][0].clone())
        return values

    monkeypatch.setattr(MagiaEngine, "step", interrupted)
    folder, metrics, printed = command("--n_iter", "3", "--batch_size", "2")
    assert metrics["interrupted"] is True
    assert "Interrupted after 1 outer steps" in printed.out
    assert torch.equal(torch.load(folder / "final.pt")["pixels"], whole[0])
    monkeypatch.setattr(MagiaEngine, "step", step)
    assert command(*QUICK)[1]["interrupted"] is False
