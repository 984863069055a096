"""Tensors read from files that a user names (checkpoints, trained networks, published weights), and their digests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError


def read_tensors(path: str | os.PathLike, name: str, what: str, keys: Iterable[str] = ()) -> Any:
    """Read a file of torch's onto the CPU; nothing in it is executed.

    Args:
        path: the file.
        name: the config key that names it, for the error.
        what: what it should be, for the error.
        keys: what a dict in it must have.

    Raises:
        ConfigError: for a file that torch cannot read, or that holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file pickle and struct raise all kinds
        raise ConfigError(f"{name}={path} is not {what}; remove it or name another file.") from error
    if keys and not (isinstance(content, dict) and set(keys) <= set(content)):
        raise ConfigError(f"{name}={path} is not {what}; remove it or name another file.")
    return content


def raw_bytes(tensor: Tensor) -> bytes:
    """Return a tensor's values as they lie in memory, of any dtype (NumPy has no bfloat16)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digest(*tensors: Tensor) -> str:
    """Return what names the values of tensors and their order; a sum would be the same for images in another order."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(raw_bytes(tensor))
    return sha.hexdigest()
