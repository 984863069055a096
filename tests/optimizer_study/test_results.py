"""The coupling number, the records, the files and the figures."""

import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy import stats

from breaching_ext.optimizer_study import LR_MULTIPLIERS, WD_MULTIPLIERS
from breaching_ext.optimizer_study.coupling import coupling, crossing
from breaching_ext.optimizer_study.figures import best_cells, draw_heatmap, save_sheet
from breaching_ext.optimizer_study.records import GridSearchResult, OptimizerExperiment
from breaching_ext.optimizer_study.storage import read_json, write_atomically, write_json
from breaching_ext.optimizer_study.summary import merge_seeds, summarize, write_tables
from breaching_ext.optimizer_study.training_log import TrainingLog

LAYOUT = [
    "lr_multiplier",
    "wd_multiplier",
    "learning_rate",
    "weight_decay",
    "final_train_loss",
    "final_test_loss",
    "best_test_loss",
    "best_epoch",
    "epoch_train_losses",
    "epoch_test_losses",
    "runtime_seconds",
]


def make_experiment(loss, lrs=LR_MULTIPLIERS, wds=WD_MULTIPLIERS, seed=42, variant="B3"):
    """An experiment whose final test loss is a function of the multipliers."""
    results = [
        GridSearchResult(lr, wd, 1e-3 * lr, 1e-3 * wd, TrainingLog([1.0, 0.5], [0.9, loss(lr, wd)], [0.1, 0.1], 0.2))
        for lr in lrs
        for wd in wds
    ]
    config = {
        "seed": seed,
        "optimizer": {"lr": 1e-3, "weight_decay": 1e-3, "decay": "schedule"},
        "schedule": {"name": "cosine", "epochs": 2},
        "wall_seconds": 3.0,
        "device": "cpu",
        "versions": {},
    }
    return OptimizerExperiment(variant, "AdamW", config, results)


@settings(deadline=None, max_examples=30)
@given(slope=st.floats(-1.0, 1.0), offset=st.floats(-1.0, 1.0), base=st.floats(0.01, 10.0))
def test_the_coupling_number_is_the_slope_that_was_put_in(slope, offset, base):
    """Where harm is a power of wd / lr^s, lines of equal harm have slope s."""

    def loss(lr, wd):
        return base * 1.25 ** (wd / (2.0**offset * lr**slope)) if wd else base

    found = coupling(make_experiment(loss, lrs=[0.25, 0.5, 1.0, 2.0], wds=[0.0, *2.0 ** np.arange(-6, 7, 0.25)]))
    assert len(found.lr_multipliers) == 4
    assert found.slope == pytest.approx(slope, abs=0.02)
    assert found.standard_error < 0.02


def test_slope_and_error_are_those_of_scipy():
    rng = np.random.default_rng(0)
    at = {lr: 2.0 ** rng.normal() for lr in LR_MULTIPLIERS}
    found = coupling(make_experiment(lambda lr, wd: 2.0 if wd > at[lr] else 1.0))
    want = stats.linregress(np.log2(found.lr_multipliers), np.log2(found.wd_multipliers))
    assert found.slope == pytest.approx(want.slope)
    assert found.standard_error == pytest.approx(want.stderr)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        ([1.0, 1.0, 1.5625], math.sqrt(2 * 4)),  # 1.25 lies halfway to 1.25² in the logarithm
        ([1.0, 1.25, 2.0], 2.0),
        ([1.3, 1.4, 2.0], None),  # above the level from the first point on
        ([1.0, 1.1, 1.2], None),  # never reached
        ([1.0, 1.0, math.nan], 4.0),  # a diverged cell is harm
        ([], None),
    ],
)
def test_crossings(harm, expected):
    assert crossing([1.0, 2.0, 4.0][: len(harm)], harm, 1.25) == (expected and pytest.approx(expected))


def test_too_few_rows_give_no_number():
    found = coupling(make_experiment(lambda lr, wd: 2.0 if wd > 1 and lr >= 1 else 1.0))
    assert len(found.lr_multipliers) == 2
    assert math.isnan(found.slope)
    assert found.rows == 12


def test_coupling_needs_a_column_without_decay():
    with pytest.raises(ValueError, match="wd_multipliers"):
        coupling(make_experiment(lambda lr, wd: 1.0, wds=[1.0, 2.0]))
    with pytest.raises(ValueError, match="ratio"):
        coupling(make_experiment(lambda lr, wd: 1.0), ratio=1.0)


def test_heatmap_data_is_laid_out_by_rate_and_decay():
    data, lrs, wds = make_experiment(lambda lr, wd: lr + 100 * wd, lrs=[2.0, 1.0], wds=[4.0, 0.0]).get_heatmap_data()
    assert (lrs, wds) == ([1.0, 2.0], [0.0, 4.0])
    assert data.tolist() == [[1.0, 401.0], [2.0, 402.0]]


def test_files_have_the_layout_and_survive_a_round_trip(tmp_path):
    experiment = make_experiment(lambda lr, wd: math.nan if lr == 2 else lr)
    values = read_json(experiment.save(tmp_path / "b3.json"))
    assert list(values) == ["optimizer_id", "optimizer_name", "config", "results"]
    assert all(list(result) == LAYOUT for result in values["results"])
    assert len(values["config"]["diverged"]) == 12
    diverged = [r for r in values["results"] if r["lr_multiplier"] == 2]
    assert all(r["final_test_loss"] is None and r["best_test_loss"] == 0.9 and r["best_epoch"] == 1 for r in diverged)
    loaded = OptimizerExperiment.load(tmp_path / "b3.json")
    assert loaded.to_dict() == experiment.to_dict()
    np.testing.assert_array_equal(loaded.get_heatmap_data()[0], experiment.get_heatmap_data()[0])


def test_saving_touches_no_other_file(tmp_path):
    """Not one beside a new experiment, nor that of an experiment whose name has a dot."""
    (tmp_path / "mine.npz").write_text("somebody's")
    plain, logged = make_experiment(lambda lr, wd: lr), make_experiment(lambda lr, wd: lr)
    for result in logged.results:
        result.log.step_losses = [0.1]
    plain.save(tmp_path / "mine.json")
    assert (tmp_path / "mine.npz").read_text() == "somebody's"
    logged.save(tmp_path / "B1_lr0.1")
    plain.save(tmp_path / "B1_lr0.2")
    assert OptimizerExperiment.load(tmp_path / "B1_lr0.1").results[0].log.step_losses
    assert not OptimizerExperiment.load(tmp_path / "B1_lr0.2").results[0].log.step_losses
    plain.save(tmp_path / "B1_lr0.1")
    assert not OptimizerExperiment.load(tmp_path / "B1_lr0.1").results[0].log.step_losses


def test_other_files_are_refused(tmp_path):
    path = write_json(tmp_path / "other.json", {"a": 1})
    with pytest.raises(ValueError, match="not a saved experiment"):
        OptimizerExperiment.load(path)


def test_best_epoch_and_divergence():
    log = TrainingLog([1.0, 1.0, math.nan], [0.5, 0.2, math.nan])
    assert (log.best_epoch, log.best_test_loss, log.diverged_epoch) == (2, 0.2, 3)
    assert math.isnan(log.final_test_loss)
    assert TrainingLog().best_epoch is None


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = write_json(tmp_path / "a.json", [1])

    def fail(file):
        file.write(b"[2")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert json.loads(path.read_text()) == [1]
    assert os.listdir(tmp_path) == ["a.json"]


@settings(deadline=None, max_examples=20)
@given(values=st.lists(st.one_of(st.floats(allow_nan=False), st.just(math.nan)), min_size=1, max_size=12))
def test_losses_survive_json(values):
    experiment = make_experiment(lambda lr, wd: 1.0, lrs=[1.0], wds=[0.0])
    experiment.results[0].log = TrainingLog(values, values)
    with tempfile.TemporaryDirectory() as folder:
        loaded = OptimizerExperiment.load(experiment.save(Path(folder) / "x.json"))
    finite = [value if math.isfinite(value) else math.nan for value in values]
    np.testing.assert_array_equal(loaded.results[0].log.epoch_test_losses, finite)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), min_size=12, max_size=12))
def test_the_best_cells_are_the_smallest(values):
    data = np.array(values).reshape(3, 4)
    rows, columns = best_cells(data, 5)
    chosen = sorted(data[rows, columns])
    assert chosen == sorted(v for v in values if math.isfinite(v))[:5]


def test_heatmap_has_ticks_circles_and_a_place_for_no_decay():
    experiment = make_experiment(lambda lr, wd: abs(math.log2(lr)) + wd + 0.1)
    ax = experiment.plot_heatmap(title="a title")
    assert ax.get_title() == "a title"
    assert [t.get_text() for t in ax.get_xticklabels()][:3] == ["0", "1/32", "1/16"]
    assert [t.get_text() for t in ax.get_yticklabels()][::11] == ["1/1024", "2"]
    circles = ax.collections[0].get_offsets()
    assert len(circles) == 10
    assert (0.0, 10.0) in {tuple(c) for c in circles.tolist()}  # lr × 1, no decay


def test_heatmaps_take_an_axes_and_diverged_grids():
    ax = Figure().add_subplot()
    assert draw_heatmap(make_experiment(lambda lr, wd: math.nan), ax) is ax
    assert len(ax.collections[0].get_offsets()) == 0


@pytest.mark.parametrize(("count", "suffix"), [(1, "png"), (7, "svg")])
def test_sheets_are_written(tmp_path, count, suffix):
    experiments = [make_experiment(lambda lr, wd: lr + wd + 0.1, [0.5, 1.0], [0.0, 1.0]) for _ in range(count)]
    path = save_sheet(experiments, tmp_path / f"sheet.{suffix}")
    assert path.stat().st_size > 1000
    assert os.listdir(tmp_path) == [path.name]


def test_seeds_are_averaged_and_summarized(tmp_path):
    """Losses are means over seeds, a cell that diverged once is diverged, and slopes get an interval."""

    def harm(slope):
        return lambda lr, wd: math.nan if (slope, lr, wd) == (0.5, 2.0, 0.0) else 1.25 ** (wd / lr**slope)

    group = [make_experiment(harm(s), [0.25, 0.5, 1.0, 2.0], WD_MULTIPLIERS, seed) for seed, s in enumerate((0.3, 0.5))]
    merged = merge_seeds(group)
    cell = {r.cell: r.log.final_test_loss for r in merged.results}
    assert cell[1.0, 4.0] == pytest.approx(1.25**4)
    assert math.isnan(cell[2.0, 0.0])
    row = summarize(group)
    slopes = [coupling(e).slope for e in group]
    assert row["coupling_by_seed"] == slopes
    assert row["coupling"] == pytest.approx(np.mean(slopes))
    low, high = stats.t.interval(0.95, 1, np.mean(slopes), stats.sem(slopes))
    assert row["coupling_half_width"] == pytest.approx((high - low) / 2)
    assert row["diverged_cells"] == 1
    table, summary = write_tables([row], tmp_path)
    assert "| B3 AdamW |" in table.read_text()
    assert read_json(summary)[0]["seeds"] == [0, 1]


def test_different_grids_are_not_averaged():
    a = make_experiment(lambda lr, wd: 1.0, [1.0], [0.0, 1.0])
    b = make_experiment(lambda lr, wd: 1.0, [1.0], [0.0, 2.0])
    with pytest.raises(ValueError, match="same variant and grid"):
        merge_seeds([a, b])


def test_seeds_of_other_settings_are_not_averaged():
    runs = [make_experiment(lambda lr, wd: lr + wd, seed=seed) for seed in (42, 43)]
    for run, decay in zip(runs, ("schedule", "lr"), strict=True):
        run.config["study"] = {"seed": run.config["seed"], "device": "cpu", "settings": {"decay": decay}}
    with pytest.raises(ValueError, match="other settings"):
        merge_seeds(runs)
    runs[1].config["study"] = {**runs[0].config["study"], "seed": 43, "device": "cuda"}
    merge_seeds(runs)


def test_a_copy_of_a_run_is_no_second_seed():
    run = make_experiment(lambda lr, wd: lr + wd)
    with pytest.raises(ValueError, match="one run of each seed"):
        merge_seeds([run, run])


def test_grids_without_a_study_are_compared_by_their_settings():
    runs = [make_experiment(lambda lr, wd: lr + wd, seed=seed) for seed in (42, 43)]
    runs[1].config["optimizer"] = {**runs[1].config["optimizer"], "decay": "lr"}
    with pytest.raises(ValueError, match="other optimizer"):
        merge_seeds(runs)


def test_seeds_with_other_columns_beyond_the_grid_do_not_share_an_interval(caplog):
    def harm(lr, wd):
        return 1.02 ** (wd / lr)

    runs = [make_experiment(harm, [0.25, 0.5, 1.0, 2.0], [0.0, 1.0, 2.0, 4.0], seed) for seed in (42, 43)]
    further = [make_experiment(harm, [0.25, 0.5, 1.0, 2.0], [8.0, 16.0, 32.0], seed) for seed in (42, 43)]
    both = summarize(runs, further)
    assert both["coupling_rows"] == [4, 4]
    assert not caplog.records
    one = summarize(runs, further[:1])
    assert one["coupling_rows"] == summarize(runs)["coupling_rows"]
    assert "not every seed was trained beyond the grid" in caplog.text
