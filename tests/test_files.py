"""Files are whole or absent, and as private as the user asks."""

from __future__ import annotations

import json
import os
import stat

import pytest

from breaching_ext import cli
from breaching_ext.files import write_atomically, write_json
from breaching_ext.run_rows import read_runs


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644)])
def test_a_file_has_the_mode_that_the_umask_asks_for(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path = write_json(tmp_path / "new" / "a.json", {"x": float("nan")})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert json.loads(path.read_text()) == {"x": None}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_json(tmp_path / "a.json", 1)

    def half(target):
        target.write_text("2")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert json.loads(path.read_text()) == 1


def test_a_failure_does_not_replace_the_metrics_of_a_finished_run(tmp_path):
    path = tmp_path / "metrics.json"
    for _ in range(2):  # a failure replaces a failure
        cli._note_failure(tmp_path, ValueError("no"), 3)
        assert json.loads(path.read_text()) == {"error": "ValueError: no", "seed": 3, "overrides": []}
    path.write_text("{half")
    cli._note_failure(tmp_path, ValueError("again"), 3)
    assert json.loads(path.read_text())["error"] == "ValueError: again"
    assert [row["error"] for row in read_runs(tmp_path)] == ["ValueError: again"]
    write_json(path, {"psnr": 20.0})
    cli._note_failure(tmp_path, ValueError("later"), 3)
    assert json.loads(path.read_text()) == {"psnr": 20.0}
    assert [row["error"] for row in read_runs(tmp_path)] == ["ValueError: later"]  # its overrides are the later run's
