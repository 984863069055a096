"""A sweep's metrics become one CSV, one table and one plot; failures are rows."""

from __future__ import annotations

import csv
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from breaching_ext.collect import collect, groups, independent, main, table
from breaching_ext.intervals import mean_interval, plus_minus
from breaching_ext.run_rows import read_runs


def make_run(folder, overrides=(), **content):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {o}\n" for o in overrides))
    if content:
        (folder / "metrics.json").write_text(json.dumps(content))


def finished(psnr, seed, **more):
    base = {"attack": "joint", "case": "photos", "model": "cnn6", "num_data_points": 2, "ssim": 0.5, "lpips": None}
    base |= {"seconds": 3.0, "label_acc": 1.0, "engine": "vmap", "per_image": {"psnr": [psnr - 1, psnr + 1]}}
    return {**base, "psnr": psnr, "seed": seed, **more}


@pytest.fixture
def sweep(tmp_path):
    make_run(tmp_path / "0", ["seed=0", "case.user.user_idx=3"], **finished(20.0, 0))
    make_run(tmp_path / "1", ["seed=1"], **finished(22.0, 1))
    make_run(tmp_path / "2", ["seed=0", "attack.optim.signed=soft"], **finished(25.0, 0))
    make_run(tmp_path / "3", ["seed=1"], error="ConfigError: no", seed=1)
    make_run(tmp_path / "4", ["seed=2"])
    make_run(tmp_path / "5")
    (tmp_path / "5" / "metrics.json").write_text("{half")
    return tmp_path


def test_every_run_is_a_row_and_failures_say_why(sweep):
    rows = collect(sweep)
    with (sweep / "runs.csv").open() as file:
        assert [r["folder"] for r in csv.DictReader(file)] == ["0", "1", "2", "3", "4", "5"]
    errors = [row["error"] for row in rows]
    assert errors[:3] == [None] * 3
    assert errors[3] == "ConfigError: no"
    assert "killed" in errors[4]
    assert "damaged" in errors[5]
    assert rows[0]["worst_psnr"] == 19.0
    assert (sweep / "psnr.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"attack": "a", "psnr": ' + b"9" * 6000 + b"}",
        json.dumps(finished(1.0, 0, per_image=None)).encode(),
        json.dumps(finished(1.0, 0, per_image={"psnr": [None, 1.0]})).encode(),
        json.dumps({**finished(1.0, 0), "psnr": "twenty"}).encode(),
        json.dumps(finished(1.0, 0, config="text")).encode(),
        json.dumps({**finished(1.0, 0), "psnr": math.nan}).encode(),
        json.dumps(finished(1.0, 0, per_image={"psnr": ["one"]})).encode(),
        json.dumps(finished(1.0, 0, ssim="good")).encode(),
        json.dumps(finished(True, 0)).encode(),
        json.dumps(finished(1.0, [0])).encode(),
        json.dumps(finished(1.0, 0, config={"attack": {"restarts": {"seed": {"a": 1}}}})).encode(),
        None,  # a folder
    ],
    ids=[
        *("bytes", "deep", "long", "no images", "an image", "text", "config", "nan"),
        *("image text", "ssim", "switch", "seeds", "candidate seed", "folder"),
    ],
)
def test_a_damaged_file_is_a_row_and_the_others_count(sweep, content):
    make_run(sweep / "6")
    if content is None:
        (sweep / "6" / "metrics.json").mkdir()
    else:
        (sweep / "6" / "metrics.json").write_bytes(content)
    *others, damaged = collect(sweep)
    assert damaged["folder"] == "6"
    assert "damaged" in damaged["error"] or "not finite" in damaged["error"]
    assert [row["psnr"] for row in others[:3]] == [20.0, 22.0, 25.0]
    assert (sweep / "runs.csv").exists()


@pytest.mark.parametrize("content", [b"", b"hydra:\n  run:", b"\xff\xfe"])
def test_a_run_that_was_killed_while_hydra_began_is_a_row(tmp_path, content):
    make_run(tmp_path / "0", ["seed=0"], **finished(20.0, 0))
    make_run(tmp_path / "1")
    (tmp_path / "1" / ".hydra" / "hydra.yaml").write_bytes(content)
    (tmp_path / "1" / ".hydra" / "overrides.yaml").write_bytes(b"\xff\xfe")
    assert "killed" in collect(tmp_path)[1]["error"]


def test_names_stay_in_their_cell_of_the_table_and_are_no_formulas_in_the_plot(tmp_path):
    make_run(tmp_path / "0", **finished(20.0, 0, model="$m_{x|y", overrides=["case.model=$m_{x|y"]))
    make_run(tmp_path / "1", error="first\nsecond", seed=1)
    make_run(tmp_path / "2", error=None, attack="joint", seed=2)
    rows = collect(tmp_path)
    assert [row["error"] for row in rows] == [None, "first second", "None"]
    (line,) = [line for line in table(rows).splitlines() if "photos" in line]
    assert r"$m_{x\|y" in line
    assert len(re.split(r"(?<!\\)\|", line)) == 8 + 2


def test_a_folder_that_cannot_be_written(sweep, capsys):
    (sweep / "table.md").mkdir()
    assert main([str(sweep)]) == 1
    said = capsys.readouterr().err.strip()
    assert "could not be written" in said
    assert "\n" not in said


def test_repeats_do_not_count_and_values_that_are_not_finite_are_failures(tmp_path):
    for folder, psnr in (("0", 20.0), ("1", 20.5)):  # the same command twice
        make_run(tmp_path / folder, ["seed=0"], **finished(psnr, 0))
    make_run(tmp_path / "2", ["seed=1"], **{**finished(1.0, 1), "psnr": None, "per_image": {"psnr": [None, 1.0]}})
    rows = collect(tmp_path)
    (members,) = groups(rows).values()
    assert [row["psnr"] for row in members] == [20.5]
    text = table(rows)
    assert "1 runs repeat another" in text
    assert "- 2: its PSNR is not finite" in text


def test_studies_in_the_same_folder_are_no_failed_runs(sweep):
    """A study's Hydra folder has no metrics.json; its program is another."""
    for name, program in (("study", "optimizer_study"), ("own", "breaching_ext")):
        make_run(sweep / name)
        (sweep / name / ".hydra" / "hydra.yaml").write_text(f"hydra:\n  job:\n    config_name: {program}\n")
    assert [row["folder"] for row in read_runs(sweep)] == ["0", "1", "2", "3", "4", "5", "own"]


def test_interrupted_runs_count_as_failed_and_other_programs_files_not_at_all(sweep):
    before = groups(read_runs(sweep))
    make_run(sweep / "6", ["seed=2"], **finished(5.0, 2), interrupted=True)
    make_run(sweep / "7", ["seed=3"], **finished(21.0, 3), interrupted=False)
    make_run(sweep / "8", psnr_of_something_else=3)
    rows = collect(sweep)
    assert [row["folder"] for row in rows] == ["0", "1", "2", "3", "4", "5", "6", "7"]
    assert "interrupted" in rows[6]["error"]
    assert sum(map(len, groups(rows).values())) == sum(map(len, before.values())) + 1
    assert "4 of 8 runs failed or were interrupted" in table(rows)


def test_runs_that_differ_in_seed_and_client_form_a_group(sweep):
    found = groups(read_runs(sweep))
    assert sorted(len(members) for members in found.values()) == [1, 2]
    text = table(read_runs(sweep))
    assert "21.00 ± 12.71" in text  # t(0.975, 1) * sqrt(2) / sqrt(2)
    assert "3 of 6 runs failed" in text


def test_crossed_seeds_and_clients_are_not_taken_for_independent(tmp_path):
    """Three seeds of two clients that differ: two clients are two draws, not six."""
    values = {(seed, client): 20.0 + 5 * client + 0.1 * seed for seed in (0, 1, 2) for client in (0, 1)}
    for index, ((seed, client), psnr) in enumerate(values.items()):
        make_run(tmp_path / str(index), [f"seed={seed}"], **finished(psnr, seed, user_idx=client))
    (members,) = groups(read_runs(tmp_path)).values()
    assert independent(members, "psnr") == pytest.approx([20.1, 25.1])
    assert f"{22.6:.2f} ± {12.7062 * 2.5:.2f}" in table(read_runs(tmp_path))


def test_another_client_for_every_seed_is_another_draw(tmp_path):
    for seed in range(3):
        make_run(tmp_path / str(seed), [f"seed={seed}"], **finished(20.0 + seed, seed, user_idx=seed))
    (members,) = groups(read_runs(tmp_path)).values()
    assert independent(members, "psnr") == [20.0, 21.0, 22.0]


def settings(iterations=100, seed=0, name="a"):
    attack = {"optim": {"max_iterations": iterations}, "restarts": {"seed": None}, "impl": {"progress": "auto"}}
    return {"seed": seed, "name": name, "case": {"user": {"user_idx": 0}}, "attack": attack}


def test_groups_go_by_what_the_runs_recorded(tmp_path):
    """Runs without Hydra's overrides, and overrides that change nothing."""
    make_run(tmp_path / "0", **finished(20.0, 0, config=settings()))
    make_run(tmp_path / "1", **finished(21.0, 1, config=settings(seed=1)))
    make_run(tmp_path / "2", **finished(25.0, 0, config=settings(iterations=200)))
    words = ["+launch=joblib", "++seed=2", "name=b", "hydra.launcher.n_jobs=4"]
    older = settings()
    older["attack"]["impl"]["memory_budget"] = None  # a key that newer runs have, and that is empty
    make_run(tmp_path / "4", **finished(23.0, 3, config=older))
    make_run(tmp_path / "3", words, **finished(22.0, 2, config=settings(seed=2, name="b")))
    found = groups(read_runs(tmp_path))
    assert sorted([row["psnr"] for row in members] for members in found.values()) == [[20.0, 21.0, 22.0, 23.0], [25.0]]
    marks = sorted(name.split(" [")[1] for name in found)
    assert marks == [f"attack.optim.max_iterations={n}]" for n in (100, 200)]
    collect(tmp_path)
    with (tmp_path / "runs.csv").open() as file:
        assert "settings" not in next(csv.DictReader(file))


def test_the_command(sweep, capsys, tmp_path):
    assert main([str(sweep)]) == 0
    assert "runs.csv" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 1


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
def test_interval_is_scipys(values):
    mean, half = mean_interval(values)
    assert mean == pytest.approx(sum(values) / len(values), abs=1e-9)
    error = stats.sem(values)
    if error > 1e-9:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error)
        assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-6, abs=1e-9)


def test_one_value_has_no_interval():
    assert math.isnan(mean_interval([3.0])[1])
    assert plus_minus([3.0]) == "3.00"
    with pytest.raises(ValueError, match="No values"):
        mean_interval([])


def test_metrics_keep_the_overrides_that_they_were_made_with(tmp_path):
    """A later run in that folder, killed or still going on, has replaced Hydra's file."""
    folder, record = tmp_path / "long", finished(20.0, 0, overrides=["seed=0", "attack=magia"])
    make_run(folder, ["seed=1", "attack.optim.max_iterations=5000"])
    (folder / "metrics.json").write_text(json.dumps(record))
    (row,) = read_runs(tmp_path)
    assert row["overrides"] == "attack=magia"
