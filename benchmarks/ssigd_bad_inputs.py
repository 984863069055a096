"""Inputs without a gradient, for benchmarks/ssigd.py: what our layer and cvxpylayers say of them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from breaching_ext.ssigd import QPLayer

BOX = np.vstack([np.eye(2), -np.eye(2)])
BAD_INPUTS: dict[str, tuple[Any, Any, Any, Any]] = {
    "infeasible": (np.eye(2), [[1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], [0.0, 0.0], [-1.0, 0.0, 0.0]),
    "crossed bounds": (np.eye(2), BOX, [0.0, 0.0], [-1.0, 1.0, -1.0, 1.0]),
    "indefinite Q": (np.diag([1.0, -1.0]), BOX, [0.3, 0.2], np.ones(4)),
    "singular Q": (np.diag([1.0, 0.0]), BOX, [0.3, 0.2], np.ones(4)),
    "NaN in c": (np.eye(2), BOX, [np.nan, 0.0], np.ones(4)),
    "infinite c": (np.eye(2), BOX, [np.inf, 0.0], np.ones(4)),
    "NaN in h": (np.eye(2), BOX, [0.0, 0.0], [np.nan, 1.0, 1.0, 1.0]),
    "duplicate active rows": (np.eye(2), np.vstack([BOX, BOX[:1]]), [-3.0, 0.2], np.ones(5)),
    "redundant vertex": (np.eye(2), [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [-5.0, -5.0], [1.0, 1.0, 2.0]),
    "equal bounds": (np.eye(2), BOX, [0.3, 0.2], [0.5, 1.0, -0.5, 1.0]),
    "weakly active": (np.eye(2), BOX, [-1.0, 0.2], np.ones(4)),
}


class _Messages(logging.Handler):
    """Collects log messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def bad_inputs() -> list[dict[str, str]]:
    """Say what the layer, its batch and cvxpylayers do with each: an error, a logged warning, or silence."""
    rows = []
    for name, data in BAD_INPUTS.items():
        arrays = [np.array(value, dtype=float) for value in data]
        rows.append({
            "input": name,
            "QPLayer": outcome(lambda a=arrays: layer_gradient(*a)),
            "QPLayer, batch": outcome(lambda a=arrays: layer_gradient(*a, batch=True)),
            "cvxpylayers": outcome(lambda a=arrays: cvxpylayers_gradient(*a)),
        })  # fmt: skip
    return rows


def outcome(call: Callable[[], torch.Tensor]) -> str:
    handler = _Messages()
    logger = logging.getLogger("breaching_ext.ssigd")
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = call()
    except Exception as error:
        return type(error).__name__
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
    told_by_library = any(not issubclass(item.category, DeprecationWarning) for item in caught)
    told = "logged warning, " if handler.messages else "warning, " if told_by_library else "SILENT, "
    return told + f"gradient {np.array2string(value.numpy(), precision=3)}"


def layer_gradient(Q: np.ndarray, G: np.ndarray, c: np.ndarray, h: np.ndarray, *, batch: bool = False) -> torch.Tensor:
    layer = QPLayer(torch.from_numpy(Q), torch.from_numpy(G))
    linear = torch.from_numpy(c).requires_grad_()
    right = torch.from_numpy(h)
    y = layer(linear.expand(2, -1), right.expand(2, -1))[0] if batch else layer(linear, right)
    return torch.autograd.grad(y.sum(), linear)[0]


def cvxpylayers_gradient(Q: np.ndarray, G: np.ndarray, c: np.ndarray, h: np.ndarray) -> torch.Tensor:
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    y, linear, right = cp.Variable(len(c)), cp.Parameter(len(c)), cp.Parameter(len(h))
    objective = cp.Minimize(0.5 * cp.quad_form(y, Q) + linear @ y)
    layer = CvxpyLayer(cp.Problem(objective, [G @ y <= right]), parameters=[linear, right], variables=[y])
    value = torch.from_numpy(c).requires_grad_()
    (solution,) = layer(value, torch.from_numpy(h))
    return torch.autograd.grad(solution.sum(), value)[0]
