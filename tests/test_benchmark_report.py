"""What benchmarks/matching.py says about its rows: ratios of medians, their intervals, and `auto` against the best."""

from __future__ import annotations

import json
import sys

import pytest


@pytest.fixture
def report(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import matching_report

    yield matching_report
    sys.modules.pop("matching_report")


def row(**auto):
    ms = {"breaching": 8.0, "list": 8.0, "vmap": 2.0, "compile": 1.0}
    calibration = {"compile_seconds": 40.0}
    return {
        "candidates": 2,
        "ms": ms,
        "ms_all": {name: [value] * 7 for name, value in ms.items()},
        "setup_seconds": {"list": 0.0, "vmap": 1.0, "compile": 30.0},
        "auto": {"engine": "vmap", "seconds": 1.5, "calibration": calibration, **auto},
    }


def test_auto_against_the_best(report):
    assert report.totals(row())["vmap"] == 1.0 + 2000 * 2 * 2.0 / 1000
    assert report.auto_share(row()) == pytest.approx(9.0 / 9.5)
    # compiled and kept: with the row's own 30 s of compiling, not with the 40 s that it took at another moment
    assert report.auto_share(row(engine="compile", seconds=42.0)) == pytest.approx(9.0 / (2.0 + 30.0 + 4.0))
    # compiled for nothing: whole
    assert report.auto_share(row(engine="vmap", seconds=42.0)) == pytest.approx(9.0 / (42.0 + 8.0))


def test_auto_without_the_times_of_what_it_took(report):
    untimed = row(engine="list")
    del untimed["ms"]["list"]
    assert report._with_interval(untimed, report.auto_share) == "-"


def test_an_interval_holds_the_ratio_and_is_as_wide_as_the_rounds_differ(report):
    figure = report.speedup("vmap")
    assert report.interval(row(), figure) == (4.0, 4.0)
    noisy = row()
    noisy["ms_all"]["vmap"] = [1.6, 1.8, 1.9, 2.0, 2.2, 2.5, 4.0]
    low, high = report.interval(noisy, figure)
    assert 2.0 < low < 4.0 < high <= 5.0
    together = row()  # a slow moment of the machine slows both down: the ratio does not change
    for name in ("breaching", "vmap"):
        together["ms_all"][name] = [together["ms"][name] * slow for slow in (1, 1, 2, 1, 3, 1, 1)]
    assert report.interval(together, figure) == (4.0, 4.0)


def test_too_few_rounds_have_no_interval(report):
    few = row()
    few["ms_all"]["breaching"] = [8.0] * 4
    assert report.interval(few, report.speedup("vmap")) is None


@pytest.mark.parametrize("folder", ["matching", "matching-avx2"])
def test_the_committed_tables_are_drawn_from_the_committed_results(report, root, folder):
    where = root / "benchmarks" / "results" / folder
    content = json.loads((where / "results.json").read_text(encoding="utf-8"))
    assert content["rows"]
    assert report.table(report.load_rows(where)) + "\n" == (where / "table.md").read_text(encoding="utf-8")
