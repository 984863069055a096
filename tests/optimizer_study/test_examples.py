"""The examples in docstrings do what they say, and the example script runs."""

import doctest
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "optimizer_study.py"


@pytest.mark.parametrize("name", ["breaching_ext.optimizer_study", "breaching_ext.optimizer_study.variants"])
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("example_optimizer_study", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    images = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(example, "load_fashion_mnist", lambda *args, **kwargs: (images, images[:16]))
    monkeypatch.setattr(sys, "argv", ["example", "--quick", "--out", str(tmp_path)])
    example.main()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A1.json", "B3.json", "heatmaps.png"]
    printed = capsys.readouterr().out
    assert "A1 Adam + L2: best test loss" in printed
