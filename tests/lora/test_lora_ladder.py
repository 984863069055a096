"""The ladder: cells, resume, bad input, and a tiny one from end to end."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from cases import MEAN, STD

from breaching_ext.attacks import JointCandidateAttacker
from breaching_ext.errors import BreachingExtError, ConfigError
from breaching_ext.files import only_here
from breaching_ext.lora import MissingPeftError, cli, report
from breaching_ext.lora import ladder as ladder_module
from breaching_ext.lora.cells import run_cell
from breaching_ext.lora.decode import cosine, unseen
from breaching_ext.lora.ladder import Ladder, run_ladder
from breaching_ext.lora.report import table, write_report
from breaching_ext.lora.settings import METHODS, RANKLESS, Cell, Settings, plan

CPU = torch.device("cpu")
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed: pip install 'breaching-ext[lora]'"
)


def config(*overrides: str):
    """The composed config of the ladder with attacks of two iterations, as the command reads it."""
    quick = ["attack.optim.max_iterations=2", "public=16", "seeds=[0]", "ranks=[2]", "starts=[random]"]
    keyed = {item.split("=")[0]: item for item in [*quick, *overrides]}
    from hydra import compose, initialize_config_module

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with initialize_config_module("breaching.config", version_base="1.3"):
            return compose("lora/ladder", overrides=list(keyed.values()))


def settings(*overrides: str) -> Settings:
    return Settings.from_config(config(*overrides))


def run_one(phase: int, method: str, rank, start: str, *overrides: str):
    chosen = settings(*overrides)
    cell = Cell(chosen.model, phase, method, rank, start, 0)
    problem = ladder_module.Case(chosen.model, chosen.layers, 0, chosen.batch, chosen.public)
    row, _ = run_cell(cell, problem, chosen, CPU)
    return row, problem, chosen


def test_the_plan_begins_with_the_cheapest_falsifying_experiment():
    cells = plan(settings("seeds=[0,1]", "ranks=[1,full]", "starts=[zero,random]"))
    assert [cell.phase for cell in cells[:3]] == [0, 0, 1]
    with_adapter = sum((phase, m) not in RANKLESS for phase, methods in METHODS.items() for m in methods)
    assert len(cells) == 2 * 2 + with_adapter * 2 * 2 * 2
    assert [cell.phase for cell in cells] == sorted(cell.phase for cell in cells)
    assert len(set(cells)) == len(cells)


def test_the_ways_to_attack_can_be_chosen():
    cells = plan(settings("phases=[0,1,2]", "methods=[full,whiten]", "ranks=[1,2]"))
    assert [(cell.phase, cell.method, cell.rank) for cell in cells] == [
        (0, "full", "-"),
        (1, "whiten", 1),
        (1, "whiten", 2),
    ]
    with pytest.raises(ConfigError, match="Unknown methods='decode'; valid: full, match, whiten"):
        settings("phases=[0,1]", "methods=[decode]")


@needs_peft
def test_a_tiny_ladder_resumes_and_reports(tmp_path, monkeypatch):
    chosen = settings()
    ran = []
    real = ladder_module.run_cell

    def stopped(cell, *args):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(cell)
        return real(cell, *args)

    monkeypatch.setattr(ladder_module, "run_cell", stopped)
    assert len(run_ladder(chosen, tmp_path).missing()) == len(plan(chosen)) - 3
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 3
    monkeypatch.setattr(ladder_module, "run_cell", lambda cell, *args: (ran.append(cell), real(cell, *args))[1])
    done = run_ladder(chosen, tmp_path)
    assert ran == plan(chosen), "a finished cell was run again, or one was left out"
    assert not Ladder.open(tmp_path, chosen).missing()
    content = json.loads((tmp_path / "rows.json").read_text())
    assert {"settings", "versions", "device", "rows"} <= set(content)
    assert content["rows"][0]["cosine_seen"] == 1.0
    assert not any("device" in row or "versions" in row for row in content["rows"])  # all as the file says
    for row in content["rows"]:
        assert 0 < row["psnr"] < 100
        assert -1 <= row["cosine_full"] <= 1
        assert ("cosine_decoded" in row) is (row["method"] in ("public", "closed", "learned", "decode"))
    files = write_report(done.rows, tmp_path, chosen.ceiling, done.images)
    assert [file.name for file in files] == ["table.md", "ladder.png", "pictures.png"]
    text = files[0].read_text()
    assert "Phase 0 fails" in text, "two iterations cannot hold the ceiling"
    assert text.count("\n| ") == 1 + len(content["rows"])  # one seed: a line a cell, and the head


def test_a_cell_of_other_versions_says_so(tmp_path, monkeypatch):
    run_ladder(settings("phases=[0]"), tmp_path)
    monkeypatch.setattr(ladder_module, "versions", lambda: {"torch": "9.9"})
    run_ladder(settings("phases=[0]", "seeds=[0,1]"), tmp_path)
    content = json.loads((tmp_path / "rows.json").read_text())
    assert [row.get("versions") for row in content["rows"]] == [None, {"torch": "9.9"}]
    assert content["versions"]["torch"] != "9.9"


def test_pictures_are_of_the_seed_that_came_first(tmp_path):
    first = run_ladder(settings("phases=[0]", "seeds=[1]"), tmp_path).images
    assert len(first) == 1
    later = run_ladder(settings("phases=[0]", "seeds=[0,1]"), tmp_path).images
    assert torch.equal(later["0 full - -"], first["0 full - -"])


@needs_peft
def test_cells_without_their_images_leave_the_picture_of_all_alone(tmp_path, caplog):
    """Images are not published with the rows: whoever runs further cells has not got those of the others."""
    cli.run(config("phases=[0]", "seeds=[0]", f"out={tmp_path}"))
    (tmp_path / "images.pt").unlink()
    (tmp_path / "pictures.png").write_text("of all cells")
    cli.run(config("phases=[0,1]", "ranks=[1]", "starts=[zero]", "seeds=[0]", f"out={tmp_path}"))
    assert (tmp_path / "pictures.png").read_text() == "of all cells"
    assert "pictures.png is not drawn anew" in caplog.text


def test_two_processes_do_not_share_a_folder(tmp_path):
    with only_here(tmp_path), pytest.raises(ConfigError, match=r"out=.* is in use"):
        run_ladder(settings("phases=[0]"), tmp_path)
    assert not run_ladder(settings("phases=[0]"), tmp_path).missing()


@pytest.mark.parametrize("ending", ["Ctrl-C", "out of memory"])
def test_an_end_before_the_end_reports_and_is_no_success(tmp_path, monkeypatch, caplog, ending):
    real, ran = ladder_module.run_cell, []

    def ended(cell, *args):
        ran.append(cell)
        if len(ran) == 2:
            raise KeyboardInterrupt if ending == "Ctrl-C" else BreachingExtError("Memory ran out")
        return real(cell, *args)

    monkeypatch.setattr(ladder_module, "run_cell", ended)
    with pytest.raises(SystemExit) as end:
        cli._application.__wrapped__(config("phases=[0]", "seeds=[0,1,2]", f"out={tmp_path}"))
    assert end.value.code == (130 if ending == "Ctrl-C" else 1)
    assert (tmp_path / "table.md").exists()
    assert ("Memory ran out" in caplog.text) is (ending == "out of memory")


def test_an_attack_without_memory_is_not_taken_for_an_interruption(tmp_path, monkeypatch):
    real = JointCandidateAttacker.reconstruct

    def starved(self, *args, **kwargs):
        reconstruction, stats = real(self, *args, **kwargs)
        return reconstruction, {**stats, "interrupted": True, "out_of_memory": True}

    monkeypatch.setattr(JointCandidateAttacker, "reconstruct", starved)
    with pytest.raises(BreachingExtError, match="Memory ran out"):
        run_ladder(settings("phases=[0]"), tmp_path)


def test_the_interval_of_what_is_seen_counts_a_seed_once(monkeypatch):
    """It does not depend on the method, so more methods make it no narrower."""
    drawn = []
    monkeypatch.setattr(report, "_draw_line", lambda axis, rows, key, *rest: drawn.append((key, len(rows))))
    rows = [
        {"rank": 2, "seed": seed, "phase": phase, "method": method, "cosine_seen": 0.1 * seed, "cosine_full": 0.5}
        for seed in range(3)
        for phase, method in ((1, "match"), (1, "whiten"), (3, "match"))
    ]
    report._draw_cosines(None, rows, ["2"])
    assert dict(drawn)["cosine_seen"] == 3


def test_without_peft_nothing_is_computed_that_needs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(ladder_module, "run_cell", lambda *args: pytest.fail("a cell was run"))
    with pytest.raises(MissingPeftError, match=r"breaching-ext\[lora\]"):
        run_ladder(settings(), tmp_path)


def test_an_interrupted_attack_is_not_a_finished_cell(tmp_path, monkeypatch):
    """The attack returns its best so far on Ctrl-C; the ladder must run that cell again."""
    real = JointCandidateAttacker.reconstruct

    def interrupted(self, *args, **kwargs):
        reconstruction, stats = real(self, *args, **kwargs)
        return reconstruction, {**stats, "interrupted": True}

    monkeypatch.setattr(JointCandidateAttacker, "reconstruct", interrupted)
    chosen = settings("phases=[0]")
    assert run_ladder(chosen, tmp_path).missing() == plan(chosen)


@needs_peft
def test_cells_made_with_other_settings_are_not_mixed(tmp_path):
    run_ladder(settings("phases=[0]"), tmp_path)
    assert Ladder.open(tmp_path, settings("phases=[0]", "seeds=[0,1]")).missing()
    for override, key in (
        ("attack.optim.max_iterations=3", "attack"),
        ("local_lr=0.5", "local_lr"),
        ("model=vit", "model"),
    ):
        with pytest.raises(ConfigError, match=key):
            Ladder.open(tmp_path, settings("phases=[0]", override))


@needs_peft
@pytest.mark.parametrize(("phase", "method"), [(p, m) for p, methods in METHODS.items() for m in methods])
def test_what_each_attack_matches(phase, method, monkeypatch):
    """Phases 1 and 3 match A and B only; phases 0 and 2 the adapted layers' weights only."""
    asked = []
    real = JointCandidateAttacker.reconstruct

    def spy(self, payload, shared, *args, **kwargs):
        asked.append((self, shared))
        return real(self, payload, shared, *args, **kwargs)

    monkeypatch.setattr(JointCandidateAttacker, "reconstruct", spy)
    row, problem, _ = run_one(phase, method, 2, "random", "layers=[conv2,fc1]")
    ((attacker, shared),) = asked
    names = {name for name, p in attacker.model_template.named_parameters() if p.requires_grad}
    sides = ("lora_A.default.weight", "lora_B.default.weight") if method in ("match", "whiten") else ("weight",)
    assert names == {f"{layer}.{side}" for layer in problem.adapted_layers for side in sides}
    assert len(shared[0]["gradients"]) == len(names)
    assert (shared[0]["metadata"]["local_hyperparams"] is not None) is (phase == 3 and method == "match")
    assert row["gradient_evaluations"] == 2 * 2


@needs_peft
def test_what_the_decoders_and_the_control_know():
    """The learned rest is not the closed form's, and the control knows public photos only."""
    learned, problem, _ = run_one(2, "learned", 2, "random")
    closed, *_ = run_one(2, "closed", 2, "random")
    assert learned["decoder"]["public_cosine"] > learned["decoder"]["public_cosine_closed"]
    assert learned["cosine_decoded"] != pytest.approx(closed["cosine_decoded"], abs=1e-3)
    control, *_ = run_one(2, "public", "-", "-")
    stacks = problem.public_gradients[0]
    whole = torch.cat([stack.flatten(1) for stack in stacks.values()], dim=1)
    mean = (whole / whole.norm(dim=1, keepdim=True)).mean(dim=0)
    truth = torch.cat([problem.gradient[name].flatten() for name in stacks])
    assert control["cosine_decoded"] == pytest.approx(torch.cosine_similarity(mean, truth, dim=0).item())


def test_the_cosine_at_the_reconstruction_is_that_of_its_gradient():
    chosen = settings()
    problem = ladder_module.Case(chosen.model, chosen.layers, 0, chosen.batch, chosen.public)
    row, images = run_cell(Cell(chosen.model, 0, "full", "-", "-", 0), problem, chosen, CPU)
    mean, std = (torch.tensor(values, dtype=torch.double).view(-1, 1, 1) for values in (MEAN, STD))
    outputs = problem.model((images - mean) / std)
    named = dict(problem.model.named_parameters())
    weights = [named[f"{name}.weight"] for name in problem.gradient]
    found = torch.autograd.grad(torch.nn.functional.cross_entropy(outputs, problem.client.labels), weights)
    both = [torch.cat([g.flatten() for g in side]) for side in (found, problem.gradient.values())]
    assert row["cosine_full"] == pytest.approx(torch.cosine_similarity(*both, dim=0).item(), abs=1e-9)
    assert row["cosine_full"] < 0.999  # after two iterations


@needs_peft
@pytest.mark.parametrize("start", ["zero", "random"])
def test_at_full_rank_the_whitened_attack_is_the_attack_on_the_full_gradient(start):
    """In double precision, after ten iterations: the same path, not a similar one."""
    short = ("attack.optim.max_iterations=10", "layers=[conv2,fc2]")
    ceiling, *_ = run_one(0, "full", "-", "-", *short)
    whitened, *_ = run_one(1, "whiten", "full", start, *short)
    decoded, *_ = run_one(2, "closed", "full", start, *short)
    assert whitened["psnr"] == pytest.approx(ceiling["psnr"], abs=1e-6)
    assert decoded["psnr"] == pytest.approx(ceiling["psnr"], abs=1e-6)
    assert decoded["cosine_decoded"] >= 0.999999
    assert decoded["determined"] == ["conv2", "fc2"]


def test_the_seed_of_the_starts_is_that_of_the_case_and_the_attacks_own():
    """10,000 of them belong to each case: 0, then 10,000 times its seed, then what is added."""
    drawn = []
    for override in ("attack.restarts.num_trials=1", "attack.restarts.seed=7", "attack.restarts.seed=0"):
        chosen = settings("attack.optim.max_iterations=1", override)
        case = ladder_module.Case(chosen.model, chosen.layers, 1, chosen.batch, chosen.public)
        drawn.append(run_cell(Cell(chosen.model, 0, "full", "-", "-", 1), case, chosen, CPU)[1])
    plain, seven, zero = drawn
    assert torch.equal(plain, zero)
    assert not torch.equal(plain, seven)


@needs_peft
def test_seen_is_the_cosine_of_the_projection():
    row, problem, chosen = run_one(1, "match", 2, "zero")
    factors = problem.factors(2, "zero", chosen.scale)
    gradients = problem.gradient
    seen = [gradient - unseen(gradient, factors[name]) for name, gradient in gradients.items()]
    assert row["cosine_seen"] == pytest.approx(cosine(seen, list(gradients.values())))
    assert 0 < row["cosine_seen"] < 0.6


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model=resnet", ["model", "resnet", "conv"]),
        ("ranks=[1,0]", ["ranks=0", "full"]),
        ("ranks=[half]", ["ranks='half'", "full"]),
        ("ranks=[1.5]", ["ranks=1.5"]),
        ("ranks=[]", ["ranks=[]"]),
        ("seeds=[1,0,1]", ["seeds=[1, 0, 1]", "twice"]),
        ("phases=[0,4]", ["phases", "4", "0, 1, 2, 3"]),
        ("starts=[ones]", ["starts", "ones", "zero, random"]),
        ("layers=[conv1,conv7]", ["layers", "conv7", "conv1"]),
        ("local_steps=0", ["local_steps=0"]),
        ("local_lr=0", ["local_lr=0"]),
        ("scale=-1", ["scale=-1"]),
        ("scale=inf", ["scale=inf", "finite"]),
        ("scale=true", ["scale=True", "finite"]),
        ("phases=[0,1.0]", ["phases=1.0", "0, 1, 2, 3"]),
        ("layers=[conv1,conv1]", ["layers=['conv1', 'conv1']", "twice"]),
        ("local_lr=fast", ["local_lr='fast'", "finite"]),
        ("ceiling=nan", ["ceiling=nan", "finite"]),
        ("seeds=[0,1.5]", ["seeds=1.5"]),
        ("batch=0", ["batch=0"]),
        ("public=2", ["public=2"]),
        ("attack.attack_type=magia", ["attack_type", "magia", "joint-candidates"]),
        ("attack.restarts.num_trials=0", ["restarts.num_trials=0"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line(override, words):
    with pytest.raises(ConfigError) as caught:
        settings(override)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_public_batch_has_room_on_its_side_of_the_split():
    with pytest.raises(ConfigError, match=r"public=12 .*batch=8; valid: a multiple of 16"):
        settings("public=12", "batch=8")
    settings("public=16", "batch=8")
    with pytest.raises(ConfigError, match="fewer than two photos"):
        settings("public=9", "batch=1")  # a decoder is chosen by what it makes of those held out
    settings("public=10", "batch=2")


def test_the_table_pairs_seeds_and_says_when_the_ceiling_fails():
    def row(phase, method, rank, start, seed, psnr):
        cosines = {"cosine_seen": 0.5, "cosine_matched": 1.0, "cosine_full": 0.9}
        return {
            "model": "conv", "phase": phase, "method": method, "rank": rank, "start": start, "seed": seed,
            "psnr": psnr, "ssim": 0.5, **cosines,
        }  # fmt: skip

    rows = [row(0, "full", "-", "-", seed, 30.0 + seed) for seed in range(3)]
    rows += [row(1, "match", rank, "zero", seed, 29.0 + seed) for rank in ("full", 16, 2) for seed in range(3)]
    lines = table(rows, ceiling=20).splitlines()
    assert "Phase 0 holds (31.00 ± 2.48 dB" in lines[0]
    assert [line.split("|")[3].strip() for line in lines[4:]] == ["-", "2", "16", "full"]
    assert all("-1.00 ± 0.00" in line for line in lines[5:])
    assert "Phase 0 fails" in table(rows, ceiling=40)


@needs_peft
def test_the_command(root, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(root / "examples" / "lora_ladder.py"), f"out={tmp_path}", "public=16", "seeds=[0]"]
    quick = ["phases=[0,1]", "ranks=[1]", "starts=[zero]", "attack.optim.max_iterations=2"]
    done = subprocess.run([*command, *quick], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "Phase 0 fails on conv" in done.stderr
    assert {"rows.json", "table.md", "ladder.png"} <= {path.name for path in tmp_path.iterdir()}


def test_the_command_ends_with_one_line_for_bad_input(caplog):
    with pytest.raises(SystemExit) as caught:
        cli._application.__wrapped__(config("ranks=[0]"))
    assert caught.value.code == 1
    assert caplog.messages[-1].startswith("ranks=0 is not possible")
    with pytest.raises(ConfigError, match="out=None is not possible; valid: a folder"):
        cli.run(config("out=null"))


def test_one_layer_is_a_list_of_one():
    assert settings("layers=conv1").layers == ("conv1",)


def test_a_report_without_any_rank_has_a_table(tmp_path):
    """Ctrl-C after the control of phase 2, before its first adapter."""
    cosines = {"cosine_seen": 0.5, "cosine_matched": 1.0, "cosine_full": 0.9, "cosine_decoded": 0.4, "ssim": 0.5}
    rows = [
        {
            "model": "conv",
            "phase": phase,
            "method": method,
            "rank": "-",
            "start": "-",
            "seed": 0,
            "psnr": 20.0,
            **cosines,
        }
        for phase, method in RANKLESS
    ]
    assert [path.name for path in write_report(rows, tmp_path, 20.0, {})] == ["table.md"]
