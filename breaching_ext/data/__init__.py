"""Datasets that this package adds to Breaching's data construction."""

from __future__ import annotations

from typing import Any

from ..errors import BreachingExtError, ConfigError, DatasetUnavailableError, first_line, unknown
from .fashion_mnist import BinaryFashionMNIST
from .sample_photos import PHOTOS, SamplePhotos, interleaved_indices

__all__ = [
    "PARTITIONS",
    "PHOTOS",
    "BinaryFashionMNIST",
    "SamplePhotos",
    "build_registered_dataset",
    "contiguous_partition",
    "interleaved_partition",
    "is_registered_dataset",
    "unavailable_dataset",
]


def is_registered_dataset(name: str) -> bool:
    """Return whether `case.data.name` is a dataset of this package."""
    return name in ("sample_photos", "fashion_mnist_binary")


def build_registered_dataset(cfg_data: Any, split: str) -> tuple[Any, Any]:
    """Build one of our datasets as Breaching's `_build_dataset_vision` would: (dataset, collate function)."""
    from breaching.cases.data import datasets_vision as upstream

    if "train" not in split and "val" not in split:
        raise unknown("case.data.examples_from_split", split, ["training", "validation"])
    if cfg_data.name == "fashion_mnist_binary":
        return _build_fashion_mnist(cfg_data, "train" in split), upstream._torchvision_collate
    channels, height, width = cfg_data.shape
    if channels != 3 or height != width:
        raise ConfigError(
            f"case.data.shape={list(cfg_data.shape)} does not fit sample_photos; valid: [3, n, n] for any n >= 1."
        )
    dataset = SamplePhotos(
        size=height,
        training="train" in split,
        crops_per_photo=cfg_data.get("crops_per_photo", 128),
        window=cfg_data.get("window", 0.3),
        transform=upstream._parse_data_augmentations(cfg_data, "train" if "train" in split else "val"),
        labels=cfg_data.get("labels", "photo"),
        classes=cfg_data.classes,
    )
    dataset.mean, dataset.std = (cfg_data.mean, cfg_data.std) if cfg_data.normalize else ([0], [1])
    if cfg_data.size < len(dataset):
        dataset = upstream.Subset(dataset, range(cfg_data.size))
    return dataset, upstream._torchvision_collate


def _build_fashion_mnist(cfg_data: Any, training: bool) -> BinaryFashionMNIST:
    if list(cfg_data.shape) != [1, 28, 28] or cfg_data.normalize:
        raise ConfigError(
            f"case.data.shape={list(cfg_data.shape)} with normalize={cfg_data.normalize} does not fit "
            "fashion_mnist_binary; valid: [1, 28, 28] and False (the network subtracts the mean image)."
        )
    return BinaryFashionMNIST(training, cfg_data.get("labels", "permuted"), cfg_data.path, cfg_data.size)


def interleaved_partition(dataset: Any, clients: int, user_idx: int | None) -> Any:
    """Partition `interleaved`: user u owns the u-th contiguous block, whose points go through the classes in turn.

    Unlike Breaching's `balanced` (sorted by class) the first K points of a user belong to K different classes, and
    unlike its `random` the partition does not depend on the global random state. Without a user index one is drawn.
    """
    from breaching.cases.data.datasets_vision import Subset

    user_idx = _user(user_idx, clients)
    return Subset(dataset, interleaved_indices(dataset.lookup, len(dataset), clients, user_idx))


def contiguous_partition(dataset: Any, clients: int, user_idx: int | None) -> Any:
    """Partition `contiguous`: user u owns the u-th block of the dataset as it stands, whatever its labels are."""
    from breaching.cases.data.datasets_vision import Subset

    share = len(dataset) // clients
    start = _user(user_idx, clients) * share
    return Subset(dataset, range(start, start + share))


def _user(user_idx: int | None, clients: int) -> int:
    import torch

    if user_idx is None:
        user_idx = int(torch.randint(0, clients, (1,)))
    if not 0 <= user_idx < clients:
        raise ConfigError(f"case.user.user_idx={user_idx} does not exist; valid: 0 to {clients - 1}.")
    return user_idx


#: Values of case.data.partition that this package adds.
PARTITIONS = {"interleaved": interleaved_partition, "contiguous": contiguous_partition}


def unavailable_dataset(cfg_data: Any, error: Exception) -> BreachingExtError:
    """Return the one-line error for one of Breaching's own datasets that cannot be loaded."""
    return DatasetUnavailableError(
        f"case.data.name={cfg_data.name}: not found under case.data.path={cfg_data.path} and not downloadable here "
        f"({type(error).__name__}: {first_line(error)}). Put the dataset "
        "there, set case.data.path, or use case=sample_photos, which needs no download."
    )
