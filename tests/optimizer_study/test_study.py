"""Data, models, the study as a whole and its command."""

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from omegaconf import OmegaConf
from torch.utils.data import TensorDataset

from breaching_ext.data import BinaryFashionMNIST
from breaching_ext.data import fashion_mnist_files as data_module
from breaching_ext.errors import ConfigError
from breaching_ext.optimizer_study import cli, merging, study
from breaching_ext.optimizer_study.callbacks import MergeResults
from breaching_ext.optimizer_study.config import Budget
from breaching_ext.optimizer_study.data import images_of, load_fashion_mnist
from breaching_ext.optimizer_study.merging import load_results, merge_results
from breaching_ext.optimizer_study.models import create_model
from breaching_ext.optimizer_study.protocol import Protocol, planned, select_variants
from breaching_ext.optimizer_study.schedules import StepDrop
from breaching_ext.optimizer_study.study import run_study
from breaching_ext.optimizer_study.variants import VARIANTS, get_variant

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    """A copy of Fashion-MNIST's files with forty random images, the training split gzipped."""
    place = tmp_path / "data"
    place.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    raw = struct.pack(">4I", 0x803, 40, 28, 28) + pixels.tobytes()
    (place / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(raw))
    (place / "t10k-images-idx3-ubyte").write_bytes(raw)
    return place


def small(folder, **changes):
    arguments = {
        "data_folder": str(folder),
        "train_size": 16,
        "test_size": 8,
        "pool": 7,
        "epochs": 2,
        "batch_size": 8,
        "executor": "stacked",  # auto times the executors, whose rounding differs
    }
    grid = {"lr_multipliers": [0.5, 1.0], "wd_multipliers": [0.0, 1.0]}
    return Protocol(**(arguments | grid | changes))


def test_images_are_read_scaled_and_pooled(folder):
    train, test = load_fashion_mnist(folder, train_size=30)
    assert (train.shape, test.shape) == ((30, 1, 28, 28), (40, 1, 28, 28))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    np.testing.assert_allclose(train[:, 0].numpy(), pixels[:30] / 255, rtol=1e-6)
    pooled, _ = load_fashion_mnist(folder, pool=2)
    np.testing.assert_allclose(pooled[3, 0, 1, 2], pixels[3, 2:4, 4:6].mean() / 255, rtol=1e-5)


def test_a_torchvision_copy_is_found(folder):
    inner = folder / "FashionMNIST" / "raw"
    inner.mkdir(parents=True)
    for path in folder.glob("*ubyte*"):
        path.rename(inner / path.name)
    assert len(load_fashion_mnist(folder)[0]) == 40


def test_missing_data_names_the_three_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "DEBIAN_FOLDER", tmp_path / "no")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=r"torchvision downloads.*dataset-fashion-mnist.*a folder"):
        load_fashion_mnist(download=False)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_fashion_mnist("nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pool": 3}, "pool=3"), ({"train_size": 41}, "train_size=41"), ({"test_size": 0}, "test_")],
)
def test_wrong_sizes_are_named(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_fashion_mnist(folder, **options)


def test_datasets_and_tensors_give_the_same_inputs():
    x = torch.rand(5, 1, 4, 4)
    assert torch.equal(images_of(x), x)
    assert torch.equal(images_of(TensorDataset(x)), x)
    assert torch.equal(images_of([(image, 0) for image in x]), x)


@pytest.mark.parametrize("size", [7, 14, 28])
@pytest.mark.parametrize("name", ["autoencoder", "small_conv", "mlp"])
def test_models_reconstruct_their_input_size(name, size):
    images = torch.rand(2, 1, size, size)
    out = create_model(name, size)(images)
    assert out.shape == images.shape
    assert out.min() >= 0
    assert out.max() <= 1


def test_the_full_autoencoder_is_the_one_of_the_study():
    model = create_model("autoencoder", 28)
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() > 1]
    assert shapes == [(32, 1, 3, 3), (64, 32, 3, 3), (128, 3136), (3136, 128), (64, 32, 3, 3), (32, 1, 3, 3)]


def test_models_repeat_by_seed():
    first, same, other = (create_model("mlp", 4, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_a_study_runs_what_is_missing_and_merges(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run_study(out, ["A1"], [1], small(folder), progress=False)
    calls, real = [], study.run_grid

    def counted(variant_id, *args, **kwargs):
        calls.append((variant_id, kwargs["seed"]))
        return real(variant_id, *args, **kwargs)

    monkeypatch.setattr(study, "run_grid", counted)
    paths = run_study(out, ["A1", "B3"], [1, 2], small(folder), progress=False)
    assert sorted(calls) == [("A1", 2), ("B3", 1), ("B3", 2)]
    assert sorted(p.name for p in paths) == [f"{v}_seed{s}.json" for v in ("A1", "B3") for s in (1, 2)]
    assert sorted(os.listdir(out / "results")) == sorted(p.name for p in paths)
    assert [path.name for path in merge_results([out], out)] == ["heatmaps.png", "table.md", "summary.json"]
    summary = json.loads((out / "summary.json").read_text())
    assert [(row["optimizer_id"], row["seeds"]) for row in summary] == [("A1", [1, 2]), ("B3", [1, 2])]


def test_a_result_that_was_being_written_is_not_one(folder, tmp_path):
    run_study(
        tmp_path, ["A1"], [1], small(folder, model_options={"channels": (4, 8)}, model="autoencoder"), progress=False
    )
    (tmp_path / "results" / ".A1_seed1-0123.json").write_text("")
    assert len(load_results([tmp_path])) == 1
    again = small(folder, model_options={"channels": (4, 8)}, model="autoencoder")  # a tuple is a list in the file
    assert len(run_study(tmp_path, ["A1"], [1], again, progress=False)) == 1


def test_results_of_many_machines_merge_into_one_sheet(folder, tmp_path):
    """Two folders give the table that one would have given."""
    one, two, both = (tmp_path / name for name in ("one", "two", "both"))
    run_study(one, ["A1"], [1, 2], small(folder), progress=False)
    run_study(two, ["D1"], [1, 2], small(folder), progress=False)
    run_study(both, ["A1", "D1"], [1, 2], small(folder), progress=False)
    merged = [json.loads(merge_results(f, tmp_path / "m")[2].read_text()) for f in ([one, two], [both])]
    for row in (*merged[0], *merged[1]):
        row.pop("seconds")
    assert merged[0] == merged[1]
    assert [e.optimizer_id for e in load_results([one, two])] == ["A1", "A1", "D1", "D1"]


def test_files_of_one_name_from_different_studies_are_not_mixed(folder, tmp_path):
    """A study below another one's folder, with another setting: only one of the two could count."""
    run_study(tmp_path, ["A1"], [1], small(folder), progress=False)
    run_study(tmp_path / "inner", ["A1"], [1], small(folder, settings={"lr": 0.5}), progress=False)
    with pytest.raises(ValueError, match="another study"):
        load_results([tmp_path])
    assert len(load_results([tmp_path / "inner"])) == 1


def test_columns_beyond_the_grid_count_for_the_coupling_of_normalized_decay_alone(folder, tmp_path):
    run_study(tmp_path, ["B3", "B7"], [1], small(folder), progress=False)
    before = json.loads(merge_results([tmp_path], tmp_path)[2].read_text())
    grids = [path.read_bytes() for path in sorted((tmp_path / "results").glob("*.json"))]
    run_study(tmp_path, ["B3", "B7"], [1], small(folder, beyond=[64, 2**20]), progress=False)
    assert [path.read_bytes() for path in sorted((tmp_path / "results").glob("*.json"))] == grids
    assert [path.name for path in (tmp_path / "results" / "beyond").iterdir()] == ["B7_seed1.json"]
    after = json.loads(merge_results([tmp_path], tmp_path)[2].read_text())
    assert after[0] == before[0]
    assert after[1]["coupling_wd_multipliers"] == [*before[1]["wd_multipliers"], 64, 2**20]
    assert after[1]["coupling_rows"][0] > before[1]["coupling_rows"][0]
    same = ("final_test_loss", "wd_multipliers", "best_final_test_loss")
    assert [after[1][key] for key in same] == [before[1][key] for key in same]


def test_columns_beyond_the_grid_go_by_the_decay_that_is_set(folder, tmp_path):
    normalized = small(folder, beyond=[64], settings={"normalized_decay": True})
    plain = small(folder, beyond=[64], settings={"normalized_decay": False})
    for protocol, runs in ((small(folder, beyond=[64]), 3), (normalized, 4), (plain, 2)):
        assert len(list(planned(tmp_path, ["B3", "B7"], [1], protocol))) == runs


def test_columns_beyond_the_grid_must_lie_beyond_it(folder, tmp_path):
    with pytest.raises(ValueError, match=r"beyond=\[1\].*above"):
        run_study(tmp_path, ["B7"], [1], small(folder, beyond=[1]), progress=False)


def test_results_of_other_settings_are_not_overwritten(folder, tmp_path):
    run_study(tmp_path, ["B1"], [1], small(folder), progress=False)
    with pytest.raises(ValueError, match=r"out=.*other settings"):
        run_study(tmp_path, ["B1"], [1], small(folder, epochs=3), progress=False)


def test_results_of_other_images_are_neither_kept_nor_averaged(folder, tmp_path):
    """Files of the same names and sizes, as those of MNIST and Fashion-MNIST are."""
    (path,) = run_study(tmp_path / "out", ["B1"], [1], small(folder), progress=False)
    other = folder.parent / "other"
    shutil.copytree(folder, other)
    raw = bytearray((other / "t10k-images-idx3-ubyte").read_bytes())
    raw[16] ^= 1
    (other / "t10k-images-idx3-ubyte").write_bytes(raw)
    with pytest.raises(ValueError, match=r"out=.*other images"):
        run_study(tmp_path / "out", ["B1"], [1], small(other), progress=False)
    (beside,) = run_study(tmp_path / "beside", ["B1"], [2], small(other), progress=False)
    with pytest.raises(ValueError, match="data_sha256"):
        merge_results([path.parents[1], beside.parents[1]], tmp_path / "sheet")


def test_following_the_schedule_from_outside_is_no_reason_to_warn(folder, tmp_path, caplog):
    run_study(tmp_path, ["D1"], [1], small(folder, executor="sequential"), progress=False)
    assert "stays at epoch 0" not in caplog.text


def test_schedule_options_and_settings_reach_their_variants(folder, tmp_path):
    protocol = small(folder, schedule_options={"warm_restarts": {"t0": 1, "end": "up"}}, settings={"eps": 1e-4})
    paths = run_study(tmp_path, ["B4", "C1"], [1], protocol, progress=False)
    b4, c1 = (json.loads(path.read_text())["config"] for path in paths)
    assert b4["schedule"] == {
        "name": "warm_restarts",
        "epochs": 3,
        "t0": 1,
        "t_mult": 2,
        "ends_at_period_end": True,
    }
    assert b4["optimizer"]["eps"] == 1e-4
    assert "eps" not in c1["optimizer"]


def test_conflicts_and_wrong_values_of_late_runs_are_found_before_the_first(folder, tmp_path, monkeypatch):
    run_study(tmp_path, ["D3"], [1], small(folder), progress=False)
    monkeypatch.setattr(study, "run_grid", lambda *args, **kwargs: pytest.fail("trained"))
    monkeypatch.setattr(study, "load_fashion_mnist", lambda *args: pytest.fail("loaded"))
    for changes, words in (
        ({"beyond": [64, 64]}, "wd_multipliers.*repetition"),
        ({"epochs": 3}, r"out=.*D3_seed1.*other settings"),
        ({"schedule_options": {"warm_restarts": {"end": "middle"}}}, "end='middle'"),
        ({"schedule_options": {"cosine": {"half": 1}}}, "schedule_options of cosine='half'"),
        ({"settings": {"eps2": -1.0}}, "eps2=-1.0"),
    ):
        with pytest.raises(ValueError, match=words):
            run_study(tmp_path, ["A1", "C1", "D3"], [1], small(folder, **changes), progress=False)


def test_another_variants_results_of_another_study_are_found_before_the_first(folder, tmp_path, monkeypatch):
    run_study(tmp_path, ["A1"], [1], small(folder), progress=False)
    monkeypatch.setattr(study, "run_grid", lambda *args, **kwargs: pytest.fail("trained"))
    with pytest.raises(ValueError, match=r"out=.*A1_seed1.*another epochs"):
        run_study(tmp_path, ["B3"], [1], small(folder, epochs=3), progress=False)


def test_options_that_are_the_models_own_change_no_study(folder, tmp_path, monkeypatch):
    run_study(tmp_path, ["A1"], [1], small(folder), progress=False)
    monkeypatch.setattr(study, "run_grid", lambda *args, **kwargs: pytest.fail("trained again"))
    assert run_study(tmp_path, ["A1"], [1], small(folder, model_options={"latent": 16, "hidden": 64}), progress=False)


def test_one_source_needs_no_list_and_every_source_is_a_folder(tmp_path, monkeypatch):
    """A name that is wrong would be left out without a word; a text is not a list of letters."""
    seen = []
    monkeypatch.setattr(cli, "merge_results", lambda folders, out: seen.append(list(folders)) or [])
    cfg = OmegaConf.create({"action": "merge", "threads": None, "out": "here", "sources": str(tmp_path)})
    cli.run(cfg)
    cli.run(OmegaConf.merge(cfg, {"sources": [str(tmp_path), str(tmp_path)]}))
    cli.run(OmegaConf.merge(cfg, {"sources": None}))
    assert seen == [[str(tmp_path), "here"], [str(tmp_path), str(tmp_path), "here"], ["here"]]
    with pytest.raises(ValueError, match="sources='nowhere'"):
        cli.run(OmegaConf.merge(cfg, {"sources": [str(tmp_path), "nowhere"]}))


def test_variants_of_different_studies_are_not_merged(folder, tmp_path):
    run_study(tmp_path / "one", ["A1"], [1], small(folder), progress=False)
    run_study(tmp_path / "two", ["B3"], [1], small(folder, train_size=24), progress=False)
    with pytest.raises(ValueError, match=r"sources='A1 and B3'.*train_size"):
        merge_results([tmp_path], tmp_path)
    assert not list(tmp_path.glob("*.*"))


def test_the_sheet_and_the_table_carry_the_same_numbers(folder, tmp_path, monkeypatch):
    """Those of the rows followed beyond the grid, over all seeds, not of the mean grid that is drawn."""
    lrs = [2.0**power for power in range(-3, 2)]
    protocol = small(folder, lr_multipliers=lrs, beyond=[2.0**power for power in range(6, 24)])
    run_study(tmp_path, ["B3", "B7"], [1, 2], protocol, progress=False)
    titles, real = [], merging.save_sheet

    def watched(*args, **more):
        titles.extend(more["titles"])
        return real(*args, **more)

    monkeypatch.setattr(merging, "save_sheet", watched)
    rows = json.loads(merge_results([tmp_path], tmp_path)[2].read_text())
    assert rows[1]["coupling"] is not None
    for title, row in zip(titles, rows, strict=True):
        number = "not reached" if row["coupling"] is None else f"{row['coupling']:+.2f}"
        assert title.splitlines()[-1].startswith(f"coupling {number}")


def test_a_multirun_merges_the_sources_of_its_config(folder, tmp_path):
    """Which are no list of Python's there."""
    run_study(tmp_path / "one", ["A1"], np.array([1]), small(folder), progress=False)
    run_study(tmp_path / "two", ["B3"], [1], small(folder), progress=False)
    MergeResults().on_multirun_end(configured(f"out={tmp_path / 'two'}", f"sources=[{tmp_path / 'one'}]"))
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert [row["optimizer_id"] for row in summary] == ["A1", "B3"]


def test_a_multirun_whose_results_cannot_be_merged_does_not_end_well(tmp_path, caplog):
    with pytest.raises(SystemExit) as end:  # Hydra lets only this one through
        MergeResults().on_multirun_end(configured(f"out={tmp_path}"))
    assert end.value.code == 1
    assert "not merged: no results" in caplog.text


class FakeDownload:
    """In torchvision's place: writes the files, or fails on the way."""

    def __init__(self, source, fails):
        self.source, self.fails = source, fails

    def __call__(self, root, download):
        raw = Path(root) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        for path in sorted(self.source.iterdir(), reverse=True):
            (raw / path.name).write_bytes(path.read_bytes()[:100] if self.fails else path.read_bytes())
            if self.fails:
                raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")


def test_a_download_is_whole_or_absent(folder, tmp_path, monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(data_module, "DEBIAN_FOLDER", tmp_path / "no")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", FakeDownload(folder, fails=True))
    with pytest.raises(FileNotFoundError, match=r"nor by download \(RuntimeError: Error downloading"):
        load_fashion_mnist()
    assert not list((tmp_path / "cache").rglob("*ubyte*"))
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", FakeDownload(folder, fails=False))
    assert len(load_fashion_mnist()[0]) == 40
    assert [path.name for path in (tmp_path / "cache" / "breaching_ext").iterdir()] == ["FashionMNIST"]
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", lambda *args, **kwargs: pytest.fail("again"))
    assert len(load_fashion_mnist()[0]) == 40


@pytest.mark.parametrize("kept", [0, 9, 700])
def test_a_truncated_plain_file_is_named(folder, kept):
    path = folder / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte"):
        load_fashion_mnist(folder)


def test_the_binary_dataset_calls_its_folder_by_its_own_key(folder):
    (folder / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x801, 40, 28, 28))
    with pytest.raises(ConfigError, match=r"case\.data\.path=.*t10k-images-idx3-ubyte of another kind"):
        BinaryFashionMNIST(folder=folder)
    with pytest.raises(ConfigError, match=r"nowhere.*\(case\.data\.path=PATH\)"):
        BinaryFashionMNIST(folder="nowhere")
    with pytest.raises(ConfigError, match=r"data\.folder=3 is not possible"):
        load_fashion_mnist(3)


def test_a_damaged_file_is_named(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz is damaged"):
        load_fashion_mnist(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"dekay": "lr"}}, r"settings='dekay'.*decay"),
        ({"schedule_options": {"warm_restart": {"end": "up"}}}, r"schedule_options='warm_restart'.*warm_restarts"),
    ],
)
def test_a_setting_that_no_variant_has_is_refused(folder, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        run_study(tmp_path, ["B3"], [1], small(folder, **changes), progress=False)
    assert not list(tmp_path.rglob("*.json"))


def test_the_variants_are_those_of_the_study():
    """Kind, decay, normalized, momentum of Adafactor, schedule: what tells one variant from another."""
    found = {
        name: (
            type(v.config).__name__,
            getattr(v.config, "decay", None),
            getattr(v.config, "normalized_decay", None),
            getattr(v.config, "beta1", None),
            v.schedule,
        )
        for name, v in VARIANTS.items()
    }
    schedules = ("fixed", "step_drop", "cosine", "warm_restarts")
    adamw = {f"B{i + 1}": ("AdamWConfig", "schedule", i > 3, 0.9, schedules[i % 4]) for i in range(8)}
    assert found == {
        "A1": ("AdamWConfig", "l2", False, 0.9, "cosine"),
        "A2": ("OptimizerConfig", "l2", False, 0.9, "cosine"),
        **adamw,
        "C1": ("AdafactorConfig", "l2", False, 0.0, "fixed"),
        "C2": ("AdafactorConfig", "l2", False, 0.9, "fixed"),
        "D1": ("AdafactorConfig", "schedule", True, 0.0, "cosine"),
        "D2": ("AdafactorConfig", "schedule", True, 0.0, "warm_restarts"),
        "D3": ("AdafactorConfig", "schedule", True, 0.9, "warm_restarts"),
    }


def test_variants_are_selected():
    assert select_variants("all") == list(VARIANTS)
    assert len(VARIANTS) == 15
    assert select_variants("B3") == ["B3"]
    with pytest.raises(ValueError, match="variant_id='B9'"):
        select_variants(["B3", "B9"])
    with pytest.raises(ValueError, match="variant="):
        select_variants([])


def test_nothing_to_merge_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results"):
        merge_results([tmp_path], tmp_path)


def configured(*overrides):
    with initialize_config_dir(cli._config_folder(), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def test_the_default_configuration_is_the_default_protocol():
    protocol = cli.protocol_of(configured())
    want = Protocol()
    for key, value in vars(want).items():
        got = getattr(protocol, key)
        assert list(got) == list(value) if key.endswith("multipliers") else got == value


def test_the_full_protocol_is_the_one_of_the_study():
    protocol = cli.protocol_of(configured("protocol=full"))
    assert (protocol.model, protocol.epochs, protocol.batch_size) == ("autoencoder", 100, 128)
    assert (protocol.train_size, protocol.test_size, protocol.pool) == (None, None, 1)
    study_model, ours = (create_model("autoencoder", 28, 0, **options) for options in ({}, protocol.model_options))
    assert [p.shape for p in study_model.parameters()] == [p.shape for p in ours.parameters()]
    assert protocol.model_options == {}


@pytest.mark.parametrize("protocol", ["reduced", "full"])
@pytest.mark.parametrize("model", ["autoencoder", "small_conv", "mlp"])
def test_every_protocol_goes_with_every_model(protocol, model):
    chosen = cli.protocol_of(configured(f"protocol={protocol}", f"protocol.model={model}"))
    images = torch.rand(2, 1, 28 // chosen.pool, 28 // chosen.pool)
    assert create_model(chosen.model, images.shape[-1], 0, **chosen.model_options)(images).shape == images.shape


def test_an_option_that_a_model_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"model_options of mlp='channels'.*hidden, latent"):
        create_model("mlp", 14, channels=[4, 8])


@pytest.mark.parametrize(
    ("launch", "plugin", "target"),
    [
        ("joblib", "hydra_joblib_launcher", "JoblibLauncher"),
        ("slurm", "hydra_submitit_launcher", "SlurmLauncher"),
    ],
)
def test_launchers_are_configured(launch, plugin, target):
    pytest.importorskip(f"hydra_plugins.{plugin}", reason="needs the extra [sweep]")
    with initialize_config_dir(cli._config_folder(), version_base="1.3"):
        cfg = compose("config", overrides=[f"+launch={launch}"], return_hydra_config=True)
    assert cfg.hydra.launcher._target_.endswith(target)
    assert cfg.progress is False


def command(folder, out, *arguments):
    """Run the console entry in a process of its own."""
    size = ["protocol.train_size=16", "protocol.test_size=8", "protocol.pool=7", "protocol.epochs=1"]
    grid = ["protocol.lr_multipliers=[0.5,1]", "protocol.wd_multipliers=[0,1]", "protocol.batch_size=8"]
    entry = "from breaching_ext.optimizer_study.cli import main; main()"
    call = [sys.executable, "-c", entry, *arguments, f"out={out}", f"data.folder={folder}", *size, *grid]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(call, cwd=out.parent, env=env, capture_output=True, text=True, check=False)


def test_a_multirun_runs_in_processes_and_merges(folder, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra [sweep]")
    out = tmp_path / "out"
    done = command(folder, out, "-m", "+launch=joblib", "variant=A1,D3", "seed=1")
    assert done.returncode == 0, done.stderr
    assert len(list((out / "results").glob("*.json"))) == 2
    summary = json.loads((out / "summary.json").read_text())
    assert [(row["optimizer_id"], row["seeds"]) for row in summary] == [("A1", [1]), ("D3", [1])]
    assert (out / "heatmaps.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("variant=Z1", "variant_id='Z1'"),
        ("action=stop", "action='stop'.*run, merge"),
        ("seed=[]", "seed="),
        ("protocol.model=vit", "model='vit'"),
        ("protocol.executor=magic", "executor='magic'"),
        ("protocol.schedule=linear", "schedule='linear'"),
        ("progress=off", "progress=off is not possible; valid: true, false"),
        ("protocol.wd_multipliers=0", "protocol.wd_multipliers=0"),
        ("protocol.beyond=64", "protocol.beyond=64"),
        ("+protocol.settings.normalized_decay=off", "normalized_decay='off'"),
    ],
)
def test_the_command_names_a_wrong_value(folder, tmp_path, override, message):
    sizes = ["protocol.train_size=16", "protocol.test_size=8"]
    cfg = configured(f"out={tmp_path / 'out'}", f"data.folder={folder}", *sizes, override)
    with pytest.raises(ValueError, match=message):
        cli.run(cfg)
    assert not (tmp_path / "out" / "results").exists()


@pytest.fixture(scope="module")
def composed():
    return configured("variant=[B2,B3,B4]", "protocol.train_size=16", "protocol.test_size=8", "protocol.pool=7")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("threads", 0, "threads=0 is not possible"),
        ("threads", "two", "threads=two is not possible"),
        ("seed", "abc", "seed='abc'.*a whole number"),
        ("seed", None, "seed=None.*a whole number"),
        ("seed", [1, "abc"], "seed='abc'.*a whole number"),
        ("seed", 10**30, "seed=1000.*a whole number"),
        ("seed", [1, 2, 1], r"seed=\[1, 2, 1\].*once"),
        ("variant", None, "variant=None.*such as B3"),
        ("variant", 3, "variant=3.*such as B3"),
        ("variant", ["B3", "B3"], "variant=.*once"),
        ("out", None, "out=None.*a folder"),
        ("out", "", "out=''.*a folder"),
        ("sources", 3, "sources=3.*a folder"),
        ("sources", [None], "sources=None.*a folder"),
        ("protocol.pool", None, "pool=None.*divisor of 28"),
        ("protocol.pool", 2.0, "pool=2.0.*divisor of 28"),
        ("protocol.batch_size", None, "batch_size=None.*whole number"),
        ("protocol.lr_multipliers", [-1], r"lr_multipliers=\[-1.0\].*> 0"),
        ("protocol.lr_multipliers", ["abc"], "lr_multipliers=.*'abc'.*finite numbers"),
        ("protocol.lr_multipliers", [True], "lr_multipliers=.*True.*finite numbers"),
        ("protocol.lr_multipliers", [], r"lr_multipliers=\[\].*finite numbers"),
        ("protocol.wd_multipliers", [None], "wd_multipliers=.*None.*finite numbers"),
        ("protocol.beyond", ["abc"], "beyond=.*'abc'.*above 32"),
        ("protocol.device", None, "device=None.*such as cpu"),
        ("protocol.device", "tpu", "device='tpu'.*such as cpu"),
        ("protocol.compile", "off", "compile='off'.*auto, True, False"),
        ("protocol.executor", None, "executor=None.*auto, stacked, sequential"),
        ("protocol.chunk", 0, "chunk=0.*whole number"),
        ("protocol.model_options", 3, "model_options=3.*mapping"),
        ("protocol.model_options", {"hidden": 0}, "hidden=0.*whole number"),
        ("protocol.settings", 3, "settings=3.*mapping"),
        ("protocol.settings", {"lr": "abc"}, "lr='abc'.*finite number"),
        ("protocol.settings", {"beta1": None}, "beta1=None.*finite number"),
        ("protocol.schedule_options", {"cosine": 3}, "schedule_options of cosine=3.*mapping"),
        ("protocol.schedule_options", {"step_drop": {"fractions": 0.5}}, "fractions=0.5.*list"),
        ("protocol.speed", 3, "'speed'.*batch_size"),
    ],
    ids=str,
)
def test_a_wrong_value_is_one_line_before_anything_is_trained(
    composed, folder, tmp_path, monkeypatch, key, value, message
):
    monkeypatch.setattr(study, "run_grid", lambda *args, **kwargs: pytest.fail("trained"))
    cfg = OmegaConf.merge(composed, {"out": str(tmp_path / "out"), "data": {"folder": str(folder)}})
    OmegaConf.set_struct(cfg, False)
    OmegaConf.update(cfg, key, value, merge=False)
    with pytest.raises(ConfigError, match=message) as caught:
        cli.run(cfg)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_options_that_are_left_empty_are_none(composed):
    empty = {"model_options": None, "schedule_options": None, "settings": None}
    cfg = OmegaConf.merge(composed, {"protocol": empty, "data": None})
    assert cli.protocol_of(cfg) == cli.protocol_of(composed)


@pytest.mark.parametrize(
    ("error", "status"),
    [(ConfigError("seed='abc' is wrong"), 1), (FileNotFoundError("no"), 1), (KeyboardInterrupt(), 130)],
)
def test_the_command_ends_with_one_line(composed, monkeypatch, caplog, error, status):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(cli, "run", fails)
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: OmegaConf.create({"mode": RunMode.RUN}))
    with pytest.raises(SystemExit) as end:
        cli.main.__wrapped__(composed)
    assert end.value.code == status
    (message,) = caplog.messages
    assert str(error) in message
    assert "\n" not in message
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: OmegaConf.create({"mode": RunMode.MULTIRUN}))
    with pytest.raises(type(error)):  # the other jobs of a multirun go on, or, after Ctrl-C, do not
        cli.main.__wrapped__(composed)


def test_a_file_that_is_no_result_is_named(folder, tmp_path):
    (path,) = run_study(tmp_path, ["A1"], [1], small(folder), progress=False)
    for text in ("{", "[]", '{"config": 3}'):
        path.write_text(text)
        for action in (lambda: run_study(tmp_path, ["A1"], [1], small(folder)), lambda: merge_results([tmp_path], "x")):
            with pytest.raises(ConfigError, match=r"A1_seed1\.json is not a saved experiment"):
                action()


def test_the_command_runs_and_merges(folder, tmp_path):
    sizes = ["protocol.train_size=16", "protocol.test_size=8", "protocol.pool=7", "protocol.epochs=1"]
    grid = ["protocol.lr_multipliers=[0.5,1]", "protocol.wd_multipliers=[0,1]", "progress=false"]
    cfg = configured(f"out={tmp_path}", f"data.folder={folder}", *sizes, *grid, "variant=[A1,B3]", "seed=[1,2]")
    assert {path.name for path in cli.run(cfg)} == {"heatmaps.png", "table.md", "summary.json"}
    assert len(list((tmp_path / "results").iterdir())) == 4


def test_the_module_imports_nothing_from_the_attacks_nor_the_data_from_the_module():
    check = (
        "import json, sys, breaching_ext.data\n"
        "print(json.dumps([m for m in sys.modules if m.startswith('breaching')]))\n"
        "import breaching_ext.optimizer_study.cli\n"
        "print(json.dumps([m for m in sys.modules if m.startswith('breaching')]))"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    data, both = map(json.loads, done.stdout.splitlines())
    assert not [m for m in data if m.startswith("breaching_ext.optimizer_study")]
    others = {m for m in both if not m.startswith("breaching_ext.optimizer_study")}
    names = ("config", "errors", "files", "free_ram", "intervals", "modes", "out_of_memory", "registration")
    names += ("tensor_files", "values", "data", "data.fashion_mnist", "data.fashion_mnist_files", "data.sample_photos")
    shared = {f"breaching_ext.{name}" for name in names}
    assert others <= {"breaching_ext", *shared}


def test_numbers_and_lists_of_numpy_are_taken():
    assert select_variants(VARIANTS) == list(VARIANTS)
    assert select_variants(np.array(["B3", "A1"])) == ["B3", "A1"]
    assert get_variant("B3").with_settings(weight_decay=np.float32(0.5)).config.weight_decay == 0.5
    assert type(Budget(np.int64(10), np.int32(5), 2).batch_size) is int
    assert StepDrop(10, fractions=np.array([0.3, 0.6])).milestones == [3, 6]
    assert StepDrop(10, fractions=(f for f in (0.3, 0.6))).milestones == [3, 6]
