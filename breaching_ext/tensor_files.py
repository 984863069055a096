"""Tensors read from files that a user names: checkpoints, trained networks, published weights."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch

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
