"""Batch normalisation in evaluation mode as the affine map that it is.

torch's operator moves the candidates' axis into the channels and back for every use under vmap, and its second
derivative does so several times. With fixed statistics nothing of that is needed: written elementwise, the
derivatives are products and sums, which a compiler fuses with what stands beside them. Input minus mean comes first,
as in the definition, so that the gradient of the weight does not lose digits to a large mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def affine_batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Return `torch.nn.functional.batch_norm(..., training=False)` of an input (B, C, ...)."""
    shape = (1, -1, *[1] * (input.dim() - 2))
    output = (input - running_mean.view(shape)) * (running_var + eps).rsqrt().view(shape)
    if weight is not None:
        output = output * weight.view(shape)
    return output if bias is None else output + bias.view(shape)


class AffineBatchNorm(TorchFunctionMode):
    """Within the block, batch normalisation with fixed statistics is :func:`affine_batch_norm`."""

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.nn.functional.batch_norm:
            given = _arguments(*args, **(kwargs or {}))
            if given is not None:
                return affine_batch_norm(**given)
        return function(*args, **(kwargs or {}))


def _arguments(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[str, Any] | None:
    """Return the arguments of :func:`affine_batch_norm`; None where the statistics are the batch's own."""
    if training or running_mean is None or running_var is None:
        return None
    return {
        "input": input,
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
        "eps": eps,
    }
