"""The objective of one candidate in two forms: Breaching's own, taught about frozen parameters, and a pure function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from breaching.attacks.auxiliaries.objectives import GradientLoss

from ..matching.client import client_update, draws, unscripted
from ..matching.engine import CandidateObjective
from ..matching.objectives import gradient_distance


def match_only_trainable(
    objective: Any,
    rec_models: Sequence[torch.nn.Module],
    loss_fn: Callable[..., torch.Tensor],
    shared_data: Sequence[dict[str, Any]],
) -> None:
    """Let an initialised Breaching objective skip parameters that do not require a gradient, are unused, or are shared.

    Clients send no gradient for frozen backbones, and zeros for a head that the loss does not look at; Breaching would
    ask autograd for both. Of a weight that two layers share, its local steps would move one alone. Where every
    parameter has a gradient of its own, nothing changes. A single gradient needs nothing but autograd, so that it works
    for models that torch.func cannot transform.
    """
    if not isinstance(objective, GradientLoss):
        return
    if objective.local_hyperparams is None:
        objective._grad_fn = partial(_trainable_gradient, loss_fn, objective.cfg_impl.mixed_precision)
        return
    frozen = any(not p.requires_grad for model in rec_models for p in model.parameters())
    unused = any(not bool(gradient.any()) for data in shared_data for gradient in data["gradients"])
    if not (frozen or unused or any(_shares_weights(model) for model in rec_models)):
        return
    hyperparams, mixed = objective.local_hyperparams, objective.cfg_impl.mixed_precision
    updates = {id(model): client_update(model, unscripted(loss_fn), hyperparams, mixed) for model in rec_models}
    objective._grad_fn = lambda model, candidate, labels: updates[id(model)](candidate, labels)


def _shares_weights(model: torch.nn.Module) -> bool:
    names = list(model.named_parameters(remove_duplicate=False))
    return len(names) > len(list(model.parameters()))


def _trainable_gradient(
    loss_fn: Callable[..., torch.Tensor],
    mixed_precision: bool,
    model: torch.nn.Module,
    candidate: torch.Tensor,
    labels: torch.Tensor,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Do what Breaching's `_grad_fn_single_step` does, for the parameters that a client sends gradients of."""
    with torch.autocast(candidate.device.type, enabled=mixed_precision):
        task_loss = loss_fn(model(candidate), labels)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient = torch.autograd.grad(  # zeros for parameters that the loss does not depend on
        task_loss, trainable, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return gradient, task_loss


def pure_objective(
    objective: Any,
    regularizers: Sequence[torch.nn.Module],
    loss_fn: Callable[..., torch.Tensor],
    cfg_impl: Any,
    rec_models: Sequence[torch.nn.Module],
    shared_data: Sequence[dict[str, Any]],
    labels: torch.Tensor,
    compiled: bool = False,
) -> tuple[CandidateObjective | None, str]:
    """Return Breaching's objective of one candidate as a pure function that torch.func can transform.

    The function maps images (B, C, H, W) to (objective, task loss), summed over the queries as in Breaching. Where
    there is no such function, returns None and the reason.

    With `compiled` it is written for torch.compile: derivatives are left to it, and the observed gradients of
    convolutions lie in memory as it lays out the candidates', so that comparing the two runs along both.
    """
    observed = [[_channels_last(g) if compiled else g for g in data["gradients"]] for data in shared_data]
    distances = [d for d in (gradient_distance(objective, gradient, compiled) for gradient in observed) if d]
    if not distances:
        return None, f"objective {type(objective).__name__} has no batched form"
    if any(draws(model) for model in rec_models):
        return None, "the model's dropout is on, and every candidate needs random numbers of its own"
    if cfg_impl.JIT:
        return None, f"impl.JIT={cfg_impl.JIT} makes a TorchScript model"
    mixed, task_weight = cfg_impl.mixed_precision, objective.task_regularization
    updates = [
        client_update(model, unscripted(loss_fn), data["metadata"]["local_hyperparams"], mixed)
        for model, data in zip(rec_models, shared_data, strict=True)
    ]
    terms = [getattr(regularizer, "by_differences", regularizer) for regularizer in regularizers]

    def candidate_objective(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, task_loss = images.new_zeros(()), images.new_zeros(())
        for update, distance in zip(updates, distances, strict=True):
            gradient, query_loss = update(images, labels)
            with torch.autocast(images.device.type, enabled=mixed):
                value = value + distance(gradient)
            if task_weight != 0:
                value = value + task_weight * query_loss
            task_loss = task_loss + query_loss.detach()
        for term in terms:
            value = value + term(images)
        return value, task_loss

    return candidate_objective, ""


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
