"""MAGIA's objective of one candidate and its gradients: by plain autograd, and as a function of a whole stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.func import grad, grad_and_value, vmap

from .evaluation import Evaluate
from .magia_objective import data_term, full_term, rescaling
from .magia_problem import SubsetTerm, Target

ImagePrior = Callable[[torch.Tensor], torch.Tensor]

#: values, rankings, gradients in pixels and in logits; of one candidate, or of a stack
Evaluated = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class SubsetObjective:
    """What a candidate's pixels and label logits are judged by.

    Attributes:
        target: what is matched.
        term: the subset term.
        prior: image prior of one candidate's pixels (B, C, H, W), before its weight.
    """

    target: Target
    term: SubsetTerm
    prior: ImagePrior

    def of_gradients(
        self,
        batch: Sequence[torch.Tensor],
        subset: Sequence[torch.Tensor] | None,
        gradients: Sequence[torch.Tensor],
        pixels: torch.Tensor,
        size: int,
        prior_weight: float | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The objective of a candidate, and what its points are ranked by."""
        term, count, prior = self.term, len(pixels), prior_weight * self.prior(pixels)
        full = full_term(batch, gradients) + prior
        if subset is None:
            return full, full.detach()
        scale = rescaling(term.rescaling, size, count)
        data = data_term(
            *(batch, subset, gradients),
            kind=term.kind,
            alpha=term.alpha,
            scale=scale,
            size=size,
            batch_size=count,
        )
        return data + prior, full.detach()

    def evaluation(self, use: bool) -> Evaluate:
        """A pure function of pixels, logits, subsets and prior weight, for all candidates at once."""
        model_gradient = grad(self.target.loss)

        def objective(
            pixels: torch.Tensor,
            logits: torch.Tensor,
            index: torch.Tensor,
            weight: torch.Tensor,
            parameters: dict[str, torch.Tensor],
            gradients: list[torch.Tensor],
        ) -> tuple[torch.Tensor, torch.Tensor]:
            probs = logits.softmax(dim=-1)
            batch = list(model_gradient(parameters, pixels, probs).values())
            if not use:
                return self.of_gradients(batch, None, gradients, pixels, len(pixels), weight)
            subset = list(model_gradient(parameters, pixels[index], probs[index]).values())
            return self.of_gradients(batch, subset, gradients, pixels, len(index), weight)

        own = 0 if self.target.per_candidate else None
        gradient = grad_and_value(objective, argnums=(0, 1), has_aux=True)
        run = vmap(gradient, in_dims=(0, 0, 0, None, own, own))

        def evaluate(*stacks: torch.Tensor) -> tuple:  # named as `compilation` expects it
            pixels, logits, index, weight = stacks
            if len(pixels) == 1:  # an axis of one candidate would be carried through every operation
                gradients, (value, ranking) = gradient(pixels[0], logits[0], index[0], weight, *self.target.of(0))
                return tuple(g.unsqueeze(0) for g in gradients), value.unsqueeze(0), ranking.unsqueeze(0)
            target = dict(self.target.parameters), list(self.target.gradients)
            gradients, (values, rankings) = run(pixels, logits, index, weight, *target)
            return gradients, values, rankings

        return evaluate

    def of_candidate(
        self, n: int, pixels: torch.Tensor, logits: torch.Tensor, index: torch.Tensor | None, prior_weight: float
    ) -> Evaluated:
        """Value, ranking and gradients of candidate `n` with plain autograd, which any model and loss allow."""
        pixels, logits = pixels.clone().requires_grad_(), logits.clone().requires_grad_()
        parameters, gradients = self.target.of(n)
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        probs = logits.softmax(dim=-1)
        batch = self._gradient(leaves, pixels, probs)
        subset = None if index is None else self._gradient(leaves, pixels[index], probs[index])
        size = len(pixels) if index is None else len(index)
        value, ranking = self.of_gradients(batch, subset, gradients, pixels, size, prior_weight)
        in_pixels, in_logits = torch.autograd.grad(value, [pixels, logits])
        return value.detach(), ranking, in_pixels, in_logits

    def _gradient(
        self, leaves: dict[str, torch.Tensor], pixels: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        loss, wanted = self.target.loss(leaves, pixels, probs), list(leaves.values())
        # a parameter that is not used has a gradient of zeros, as torch.func's have
        return torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
