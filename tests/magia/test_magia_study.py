"""The study does not take runs of another method for its own, nor lose them to its report."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "magia_study.py"
PUBLISHED = SCRIPT.parent / "results" / "magia"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)  # as for a script
    spec = importlib.util.spec_from_file_location("magia_study", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "magia_study", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "make", lambda *args: pytest.fail("made a run"))
    return module


def call(study, monkeypatch, *options: str):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    study.main()


def a_run(out: Path, **changes) -> Path:
    (out / "runs").mkdir(parents=True)
    source = PUBLISHED / "runs" / "default-adam_B16_60x20_seed0.json"
    record = json.loads(source.read_text()) | changes
    path = out / "runs" / source.name.replace("B16", f"B{record['batch']}")
    path.write_text(json.dumps(record))
    return path


@pytest.mark.parametrize("change", ["method", "labels", "classes"])
def test_a_run_of_another_method_is_refused(study, monkeypatch, tmp_path, capsys, change):
    options = ("--only", "default-adam", "--batch", "16", "--outer", "60", "--seeds", "1", "--out", str(tmp_path))
    path = a_run(tmp_path)
    call(study, monkeypatch, *options)  # it is there
    record = json.loads(path.read_text())
    if change == "method":
        record["method"]["annealing"]["last"] = 0.5
    else:
        record[change] = {"labels": "photo", "classes": 8}[change]
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        call(study, monkeypatch, *options)
    assert f"{path} was made with" in capsys.readouterr().err
    call(study, monkeypatch, *options, "--report")
    assert ("made with annealing.last=0.5" in (tmp_path / "table.md").read_text()) is (change == "method")


def test_a_batch_size_of_ones_own_has_a_report(study, monkeypatch, tmp_path):
    a_run(tmp_path, batch=2)
    call(study, monkeypatch, "--only", "default-adam", "--batch", "2", "--outer", "60", "--seeds", "1", "--report",
         "--out", str(tmp_path))  # fmt: skip
    assert (tmp_path / "table.md").exists()
    assert (tmp_path / "length.png").exists()


def test_a_method_that_does_not_exist_is_named(study, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="magic is unknown; valid: "):
        call(study, monkeypatch, "--only", "magic", "--out", str(tmp_path))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([[3.0, 1.0]], False), ([[3.0, None]], True), ([[3.0, 1.0], [3.0, 1e21]], True), ([[2.0]], False)],
)
def test_a_run_that_ends_above_its_start_has_diverged(study, losses, expected):
    assert sys.modules["magia_report"].diverged(losses) is expected


def test_every_seed_has_a_budget_of_its_own(study, monkeypatch, tmp_path):
    """A stack shares one: what a seed that ends early leaves goes to the others."""
    made = []
    monkeypatch.setattr(study, "make", lambda run, seeds, *_: made.append(seeds))
    with pytest.raises(SystemExit, match="nothing to report"):
        call(study, monkeypatch, "--only", "default", "--batch", "4", "--outer", "60", "--out", str(tmp_path))
    assert made == [(0,), (1,), (2,), (3,), (4,)]
