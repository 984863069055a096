"""The embedded dataset: deterministic, without overlap between the splits, and usable in Breaching's partitions."""

from __future__ import annotations

import contextlib
import io
import warnings

import breaching
import numpy as np
import pytest
import torch

from breaching_ext.data import PHOTOS, SamplePhotos, contiguous_partition, interleaved_partition
from breaching_ext.data.sample_photos import _photo, _positions
from breaching_ext.errors import ConfigError
from breaching_ext.registration import register


@pytest.fixture(autouse=True)
def _registered():
    register()


def user(*overrides: str):
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = breaching.get_case_config("sample_photos", overrides=list(overrides))
        return breaching.cases.construct_case(cfg)[0]


def test_deterministic_and_class_alternating():
    first, second = SamplePhotos(), SamplePhotos()
    assert all(np.array_equal(first[i][0], second[i][0]) for i in range(16))
    assert [first[i][1] for i in range(9)] == [0, 1, 2, 3, 4, 5, 6, 7, 0]
    assert len({np.asarray(first[i][0]).tobytes() for i in range(256)}) == 256


def test_more_crops_do_not_change_the_first_ones():
    assert np.array_equal(_positions(10)[:10], _positions(1000)[:10])


@pytest.mark.parametrize("photo", PHOTOS)
def test_splits_share_no_pixel(photo):
    """Every training window ends where the middle third begins, or starts where it ends."""
    width = _photo(photo).shape[1]
    training, validation = SamplePhotos(training=True), SamplePhotos()
    middle = {validation._strip(width, n) for n in range(4)}
    outer = {training._strip(width, n) for n in range(4)}
    assert len(middle) == 1
    (low, high), *_ = middle
    assert all(right <= low or left >= high for left, right in outer)


def test_crops_show_the_columns_of_their_split(monkeypatch):
    """By the pixels: the photo's red channel is the column, in 256 steps."""
    height, width = 300, 420
    columns = np.broadcast_to(np.arange(width) * 255 / (width - 1), (height, width)).round().astype(np.uint8)
    monkeypatch.setattr("breaching_ext.data.sample_photos._photo", lambda name: np.stack([columns] * 3, axis=-1))
    for training in (True, False):
        dataset = SamplePhotos(training=training, size=64)
        shown = np.concatenate([np.unique(np.asarray(dataset[i][0])[..., 0]) for i in range(len(dataset))])
        third = 255 / 3
        outside = (shown < third - 2) | (shown > 2 * third + 2)
        within = (shown > third - 2) & (shown < 2 * third + 2)
        assert (outside | (abs(shown - third) < 4) | (abs(shown - 2 * third) < 4)).all() if training else within.all()
        assert outside.any() if training else not outside.any()


@pytest.mark.parametrize("window", [0.05, 0.3, 0.3333, 1 / 3])
@pytest.mark.parametrize("photo", PHOTOS)
def test_every_window_lies_in_its_strip(photo, window):
    height, width = _photo(photo).shape[:2]
    for training in (True, False):
        dataset = SamplePhotos(training=training, window=window)
        for number in range(128):
            top, left, side = dataset._window(height, width, number)
            low, high = dataset._strip(width, number)
            assert side > 0
            assert low <= left < left + side <= high
            assert 0 <= top < top + side <= height


@pytest.mark.parametrize("size", [1, 7, 32, 64, 224])
def test_any_size(size):
    assert SamplePhotos(size=size)[3][0].size == (size, size)


@pytest.mark.parametrize("options", [{"size": 0}, {"crops_per_photo": 0}, {"window": 0.0}, {"window": 0.5}])
def test_bad_options(options):
    with pytest.raises(ConfigError):
        SamplePhotos(**options)


@pytest.mark.parametrize("points", [1, 4, 16, 64])
def test_users_own_as_many_images_as_they_say(points):
    owner = user(f"user.num_data_points={points}")
    data = owner._load_data()
    assert data["inputs"].shape == (points, 3, 32, 32)
    assert data["labels"][:8].tolist() == list(range(min(points, 8)))


def test_users_share_no_image():
    seen = [user(f"user.user_idx={u}", "user.num_data_points=64")._load_data()["inputs"] for u in (0, 1, 15)]
    flat = torch.cat(seen).flatten(1)
    assert len(torch.unique(flat, dim=0)) == len(flat)


@pytest.mark.parametrize(
    "partition", ["balanced", "unique-class", "random", "random-full", "mixup", "none", "interleaved"]
)
def test_breachings_partitions_work(partition):
    data = user(f"data.partition={partition}", "user.user_idx=2", "user.num_data_points=4")._load_data()
    assert data["inputs"].shape == (4, 3, 32, 32)
    if partition == "unique-class":
        assert data["labels"].tolist() == [2, 2, 2, 2]


def test_training_split_and_several_users_at_once():
    owner = user("data.examples_from_split=training", "user.user_idx=3")
    assert owner._load_data()["labels"].tolist() == [0, 1, 2, 3]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = breaching.get_case_config(
            "sample_photos", overrides=["user=multiuser_aggregate", "user.user_range=[0,3]", "user.num_data_points=4"]
        )
        aggregate = breaching.cases.construct_case(cfg)[0]
    assert len(aggregate.users) == 3


def test_a_user_that_does_not_exist():
    with pytest.raises(ConfigError, match="0 to 15"):
        user("user.user_idx=16")


@pytest.mark.parametrize("shape", ["[1,32,32]", "[3,32,16]"])
def test_a_shape_that_does_not_fit(shape):
    with pytest.raises(ConfigError, match=r"case\.data\.shape"):
        user(f"data.shape={shape}")


def test_interleaving_works_for_any_labels():
    class Sorted(torch.utils.data.Dataset):
        def __init__(self):
            self.lookup = dict(enumerate([0, 0, 0, 1, 1, 2]))

        def __len__(self):
            return 6

        def __getitem__(self, index):
            return self.lookup[index]

    assert [interleaved_partition(Sorted(), 2, u)[i] for u in (0, 1) for i in range(3)] == [0, 1, 2, 0, 1, 0]


def test_uniform_labels_change_labels_only():
    photos, uniform = SamplePhotos(), SamplePhotos(labels="uniform", classes=100)
    assert all(np.array_equal(photos[i][0], uniform[i][0]) for i in range(16))
    assert uniform.targets == SamplePhotos(labels="uniform", classes=100).targets
    assert uniform.targets != SamplePhotos(training=True, labels="uniform", classes=100).targets
    assert uniform.lookup == dict(enumerate(uniform.targets))
    counts = np.bincount(uniform.targets, minlength=100)
    assert len(counts) == len(uniform.classes) == 100
    assert counts.sum() == len(uniform)
    assert ((counts - len(uniform) / 100) ** 2).sum() / (len(uniform) / 100) < 150  # chi-square, 99 degrees of freedom


def test_contiguous_users_share_the_data_among_them():
    dataset = SamplePhotos(labels="uniform", classes=100)
    blocks = [list(contiguous_partition(dataset, 16, u).indices) for u in range(16)]
    assert [i for block in blocks for i in block] == list(range(len(dataset)))


def test_the_case_with_a_hundred_classes():
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = breaching.get_case_config("sample_photos_100", overrides=["user.user_idx=1"])
        client, server, model, _ = breaching.cases.construct_case(cfg)
    shared, _, true = server.run_protocol(client)
    assert shared[0]["metadata"]["labels"] is None
    assert shared[0]["gradients"][-1].shape == (100,)
    assert true["labels"].tolist() == SamplePhotos(labels="uniform", classes=100).targets[64:72]
    assert not model.training


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"labels": "random"}, "photo, uniform"),
        ({"classes": 10}, "classes=10"),
        ({"labels": "uniform", "classes": 0}, "0"),
    ],
)
def test_bad_labels_are_named(options, text):
    with pytest.raises(ConfigError, match=text):
        SamplePhotos(**options)
