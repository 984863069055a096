"""Steps of full-batch gradient descent on log L, on all weights or in the span of the data.

A fully connected network is trained in the span of its data. The first layer is always W₁ = s·W₀ + Cᵀ X, so that
steps are taken on C (n, m), with the metric of W₁, and pre-activations are s·Z₀ + X Xᵀ C: exact, and for n ≪ D much
cheaper than steps on W₁.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .models import MLP, HomogeneousNetwork, is_plain_mlp
from .recipe import Recipe


def log_loss(margins: Tensor) -> Tensor:
    """Return log mean_i log(1 + exp(−q_i)) of margins q (n,), exact also where the loss itself underflows."""
    small = torch.nn.functional.softplus(-margins.clamp_max(30)).log()
    return torch.logsumexp(torch.where(margins > 30, -margins, small), dim=0) - math.log(len(margins))


class Descent:
    """Steps on all parameters of any network; `SpanDescent` takes them in the span of the data."""

    def __init__(self, model: HomogeneousNetwork, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
        self.model, self.images, self.labels, self.recipe = model, images, labels, recipe
        self.parameters: list[Tensor] = list(model.parameters())

    def tensors(self) -> list[Tensor]:
        """What a step changes."""
        return self.parameters

    def step(self) -> Tensor:
        """Take one step; returns log L before it."""
        value = log_loss(self.labels * self.model(self.images)[:, 0])
        gradients = torch.autograd.grad(value, self.parameters)
        self._move(value.detach(), self.parameters, list(gradients), sum(g.square().sum() for g in gradients))
        return value.detach()

    def _move(self, value: Tensor, tensors: list[Tensor], gradients: list[Tensor], squared_norm: Any) -> Tensor:
        rate = self.recipe.lr / squared_norm  # of log L, whose gradient is ∇L / L
        decay = 1 - self.recipe.weight_decay * rate / value.exp() if self.recipe.weight_decay else None
        if decay is not None:
            decay = decay.clamp_min(0.5)  # far out, where L is tiny, the decay would outrun the step
        with torch.no_grad():
            for tensor, gradient in zip(tensors, gradients, strict=True):
                if decay is not None:
                    tensor.mul_(decay)
                tensor.sub_(rate * gradient)
        return torch.ones_like(value) if decay is None else decay

    def write_back(self) -> None:
        """Bring the network's parameters up to date."""


class SpanDescent(Descent):
    """Steps of a fully connected network with C in place of the first layer."""

    model: MLP

    def __init__(self, model: MLP, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
        super().__init__(model, images, labels, recipe)
        first: Any = model.layers[0]
        self.x = (images - model.mean).flatten(1)  # (n, D)
        self.has_bias = first.bias is not None
        self.gram = self.x @ self.x.T + float(self.has_bias)
        self.start = first.weight.detach().clone()
        with torch.no_grad():
            self.start_z = first(self.x)  # (n, m)
        self.c = torch.zeros_like(self.start_z)
        self.shrink = torch.ones((), dtype=self.x.dtype, device=self.x.device)
        self.rest: list[Tensor] = [p for layer in list(model.layers)[1:] for p in layer.parameters()]

    def tensors(self) -> list[Tensor]:
        """What a step changes: C, the shrinkage s of the start, and the other layers."""
        return [self.c, self.shrink, *self.rest]

    def step(self) -> Tensor:
        """Take one step; returns log L before it."""
        z = (self.shrink * self.start_z + self.gram @ self.c).requires_grad_()
        value = log_loss(self.labels * self.model.after_first(z)[:, 0])
        of_z, *of_rest = torch.autograd.grad(value, [z, *self.rest])
        # the gradient of W₁ is of_zᵀ X, hence of C it is of_z, with norm ⟨of_z of_zᵀ, X Xᵀ⟩
        squared_norm = ((of_z @ of_z.T) * self.gram).sum() + sum(g.square().sum() for g in of_rest)
        self.shrink.mul_(self._move(value.detach(), [self.c, *self.rest], [of_z, *of_rest], squared_norm))
        return value.detach()

    def write_back(self) -> None:
        """Compute the first layer from C."""
        with torch.no_grad():
            first: Any = self.model.layers[0]
            first.weight.copy_(self.shrink * self.start + self.c.T @ self.x)
            if first.bias is not None:
                first.bias.copy_(self.c.sum(dim=0))


def descent_of(model: HomogeneousNetwork, images: Tensor, labels: Tensor, recipe: Recipe) -> Descent:
    """Return the cheapest exact form of the steps for a network."""
    if is_plain_mlp(model):
        return SpanDescent(model, images, labels, recipe)
    return Descent(model, images, labels, recipe)
