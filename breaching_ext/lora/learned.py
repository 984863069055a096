"""A decoder that learns from simulated pairs what the factors do not show.

The server knows the model and the factors, so it can compute, for public images, both what a client would send and the
full gradient. What the factors show of G, the minimum-norm estimate, needs no learning; the rest,
(I − P_B) G (I − P_A), is predicted from it by kernel ridge regression. A prediction is a combination of the rests of
public gradients and so stays where nothing was observed: the decoded gradient always agrees with the observation.

Kernel and ridge are chosen by the cosine on public pairs that were held out; among the choices is an infinite ridge,
which predicts nothing and leaves the closed form. The client's data play no part in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from .decode import Factors, unseen

__all__ = ["RidgeDecoder", "seen_and_unseen"]

#: ridge as a share of the kernel's mean diagonal; infinity predicts nothing
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))
KERNELS = ("linear", "gaussian")

#: layer -> tensors (n, o, i), a stack of matrices
Stacks = Mapping[str, torch.Tensor]


def seen_and_unseen(gradients: Stacks, factors: Mapping[str, Factors]) -> tuple[Stacks, Stacks]:
    """Split stacks of full gradients, layer -> (n, o, i), into what the factors show and the rest."""
    rest = {name: unseen(stack, factors[name]) for name, stack in gradients.items()}
    return {name: stack - rest[name] for name, stack in gradients.items()}, rest


@dataclass(frozen=True)
class RidgeDecoder:
    """A fitted decoder.

    Attributes:
        features: (n, p), unit-norm features of the public pairs.
        rest: layer -> (n, o, i), the public gradients' unseen parts divided by the norm of their features.
        weights: (n, n), the inverse of the ridged kernel.
        scales: layer -> factor by which a layer's entries enter the features.
        kernel, width, ridge: the choice that the held-out public pairs made.
        held_out_cosine: mean cosine of decoded to true gradients on the held-out public pairs.
        closed_form_cosine: the same for the closed form alone.
    """

    features: torch.Tensor
    rest: Stacks
    weights: torch.Tensor
    scales: Mapping[str, float]
    kernel: str
    width: float
    ridge: float
    held_out_cosine: float
    closed_form_cosine: float

    @classmethod
    def fit(cls, gradients: Stacks, factors: Mapping[str, Factors], held_out: torch.Tensor) -> RidgeDecoder:
        """Choose kernel and ridge on the held-out public gradients, then fit to all of them.

        Args:
            gradients: layer -> (n, o, i), full gradients of public batches.
            factors: layer -> the factors of the client's adapter.
            held_out: (n,) booleans, the pairs to choose with; they should resemble the others no more than the client's
                data do.

        Raises:
            ConfigError: with fewer than two pairs on either side.
        """
        count = int(held_out.sum())
        if min(count, len(held_out) - count) < 2:
            raise ConfigError(f"public={len(held_out)} gives too few pairs to fit and hold out; valid: 4 or more.")
        seen, rest = seen_and_unseen(gradients, factors)
        scales = {
            name: 1 / max(float(stack.square().sum(dim=(1, 2)).mean()) ** 0.5, 1e-30) for name, stack in seen.items()
        }
        features, norms = _features(seen, scales)
        rest = {name: stack / norms[:, None, None] for name, stack in rest.items()}
        width = float(torch.cdist(features, features).median()) or 1.0
        score = _Validation(features, norms, gradients, seen, rest, held_out)
        scored = {(kernel, ridge): score(kernel, width, ridge) for kernel in KERNELS for ridge in RIDGES}
        kernel, ridge = max(scored, key=lambda choice: scored[choice])
        weights = _solve(_kernel(kernel, width, features, features), ridge)
        chosen = (kernel, width, ridge, scored[kernel, ridge], scored["linear", float("inf")])
        return cls(features, rest, weights, scales, *chosen)

    def complete(self, estimate: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add the predicted rest to minimum-norm estimates, layer -> (o, i)."""
        stacks = {name: matrix[None] for name, matrix in estimate.items()}
        features, norms = _features(stacks, self.scales)
        coefficients = _kernel(self.kernel, self.width, features, self.features) @ self.weights  # (1, n)
        return {
            name: matrix + norms[0] * torch.einsum("n,noi->oi", coefficients[0], self.rest[name])
            for name, matrix in estimate.items()
        }


class _Validation:
    """Mean cosine of the decoded to the true gradient on the held-out pairs, for a kernel and a ridge.

    Seen and unseen parts are orthogonal, so the cosine needs inner products of unseen parts only: a Gram matrix.
    """

    def __init__(
        self,
        features: torch.Tensor,
        norms: torch.Tensor,
        gradients: Stacks,
        seen: Stacks,
        rest: Stacks,
        held_out: torch.Tensor,
    ) -> None:
        self.features, self.held_out = features, held_out
        flat = torch.cat([stack.flatten(1) for stack in rest.values()], dim=1)
        self.gram = flat @ flat.T  # (n, n), of rests over feature norms
        self.seen = sum(stack.square().sum(dim=(1, 2)) for stack in seen.values()) / norms.square()  # (n,)
        self.total = sum(stack.square().sum(dim=(1, 2)) for stack in gradients.values()) / norms.square()

    def __call__(self, kernel: str, width: float, ridge: float) -> float:
        test, train = self.held_out, ~self.held_out
        weights = _solve(_kernel(kernel, width, self.features[train], self.features[train]), ridge)
        coefficients = _kernel(kernel, width, self.features[test], self.features[train]) @ weights  # (t, m)
        dot = self.seen[test] + (coefficients * self.gram[test][:, train]).sum(dim=1)
        predicted = ((coefficients @ self.gram[train][:, train]) * coefficients).sum(dim=1)
        norm = (self.seen[test] + predicted).clamp_min(1e-300).sqrt() * self.total[test].clamp_min(1e-300).sqrt()
        return float((dot / norm).mean())


def _features(seen: Stacks, scales: Mapping[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return unit-norm features (n, p) and their norms (n,); gradients of unequal loss differ in size, not in kind."""
    flat = torch.cat([scales[name] * stack.flatten(1) for name, stack in seen.items()], dim=1)
    norms = flat.norm(dim=1).clamp_min(1e-30)
    return flat / norms[:, None], norms


def _kernel(kind: str, width: float, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    if kind == "linear":
        return first @ second.T
    return torch.exp(-0.5 * (torch.cdist(first, second) / width).square())


def _solve(kernel: torch.Tensor, ridge: float) -> torch.Tensor:
    if ridge == float("inf"):
        return torch.zeros_like(kernel)
    identity = torch.eye(len(kernel), dtype=kernel.dtype)
    return torch.linalg.inv(kernel + ridge * float(kernel.diagonal().mean()) * identity)
