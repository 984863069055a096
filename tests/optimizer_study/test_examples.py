"""The examples in docstrings do what they say, and the example script runs."""

import doctest
import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def load(path, monkeypatch):
    """A script as a module."""
    name = f"{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["breaching_ext.optimizer_study", "breaching_ext.optimizer_study.variants"])
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    example = load(ROOT / "examples" / "optimizer_study.py", monkeypatch)
    images = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(example, "load_fashion_mnist", lambda *args, **kwargs: (images, images[:16]))
    monkeypatch.setattr(sys, "argv", ["example", "--quick", "--out", str(tmp_path)])
    example.main()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A1.json", "B3.json", "heatmaps.png"]
    printed = capsys.readouterr().out
    assert "A1 Adam + L2: best final test loss" in printed


def test_the_benchmarks_table_says_where_the_ratio_misses_what_was_asked(monkeypatch):
    """0.948 is not 0.95, and the table that is kept is that of the figures that are kept."""
    benchmark = load(ROOT / "benchmarks" / "optimizer_study.py", monkeypatch)
    kept = benchmark.RESULTS / "cpu.json"
    rows = json.loads(kept.read_text())["rows"]
    table = benchmark.table(rows)
    assert table == kept.with_suffix(".md").read_text()
    assert [row["case"] for row in rows if row["ratio"][0] < row["target"]] == ["autoencoder-adamw"]
    assert [line.split("|")[1].strip() for line in table.splitlines() if "missed" in line] == ["autoencoder-adamw"]
    assert "0.948" in table
