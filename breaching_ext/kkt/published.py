"""Networks from files: published checkpoints, such as the paper's, and state dicts of one's own."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..tensor_files import read_tensors
from .models import MLP, HomogeneousNetwork

log = logging.getLogger(__name__)

#: keys under which training scripts keep the state dict, beside the epoch, the optimizer and the like
_NESTS = ("state_dict", "model_state_dict", "model", "net")


def load_checkpoint(model: HomogeneousNetwork, path: str | Path) -> None:
    """Load a released state dict into a network, for example one of the paper's D-1000-1000-1 checkpoints.

    Args:
        model: the network; it is changed in place.
        path: a file written with torch.save: a state dict, or a dict with one under 'state_dict', 'model_state_dict',
            'model' or 'net'. A `mean` in it becomes the network's mean image, and so does an image `mean` beside it.

    Raises:
        ConfigError: when there is no such file, no state dict in it, or its shapes do not fit the network.
    """
    state = read_state_dict(path)
    own = {name: p for name, p in model.state_dict().items() if name != "mean"}
    found = {name: tensor for name, tensor in state.items() if name in own or name.startswith(("layers.", "features."))}
    if {k: tuple(v.shape) for k, v in found.items()} != {k: tuple(v.shape) for k, v in own.items()}:
        raise ConfigError(f"{path} holds {_shapes(found or state)}; the network needs {_shapes(own)}.")
    if "mean" in state and state["mean"].numel() != model.mean.numel():
        raise ConfigError(f"{path} holds mean {tuple(state['mean'].shape)}; the network needs {tuple(model.shape)}.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])
        if "mean" in state:
            model.mean.copy_(state["mean"].reshape(model.shape))


def network_from_checkpoint(path: str | Path, shape: tuple[int, ...]) -> MLP:
    """Build the fully connected network that a checkpoint with keys `layers.N.weight` belongs to, and load it.

    Args:
        path: see :func:`load_checkpoint`.
        shape: of an image, (C, H, W).

    Raises:
        ConfigError: when the file does not describe a network for such images.
    """
    state = read_state_dict(path)
    weights = [state[f"layers.{i}.weight"] for i in range(len(state)) if f"layers.{i}.weight" in state]
    biases = {name for name in state if name.startswith("layers.") and name.endswith(".bias")}
    if not weights or any(w.ndim != 2 for w in weights):
        raise ConfigError(f"{path} holds {_shapes(state)}; expected layers.0.weight, layers.1.weight, ... (out, in).")
    hidden = {f"layers.{index}.bias" for index in range(len(weights) - 1)}
    few = "none" if not biases else "first" if biases == {"layers.0.bias"} else None
    kind = few or ("hidden" if biases == hidden else "all")
    if kind in ("hidden", "all"):
        log.warning(
            "%s has biases beyond the first layer: the network is not homogeneous, KKT holds but roughly.", path
        )
    model = MLP(shape, [len(w) for w in weights[:-1]], kind)
    load_checkpoint(model, path)
    return model


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in a file, without a prefix `module.` or `model.`; `convnet.` of the paper's is `layers.`.

    What lies beside the state dict is left alone, except an image under `mean`.

    Raises:
        ConfigError: when there is none.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigError(f"case.training.weights={path} does not exist.")
    content = read_tensors(path, "case.training.weights", "a file of tensors that torch saved")
    state, mean = content, None
    while (inner := _nested(state)) is not None:
        mean = state.get("mean", mean)
        state = inner
    tensors = _tensors(state)
    if not tensors:
        raise ConfigError(f"{path} holds no state dict, nor a dict with one under {', '.join(_NESTS)}.")
    plain = {k.removeprefix("module.").removeprefix("model."): v for k, v in tensors.items()}
    if isinstance(mean, Tensor) and mean.ndim > 1:  # numbers a channel are the constants of a normalisation
        plain.setdefault("mean", mean)
    return {re.sub(r"^convnet\.", "layers.", k): v for k, v in plain.items()}


def _nested(content: Any) -> Mapping[str, Any] | None:
    """Return the dict with tensors that a file's dict has under one of :data:`_NESTS`, or None."""
    if not isinstance(content, Mapping):
        return None
    inside = (content.get(key) for key in _NESTS)
    return next((inner for inner in inside if _tensors(inner) or _nested(inner) is not None), None)


def _tensors(content: Any) -> dict[str, Tensor]:
    """Return the tensors of a dict by name; none of anything else."""
    if not isinstance(content, Mapping):
        return {}
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _shapes(state: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items()) or "nothing"
