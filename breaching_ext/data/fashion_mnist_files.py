"""Fashion-MNIST (Xiao et al. 2017) read from its idx files, as plain tensors: images in [0, 1] and classes."""

from __future__ import annotations

import gzip
import math
import os
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..values import is_whole

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FILES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
_LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}
_MAGIC = 0x800  # of idx files of bytes; the number of dimensions is added


def load_fashion_mnist(
    folder: str | Path | None = None,
    train_size: int | None = None,
    test_size: int | None = None,
    pool: int = 1,
    download: bool = True,
    *,
    key: str = "data.folder",
) -> tuple[Tensor, Tensor]:
    """Load the images, from a folder, from Debian's package or through torchvision's download.

    Args:
        folder: Folder with the idx files, plain or gzipped, or the root of a torchvision copy.
        train_size: Use the first so many training images; default all 60,000.
        test_size: The same for the 10,000 test images.
        pool: Average over ``pool`` × ``pool`` pixels.
        download: Whether torchvision may download the data when no copy is at hand.
        key: How the errors call ``folder``.

    Returns:
        Training and test images (n, 1, 28 / pool, 28 / pool), float32 in [0, 1].

    Raises:
        FileNotFoundError: If there is no copy; names the three ways to get one.
        ConfigError: If a size or ``pool`` is not valid, or a file is damaged.
    """
    if not is_whole(pool) or pool < 1 or 28 % pool:
        raise ConfigError(f"pool={pool!r} is not possible; valid: a divisor of 28 (1, 2, 4, 7, 14, 28).")
    root = _root(folder, download, key)
    train, test = (_read_bytes(root, _FILES[split], 3, key) for split in ("train", "test"))
    return _prepare(train, "train_size", train_size, pool), _prepare(test, "test_size", test_size, pool)


def load_fashion_mnist_labels(
    folder: str | Path | None = None, download: bool = True, *, key: str = "data.folder"
) -> tuple[Tensor, Tensor]:
    """The classes 0 to 9 of the training and test images, (n,) int64; arguments as :func:`load_fashion_mnist`."""
    root = _root(folder, download, key)
    train, test = (_read_bytes(root, _LABELS[split], 1, key).long() for split in ("train", "test"))
    return train, test


def _root(folder: str | Path | None, download: bool, key: str) -> Path:
    """The folder with the idx files; downloads them where that is allowed."""
    if not isinstance(folder, (str, Path, type(None))):
        raise ConfigError(f"{key}={folder} is not possible; valid: empty, or a folder with Fashion-MNIST's idx files.")
    root = _find(folder) or (_download(key) if download and folder is None else None)
    if root is None:
        raise FileNotFoundError(_advice(folder, key))
    return root


def _find(folder: str | Path | None) -> Path | None:
    """The folder that holds the idx files, or None."""
    given = [] if folder is None else [Path(folder).expanduser()]
    roots = given or [DEBIAN_FOLDER, _cache_root()]
    for root in (place for base in roots for place in (base, base / "FashionMNIST" / "raw")):
        if all(_file(root, name) for name in _FILES.values()):
            return root
    return None


def _file(root: Path, name: str) -> Path | None:
    """An idx file, gzipped or plain."""
    names = (root / f"{name}.gz", root / name)
    return next((path for path in names if path.is_file()), None)


def _cache_root() -> Path:
    """Where torchvision's download goes."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "breaching_ext"


def _download(key: str) -> Path | None:
    """Let torchvision download the data, whole or not at all.

    Raises:
        FileNotFoundError: If that fails: no network, no space.
    """
    from torchvision.datasets import FashionMNIST

    target = _cache_root() / "FashionMNIST" / "raw"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_cache_root()) as beside:
            FashionMNIST(beside, download=True)
            if not _find(_cache_root()):  # another process may have been faster
                shutil.rmtree(target, ignore_errors=True)
                os.replace(Path(beside) / "FashionMNIST" / "raw", target)
    except (OSError, RuntimeError) as error:
        if not _find(_cache_root()):
            raise FileNotFoundError(_advice(None, key, f" ({type(error).__name__}: {error})")) from error
    return _find(_cache_root())


def _advice(folder: str | Path | None, key: str, failure: str = "") -> str:
    """The three ways to get the data, in one line; `failure` says why downloading did not work."""
    here = f"in {DEBIAN_FOLDER} or {_cache_root()}, nor by download{failure}"
    where = f"in {folder}" if folder is not None else here
    return (
        f"Fashion-MNIST was not found {where}. Either connect to a network, so that torchvision downloads "
        "it; or install Debian's package (apt-get install dataset-fashion-mnist); "
        f"or give a folder with its idx files ({key}=PATH)."
    )


def _read_bytes(root: Path, name: str, dimensions: int, key: str) -> Tensor:
    """Read an idx file of bytes with so many dimensions, for example images as (n, 28, 28)."""
    path = _file(root, name)
    if path is None:
        raise FileNotFoundError(f"{root} has no {name}, plain or gzipped.")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"{path} is damaged ({error}); delete it to get it anew.") from error
    header = 4 * (dimensions + 1)
    magic, *shape = struct.unpack(f">{dimensions + 1}I", raw[:header].ljust(header, b"\0"))
    if magic != _MAGIC + dimensions:
        raise ConfigError(f"{key}={root} holds a {path.name} of another kind; valid: Fashion-MNIST's idx files.")
    expected = header + math.prod(shape)
    if len(raw) != expected:
        raise ConfigError(f"{path} is damaged ({len(raw)} bytes, not {expected}); delete it to get it anew.")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy())


def _prepare(images: Tensor, key: str, size: int | None, pool: int) -> Tensor:
    """First ``size`` images, scaled to [0, 1] and pooled, as (n, 1, H, W)."""
    size = len(images) if size is None else size
    if not is_whole(size) or not 1 <= size <= len(images):
        raise ConfigError(f"{key}={size!r} is not possible; valid: a whole number from 1 to {len(images)}.")
    return F.avg_pool2d(images[:size].unsqueeze(1).float().div_(255.0), pool)
