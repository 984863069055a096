"""What a client sends for given data, as a pure function: one gradient, or the change after several local steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.func import functional_call, grad_and_value
from torch.nn.attention import SDPBackend, sdpa_kernel

from .normalization import AffineBatchNorm

#: Within it attention is a row of plain operations: the fused kernels that torch takes otherwise have no second
#: derivative, and every matching needs one. It decorates functions, too.
twice_differentiable = partial(sdpa_kernel, SDPBackend.MATH)

#: (data (B, ...), labels) -> (one tensor for every matched parameter, task loss)
ClientUpdate = Callable[[torch.Tensor, torch.Tensor], tuple[tuple[torch.Tensor, ...], torch.Tensor]]


def matched_parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters that a client sends gradients of: those that require one, in model order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def draws(model: torch.nn.Module) -> bool:
    """Return whether a model draws random numbers: its dropout is on."""
    kind = torch.nn.modules.dropout._DropoutNd
    return any(isinstance(module, kind) and module.training and module.p > 0 for module in model.modules())


def client_update(
    model: torch.nn.Module,
    loss_fn: Callable[..., torch.Tensor],
    local_hyperparams: Mapping[str, Any] | None = None,
    mixed_precision: bool = False,
) -> ClientUpdate:
    """Return the function that maps data and labels to a client's update.

    Args:
        model: the model that the server sent; parameters that do not require a gradient stay fixed.
        loss_fn: (outputs, labels) -> scalar.
        local_hyperparams: None for one gradient; otherwise Breaching's dict of `steps`, `data_per_step`, `lr` and
            `labels` (one per step) for federated averaging, and the update is parameters after minus before.
        mixed_precision: run the model under autocast, as Breaching does.
    """
    server_state = {name: parameter.detach() for name, parameter in matched_parameters(model).items()}

    def task_loss(parameters: dict[str, torch.Tensor], data: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        affine = contextlib.nullcontext() if mixed_precision else AffineBatchNorm()
        with torch.autocast(data.device.type, enabled=mixed_precision), affine:
            return loss_fn(functional_call(model, parameters, (data,)), labels)

    gradient = grad_and_value(task_loss)

    def single_step(data: torch.Tensor, labels: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        gradients, value = gradient(server_state, data, labels)
        return tuple(gradients.values()), value

    def local_steps(data: torch.Tensor, labels: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        assert local_hyperparams is not None
        state, start, value = server_state, 0, data.new_zeros(())
        for step in range(local_hyperparams["steps"]):
            block = data[start : start + local_hyperparams["data_per_step"]]
            start = (start + local_hyperparams["data_per_step"]) % data.shape[0]
            gradients, value = gradient(state, block, local_hyperparams["labels"][step])
            state = {name: state[name] - local_hyperparams["lr"] * gradients[name] for name in state}
        return tuple(state[name] - server_state[name] for name in state), value

    return single_step if local_hyperparams is None else local_steps


def unscripted(loss_fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return an eager twin of a scripted CrossEntropyLoss; anything else comes back as it is.

    Breaching scripts its losses, and TorchScript's own automatic differentiation does not see torch.func's
    transforms.
    """
    if getattr(loss_fn, "original_name", None) != "CrossEntropyLoss" or not isinstance(loss_fn, torch.jit.ScriptModule):
        return loss_fn
    return torch.nn.CrossEntropyLoss(
        weight=loss_fn.weight,
        ignore_index=loss_fn.ignore_index,
        reduction=loss_fn.reduction,
        label_smoothing=loss_fn.label_smoothing,
    )
