"""The programs and snippets of the pages run, and do what the pages say."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import breaching
import pytest
import torch
from cases import OwnModule
from hydra.core.global_hydra import GlobalHydra
from hydra.plugins.search_path_plugin import SearchPathPlugin
from pages import blocks, text_of, write_named

from breaching_ext import registration, regularizers
from breaching_ext.attacks import JointCandidateAttacker, observe

#: Hydra as the command uses it, but without files of its own
QUIET = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null", "hydra.run.dir=."]


@pytest.fixture
def short_runs(monkeypatch) -> None:
    """Two iterations, whatever a page asks for, and two images of a simulated client."""
    in_attack = ["optim.max_iterations=2"]
    in_all = ["attack.optim.max_iterations=2", "case.user.num_data_points=2"]
    for function, few in (("get_attack_config", in_attack), ("get_config", in_all)):
        original = getattr(breaching, function)

        def short(*args, original=original, few=few, overrides=(), **kwargs):
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Breaching's own use of Hydra
                return original(*args, overrides=[*overrides, *few], **kwargs)

        monkeypatch.setattr(breaching, function, short)


@pytest.fixture
def own_project(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder in which scripts are written and run; what they register is taken back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    from breaching.attacks.auxiliaries.regularizers import regularizer_lookup

    tables = (regularizers.ALIGNERS, registration.REGULARIZERS, registration.ATTACK_TYPES, regularizer_lookup)
    with contextlib.ExitStack() as stack:
        for table in tables:
            stack.enter_context(mock.patch.dict(table))
        yield tmp_path
    sys.modules.pop("mine", None)
    GlobalHydra.instance().clear()


def what_a_client_sent() -> dict[str, object]:
    """The names that snippets take as given: four images, one gradient, and what two local steps change."""
    torch.manual_seed(0)
    model, loss_fn = OwnModule().eval(), torch.nn.CrossEntropyLoss()
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 2, 3, 5])
    before = list(model.parameters())
    gradients = torch.autograd.grad(loss_fn(model(images[:2]), labels[:2]), before)
    payload, shared = observe(model, gradients, (3, 32, 32), 2, 8, labels=labels[:2])
    changed = [p.detach() - 0.1 * g for p, g in zip(before, gradients, strict=True)]
    sent = {"model": model, "loss_fn": loss_fn, "gradients": gradients, "payload": payload, "shared": shared}
    return {**sent, "labels": labels, "server_parameters": before, "client_parameters": changed}


def run_nameless(text: str, **given: object) -> list[dict[str, object]]:
    """Run the other blocks one after another, each on top of what is given; returns the names that each leaves."""
    done = []
    for block in blocks(text, "python"):
        if not re.match(r"# [\w/]+\.py\n", block):
            names = {**given}
            exec(compile(block, "snippet", "exec"), names)
            done.append(names)
    return done


def run_script(monkeypatch, line: str) -> dict[str, object]:
    """Run `python script.py overrides` in this process."""
    arguments = shlex.split(line, comments=True)[1:]
    monkeypatch.setattr(sys, "argv", arguments)
    return runpy.run_path(arguments[0], run_name="__main__")


def test_the_readmes_snippets_run(own_project, short_runs):
    sent = what_a_client_sent()
    simulated, own = run_nameless(text_of("README.md"), **{**sent, "labels": sent["labels"][:2]})
    assert simulated["reconstruction"]["candidates"].shape == (4, 2, 3, 32, 32)
    assert own["reconstruction"]["candidates"].shape == (2, 2, 3, 32, 32)


def test_the_program_for_a_model_of_ones_own_runs(own_project, short_runs, monkeypatch):
    page = text_of("docs/own_project.md")
    write_named(page, "python")
    found = run_script(monkeypatch, "python audit.py")
    assert found["reconstruction"]["data"].shape == (2, 3, 32, 32)
    assert (own_project / "audit.png").exists()
    sent = what_a_client_sent()
    (steps,) = run_nameless(page, observe=observe, **sent)
    attacker = JointCandidateAttacker(sent["model"], sent["loss_fn"], breaching.get_attack_config("joint_candidates"))
    reconstruction, _ = attacker.reconstruct(steps["payload"], steps["shared"])
    assert reconstruction["data"].shape == (4, 3, 32, 32)


def test_a_hydra_application_of_ones_own_finds_the_attacks(own_project, short_runs, monkeypatch, capsys):
    page = text_of("docs/own_project.md")
    for language in ("python", "yaml"):
        write_named(page, language)
    lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line.startswith("python hydra")]
    assert len(lines) == 2
    for line in lines:
        command = [*shlex.split(line, comments=True), "attack.optim.max_iterations=2", *QUIET]
        run_script(monkeypatch, shlex.join(command))
    printed = capsys.readouterr().out
    assert "JointCandidateAttacker torch.Size([2, 3, 16, 16])" in printed
    assert "OptimizationBasedAttacker torch.Size([2, 3, 16, 16])" in printed


def test_what_extends_the_attacks_is_used(own_project, short_runs):
    page = text_of("docs/extending.md")
    write_named(page, "python")
    own, schedule = run_nameless(page, **what_a_client_sent())
    attacker, stats = own["attacker"], own["stats"]
    assert type(attacker).__name__ == "Sharpest"
    assert type(attacker.group).__name__ == "MedianConsensus"
    assert type(attacker.regularizers[-1]).__name__ == "Contrast"
    assert attacker.group.aligner == "half_turn"
    assert stats["alignments"] == 4 * 2
    assert stats["opt_value"] < 0  # minus the sharpness
    candidates = own["reconstruction"]["candidates"]
    median = candidates.median(dim=0).values
    assert torch.equal(attacker._consensus(candidates, {}), median)
    attacker.group.update(candidates, 1)
    assert torch.equal(attacker.group.consensus, median)
    image = candidates[0, 0]
    turned, found = regularizers.align(image.flip(-1, -2), image, "half_turn")
    assert found
    assert torch.allclose(turned, image)
    assert schedule["attacker"].options.schedule.size(3, 4, 8) == 2
    assert schedule["reconstruction"]["data"].isfinite().all()


def test_the_command_takes_what_extends_it(own_project, monkeypatch, capsys):
    page = text_of("docs/extending.md")
    write_named(page, "python")
    (line,) = (line for block in blocks(page, "bash") for line in block.splitlines() if "my_audit.py" in line)
    few = [
        "attack.optim.max_iterations=2",
        "case.user.num_data_points=1",
        "attack.restarts.num_trials=2",
        "dryrun=true",
    ]
    run_script(monkeypatch, shlex.join([*shlex.split(line, comments=True), *few, "base_dir=.", *QUIET]))
    assert "PSNR [dB]" in capsys.readouterr().out
    registration.ATTACK_TYPES.pop("sharpest")
    sys.modules.pop("mine")
    plugin = runpy.run_path("hydra_plugins/mine_plugin.py")["Mine"]
    assert issubclass(plugin, SearchPathPlugin)
    assert "sharpest" in registration.ATTACK_TYPES


def test_magia_on_a_gradient_of_ones_own_runs(own_project, short_runs):
    (found,) = run_nameless(text_of("docs/magia.md"))
    assert found["reconstruction"]["label_probabilities"].shape == (4, 8)
