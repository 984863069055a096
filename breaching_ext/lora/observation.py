"""What the server sees of a client's step: the adapted layers' full gradient, (∂A, ∂B), or what K local steps changed.

All of it is :func:`breaching_ext.matching.client.client_update`, with other parameters that require a gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import SharedDataError
from ..matching.client import client_update, matched_parameters
from ..modes import evaluating
from ..values import check_number, check_whole
from .adapters import adapt, factors_of, only_weights_of
from .decode import Factors

__all__ = [
    "Batch",
    "FactorUpdate",
    "Matrices",
    "as_weights",
    "factor_update",
    "full_gradient",
    "local_steps",
    "sent_update",
]

Matrices = dict[str, torch.Tensor]  # layer -> (o, i)


@dataclass(frozen=True)
class Batch:
    """Images (B, C, H, W) in the network's normalisation and labels (B,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class FactorUpdate:
    """What a client that trains adapters sends.

    Attributes:
        model: the adapted model in the state in which the client received it.
        tensors: one tensor for every trainable parameter, in model order: gradients, or after local steps changes.
        local: Breaching's `local_hyperparams`, None for one gradient.
    """

    model: nn.Module
    tensors: list[torch.Tensor]
    local: dict[str, Any] | None

    def __post_init__(self) -> None:
        """Refuse tensors that are not the trainable parameters' (SharedDataError)."""
        trainable = matched_parameters(self.model)
        if len(self.tensors) != len(trainable):
            raise SharedDataError(
                f"the update has {len(self.tensors)} tensors; valid: one for each of the model's {len(trainable)} "
                "parameters that require a gradient, in model order."
            )
        for (name, parameter), tensor in zip(trainable.items(), self.tensors, strict=True):
            if tensor.shape != parameter.shape:
                raise SharedDataError(f"{name}: shape {list(tensor.shape)}; valid: {list(parameter.shape)}.")

    def matrices(self, layers: Sequence[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return layer -> (∂A (r, i), ∂B (o, r)); after local steps the mean gradient, change / (−lr·K).

        Raises:
            ConfigError: for a layer without an adapter.
        """
        self.factors(layers)
        divisor = 1.0 if self.local is None else -self.local["lr"] * self.local["steps"]
        named = dict(zip(matched_parameters(self.model), self.tensors, strict=True))
        return {
            layer: (
                named[f"{layer}.lora_A.default.weight"].flatten(1) / divisor,
                named[f"{layer}.lora_B.default.weight"].flatten(1) / divisor,
            )
            for layer in layers
        }

    def factors(self, layers: Sequence[str]) -> dict[str, Factors]:
        """Return the public factors that the client started from."""
        return {layer: factors_of(self.model, layer) for layer in layers}


def local_steps(steps: int, rate: float, labels: torch.Tensor) -> dict[str, Any]:
    """Return Breaching's `local_hyperparams` for K steps of plain gradient descent on the whole batch.

    Raises:
        ConfigError: for K < 1 or a step size that is not positive.
    """
    check_whole("local_steps", steps, 1)
    check_number("local_lr", rate, above=0)
    return {"steps": steps, "lr": float(rate), "data_per_step": len(labels), "labels": [labels] * steps}


def sent_update(model: nn.Module, batch: Batch, local: dict[str, Any] | None = None) -> list[torch.Tensor]:
    """Return one tensor for every parameter that requires a gradient, as the client computes it (cross-entropy).

    In evaluation mode, in which attacks match it, whatever the model's own is; the model is not changed.
    """
    with evaluating(model):
        update, _ = client_update(model, torch.nn.functional.cross_entropy, local)(batch.images, batch.labels)
    return [tensor.detach() for tensor in update]


def full_gradient(model: nn.Module, layers: Sequence[str], batch: Batch) -> dict[str, torch.Tensor]:
    """Return layer -> G (o, i), the gradient of the layer's full weight."""
    frozen = only_weights_of(model, layers)
    named = dict(zip(matched_parameters(frozen), sent_update(frozen, batch), strict=True))
    return {layer: named[f"{layer}.weight"].flatten(1) for layer in layers}


def as_weights(model: nn.Module, matrices: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return layer matrices (o, i) in the shapes and the order of the model's trainable weights, for an attack on them.

    Args:
        model: one of which only layers' weights require a gradient; see :func:`.adapters.only_weights_of`.
        matrices: layer -> (o, i).
    """
    return [
        matrices[name.removesuffix(".weight")].reshape(parameter.shape)
        for name, parameter in matched_parameters(model).items()
    ]


def factor_update(
    model: nn.Module, factors: Mapping[str, Factors], batch: Batch, local: dict[str, Any] | None = None
) -> FactorUpdate:
    """Adapt the model with these factors and return what its client sends."""
    adapted = adapt(model, factors)
    return FactorUpdate(adapted, sent_update(adapted, batch, local), local)
