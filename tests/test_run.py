"""What one run compares with what, and what it says of a run that is none."""

from __future__ import annotations

import json
import math
import signal

import breaching
import pytest
import torch
from breaching.attacks.optimization_based_attack import OptimizationBasedAttacker
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from breaching_ext import candidate_sheet, cli
from breaching_ext import run as run_module
from breaching_ext.attacks.evaluation_count import evaluations_counted
from breaching_ext.environment import choose_kernels
from breaching_ext.errors import BreachingExtError
from breaching_ext.registration import register
from breaching_ext.run import run
from breaching_ext.run_rows import read_runs

register()  # before a test puts something in the place of what is wrapped


def configured(*overrides: str):
    small = ["case.model=cnn6", "case.user.num_data_points=2", "++attack.optim.max_iterations=2", "device=cpu"]
    with initialize_config_module("breaching.config", version_base="1.3"):
        return compose("breaching_ext", [*small, *overrides])


@pytest.mark.parametrize("clipping", [0.0, 1.0])
@pytest.mark.parametrize("user", ["local_gradient", "local_update"])
def test_the_truth_is_the_clients_data_not_what_a_defence_made_of_them(clipping, user):
    """Breaching's user with input noise hands out the noised images as its own."""
    options = [f"case.user.local_diff_privacy.per_example_clipping={clipping}"]
    if user == "local_update":
        options += ["case/user=local_updates", "case.user.provide_local_hyperparams=true"]
    clean, noised = (
        run(configured(f"case.user.local_diff_privacy.input_noise={noise}", *options)).true_data["data"]
        for noise in (0.0, 0.3)
    )
    assert torch.equal(clean, noised)


def test_a_case_in_double_precision():
    result = run(configured("case.impl.dtype=double", "attack.impl.dtype=double"))
    assert result.true_data["data"].dtype == torch.float64
    assert math.isfinite(result.record["psnr"])


def test_an_interrupted_attack_of_breachings_own_says_so(tmp_path, monkeypatch, request):
    """Its trial swallows Ctrl-C and returns what it has."""
    original = OptimizationBasedAttacker._compute_objective

    def interrupted(self, *args):
        closure = original(self, *args)

        def once():
            signal.raise_signal(signal.SIGINT)
            return closure()

        return once

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell starts it aside
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    cfg = configured("attack=invertinggradients", "attack.optim.max_iterations=2")
    assert run(cfg, tmp_path / "whole").record["interrupted"] is False
    monkeypatch.setattr(OptimizationBasedAttacker, "_compute_objective", interrupted)
    assert run(cfg, tmp_path / "stopped").record["interrupted"] is True
    stopped, whole = read_runs(tmp_path)
    assert "interrupted" in stopped["error"]
    assert whole["error"] is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["attack=invertinggradients", "attack.restarts.num_trials=3"], 3 * 2),
        (["attack=deepleakage", "attack.optim.optimizer=adam", "case.user.provide_labels=false"], 2),
        (["attack=analytic", "case.model=linear", "~attack.optim"], None),
    ],
    ids=["trials", "joint labels", "analytic"],
)
def test_evaluations_of_breachings_own_attacks_are_counted(options, expected):
    assert run(configured(*options)).record["gradient_evaluations"] == expected


def test_the_closures_of_an_attack_are_its_own_again():
    class Attack:
        def _compute_objective(self, value):
            return lambda: value

    attack = Attack()
    with evaluations_counted(attack) as outer, evaluations_counted(attack) as inner:
        closure = attack._compute_objective(3)
        assert [closure(), closure()] == [3, 3]
    attack._compute_objective(3)()
    assert (outer.number, inner.number) == (2, 2)
    assert "_compute_objective" not in vars(attack)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["attack.restarts.num_trials=0"], r"own attack invertinggradients .*IndexError.*hydra\.verbose=true"),
        (["attack.optim.optimizer=foo"], r"own attack invertinggradients .*Invalid optimizer foo"),
    ],
)
def test_what_breachings_own_attacks_throw_is_one_line(options, words):
    with pytest.raises(BreachingExtError, match=words) as error:
        run(configured("attack=invertinggradients", *options))
    assert len(str(error.value).splitlines()) == 1


def test_other_attacks_errors_and_a_lack_of_memory_stay_what_they_are(monkeypatch):
    class Failing:
        def reconstruct(self, *args, **kwargs):
            raise KeyError("a bug of ours")

    def no_memory(*args, **kwargs):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(breaching.attacks, "prepare_attack", lambda *args: Failing())
        with pytest.raises(KeyError):
            run(configured())
    monkeypatch.setattr(OptimizationBasedAttacker, "_run_trial", no_memory)
    with pytest.raises(MemoryError):
        run(configured("attack=invertinggradients"))


class NothingFinite:
    """An attack none of whose trials stayed finite: Breaching returns zeros then."""

    def __init__(self, value):
        self.value = value

    def reconstruct(self, payload, shared, secrets, dryrun=False):
        return {"data": torch.zeros(2, 3, 32, 32), "labels": torch.zeros(2, dtype=torch.long)}, {
            "opt_value": self.value
        }


@pytest.mark.parametrize(("value", "says"), [(math.inf, True), ([], False), (0.5, False)])
def test_a_result_of_zeros_is_no_reconstruction(tmp_path, monkeypatch, value, says):
    monkeypatch.setattr(breaching.attacks, "prepare_attack", lambda *args: NothingFinite(value))
    record = run(configured(), tmp_path).record
    assert record["no_reconstruction"] is says
    assert record["opt_value"] in ((value,) if isinstance(value, float) else (None,))
    assert ("No candidate stayed finite" in cli.summary(record)) is says
    (row,) = read_runs(tmp_path)
    assert (row["error"] is not None) is says


def test_a_picture_that_fails_does_not_lose_the_run(tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise ValueError("Image size of 975x87000 pixels is too large")

    monkeypatch.setattr(run_module, "save_candidate_sheet", fail)
    (tmp_path / "candidates.png").write_bytes(b"of an earlier run")
    run(configured(), tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["psnr"]
    assert not (tmp_path / "candidates.png").exists()  # that of an earlier run
    assert "A picture could not be drawn" in caplog.text


def test_the_sheet_shows_the_best_of_many_candidates(tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        candidate_sheet,
        "save_candidates",
        lambda path, true, rows, last, names, title, name: shown.update(rows=rows, names=names, title=title),
    )
    true = torch.rand(1, 3, 8, 8)
    scores = torch.arange(40.0).roll(3)
    scores[5] = math.nan
    tensors = {"candidates": torch.rand(40, 1, 3, 8, 8), "candidate_scores": scores}
    candidate_sheet.save_candidate_sheet(tmp_path / "sheet.png", true, tensors, title="many")
    assert len(shown["rows"]) == len(shown["names"]) == candidate_sheet.MOST_CANDIDATES
    assert shown["title"] == "many; the best 24 of 40 candidates"
    assert shown["names"][0].startswith("candidate 3 (chosen)")
    torch.testing.assert_close(shown["rows"][1].float(), tensors["candidates"][4], atol=1e-5, rtol=0)


def test_repeatable_kernels_are_not_left_to_the_next_job():
    run(configured("case.impl.deterministic=true"))
    assert torch.are_deterministic_algorithms_enabled()
    run(configured("case.impl.deterministic=false"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


def test_what_a_script_chose_stays(request):
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True)
    run(configured("case.impl.deterministic=false"))
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("everywhere", ["none", "tf32"])
def test_convolutions_on_a_gpu_are_in_full_precision(monkeypatch, request, everywhere):
    """And where the user did not set torch's newer switches, its old one can still be read."""
    newer = hasattr(torch.backends, "fp32_precision")
    if everywhere == "tf32" and not newer:
        pytest.skip("this torch has one switch only")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    request.addfinalizer(lambda: setattr(torch.backends.cudnn, "allow_tf32", True))
    if newer:
        request.addfinalizer(lambda: setattr(torch.backends, "fp32_precision", "none"))
        torch.backends.fp32_precision = everywhere
    choose_kernels(OmegaConf.create({"benchmark": False, "deterministic": False}))
    if newer:
        assert torch.backends.cudnn.conv.fp32_precision in ("none", "ieee")
    if everywhere == "none":
        assert not torch.backends.cudnn.allow_tf32
