"""Fashion-MNIST (Xiao et al. 2017) as plain tensors in [0, 1]."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .config import require

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FILES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
_IMAGES_MAGIC = 0x803


def load_fashion_mnist(
    folder: str | Path | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    pool: int = 1,
    download: bool = True,
) -> tuple[Tensor, Tensor]:
    """Load the images, from a folder, from Debian's package or through torchvision's download.

    Args:
        folder: Folder with the idx files, plain or gzipped, or the root of a torchvision copy.
        train_size: Use the first so many training images; default all 60,000.
        test_size: The same for the 10,000 test images.
        pool: Average over ``pool`` × ``pool`` pixels.
        download: Whether torchvision may download the data when no copy is at hand.

    Returns:
        Training and test images (n, 1, 28 / pool, 28 / pool), float32 in [0, 1].

    Raises:
        FileNotFoundError: If there is no copy; names the three ways to get one.
        ValueError: If a size or ``pool`` is not valid.
    """
    require(pool >= 1 and 28 % pool == 0, "pool", pool, "a divisor of 28")
    root = _find(folder) or (_download() if download and folder is None else None)
    if root is None:
        raise FileNotFoundError(_advice(folder))
    splits = (("train", "train_size", train_size), ("test", "test_size", test_size))
    train, test = (_prepare(_read_images(root, split), key, size, pool) for split, key, size in splits)
    return train, test


def images_of(data: Dataset | Tensor) -> Tensor:
    """The inputs of a dataset (its items or their first entries), or a tensor as it is, as (n, …).

    Raises:
        ValueError: If there is no item.
    """
    if not isinstance(data, Tensor):
        items = [data[index] for index in range(len(data))]  # type: ignore[arg-type]
        require(bool(items), "data", "an empty dataset", "a dataset with at least one item")
        data = torch.stack([item[0] if isinstance(item, (tuple, list)) else item for item in items])
    require(len(data) > 0, "data", tuple(data.shape), "a tensor with at least one item")
    return data


def _find(folder: str | Path | None) -> Path | None:
    """The folder that holds the idx files, or None."""
    given = [] if folder is None else [Path(folder)]
    roots = given or [DEBIAN_FOLDER, _cache_root()]
    for root in (place for base in roots for place in (base, base / "FashionMNIST" / "raw")):
        if all(_file(root, split) for split in _FILES):
            return root
    return None


def _file(root: Path, split: str) -> Path | None:
    """The images of a split, gzipped or plain."""
    names = (root / f"{_FILES[split]}.gz", root / _FILES[split])
    return next((path for path in names if path.is_file()), None)


def _cache_root() -> Path:
    """Where torchvision's download goes."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "breaching_ext"


def _download() -> Path | None:
    """Let torchvision download the data; None where there is no network."""
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(_cache_root()), download=True)
    except (OSError, RuntimeError):
        return None
    return _find(_cache_root())


def _advice(folder: str | Path | None) -> str:
    """The three ways to get the data, in one line."""
    where = f"in {folder}" if folder is not None else f"in {DEBIAN_FOLDER} or {_cache_root()}, nor by download"
    return (
        f"Fashion-MNIST was not found {where}. Either connect to a network, so that torchvision downloads "
        "it; or install Debian's package (apt-get install dataset-fashion-mnist); "
        "or give a folder with its idx files (data.folder=PATH)."
    )


def _read_images(root: Path, split: str) -> Tensor:
    """Read an idx file of images as (n, 28, 28) bytes."""
    path = _file(root, split)
    assert path is not None  # _find has looked
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    magic, count, height, width = struct.unpack(">4I", raw[:16])
    require(magic == _IMAGES_MAGIC, "data.folder", str(path), "a folder with idx files of images")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).reshape(count, height, width).copy())


def _prepare(images: Tensor, key: str, size: int | None, pool: int) -> Tensor:
    """First ``size`` images, scaled to [0, 1] and pooled, as (n, 1, H, W)."""
    size = len(images) if size is None else size
    require(1 <= size <= len(images), key, size, f"a whole number from 1 to {len(images)}")
    return F.avg_pool2d(images[:size].unsqueeze(1).float().div_(255.0), pool)
