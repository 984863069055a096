"""Breaching's gradient distances without in-place updates, so that torch.func can transform them.

Each function takes a candidate's gradient and the observed one, arranged alike by :class:`Observed`, and returns a
scalar: Breaching's formula, up to the order in which terms are added.

For large models the passes over the gradients are what a distance costs, and for small ones the number of calls. So
what the observed gradient alone decides is worked out once; the derivative of a squared norm is one product (autograd
takes a power, a product with two and another product); and small gradients are joined into one vector. Compiled code
fuses all that by itself, and gets the plain form.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from breaching.attacks.auxiliaries import objectives as upstream

Gradient = Sequence[torch.Tensor]
GradientDistance = Callable[[Gradient], torch.Tensor]
Distance = Callable[[Gradient, "Observed"], torch.Tensor]

#: Gradients of at most so many entries are joined into one vector. Copying them costs less than a call each.
SMALL = 1024
#: Tensors of at least so many entries are added up row by row.
LARGE = 2**20


class _SquaredNorm(torch.autograd.Function):
    """The sum of squares of a tensor, with its derivative in one pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.square().sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (tensor,) = ctx.saved_tensors
        return 2 * grad * tensor


class Observed:
    """An observed gradient, with everything that no candidate changes.

    Args:
        gradient: one tensor a parameter.
        plain: leave derivatives to autograd, for a compiler.
        small: tensors of at most so many entries are joined.

    Attributes:
        tensors: the gradient as `arrange` gives it.
        squared_norm: its squared Euclidean norm.
    """

    def __init__(self, gradient: Gradient, plain: bool = False, small: int = SMALL) -> None:
        self._small = [index for index, tensor in enumerate(gradient) if tensor.numel() <= small]
        self._plain = plain
        self.tensors = self.arrange(gradient)
        self.squared_norm = self.square(self.tensors)

    def arrange(self, gradient: Gradient) -> list[torch.Tensor]:
        """Return a gradient with its small tensors joined into one vector, which comes last."""
        if not self._small:
            return list(gradient)
        large = [tensor for index, tensor in enumerate(gradient) if index not in self._small]
        return [*large, torch.cat([gradient[index].reshape(-1) for index in self._small])]

    def square(self, gradient: Gradient) -> torch.Tensor:
        """Return the squared Euclidean norm of an arranged gradient."""
        return total(_sum(g.pow(2)) if self._plain else _SquaredNorm.apply(g) for g in gradient)

    def dot(self, gradient: Gradient) -> torch.Tensor:
        """Return the inner product of an arranged gradient with the observed one."""
        return total(_sum(g * d) for g, d in zip(gradient, self.tensors, strict=True))


def euclidean(rec: Gradient, data: Observed) -> torch.Tensor:
    """Half the squared Euclidean distance."""
    return 0.5 * data.square([r - d for r, d in zip(rec, data.tensors, strict=True)])


def l1(rec: Gradient, data: Observed) -> torch.Tensor:
    """Half the L1 distance."""
    return 0.5 * total((r - d).abs().sum() for r, d in zip(rec, data.tensors, strict=True))


def cosine(rec: Gradient, data: Observed) -> torch.Tensor:
    """One minus the cosine similarity."""
    return 1 - data.dot(rec) / (data.square(rec).sqrt() * data.squared_norm.sqrt())


def fast_cosine(rec: Gradient, data: Observed) -> torch.Tensor:
    """One minus the cosine similarity, with no gradient through the norms."""
    return 1 - data.dot(rec) / total(r.detach().pow(2).sum() for r in rec).sqrt() / data.squared_norm.sqrt()


def masked_cosine(rec: Gradient, data: Observed, mask_value: float) -> torch.Tensor:
    """One minus the cosine similarity over the entries in which the observed gradient is not small."""
    masks = [d.abs() > mask_value for d in data.tensors]
    rec = [r * m for r, m in zip(rec, masks, strict=True)]
    norm = total((d * m).pow(2).sum() for d, m in zip(data.tensors, masks, strict=True)).sqrt()
    return 1 - data.dot(rec) / data.square(rec).sqrt() / norm


def angular(rec: Gradient, data: Observed, fudge_factor: float) -> torch.Tensor:
    """The angle between the gradients as a share of pi."""
    similarity = 1 - cosine(rec, data)
    return torch.acos(similarity.clamp(min=-1 + fudge_factor, max=1 - fudge_factor)) / torch.pi


def tag(rec: Gradient, data: Observed, scale_scheme: str, tag_scale: float) -> torch.Tensor:
    """Squared Euclidean plus layer-weighted L1 distance (Deng et al., "TAG", EMNLP 2021)."""
    weights = torch.arange(len(rec), 0, -1, dtype=rec[0].dtype, device=rec[0].device)
    if scale_scheme == "linear":
        weights = weights / len(rec)
    elif scale_scheme == "exp":
        weights = weights.softmax(dim=0)
        weights = weights / weights[0]
    else:
        weights = torch.ones_like(weights)
    terms = zip(rec, data.tensors, weights, strict=True)
    return 0.5 * total((r - d).pow(2).sum() + tag_scale * w * (r - d).abs().sum() for r, d, w in terms)


def gradient_distance(objective: Any, observed: Gradient, compiled: bool = False) -> GradientDistance | None:
    """Return the distance of a gradient from an observed one as a pure function; None if there is none.

    Args:
        objective: Breaching's, whose formula and scale it has. The exact type decides: a subclass may have changed
            anything.
        observed: the observed gradient, one tensor a parameter.
        compiled: whether torch.compile will see it.
    """
    build = _EQUIVALENTS.get(type(objective))
    if build is None:
        return None
    distance = build(objective)
    apart = compiled or isinstance(objective, upstream.EuclideanTag)  # its weights count the parameters
    data = Observed(observed, plain=compiled, small=-1 if apart else SMALL)
    return lambda rec: distance(data.arrange(rec), data) * objective.scale


_EQUIVALENTS: dict[type, Callable[[Any], Distance]] = {
    upstream.Euclidean: lambda o: euclidean,
    upstream.L1Loss: lambda o: l1,
    upstream.CosineSimilarity: lambda o: cosine,
    upstream.FastCosineSimilarity: lambda o: fast_cosine,
    upstream.MaskedCosineSimilarity: lambda o: partial(masked_cosine, mask_value=o.mask_value),
    upstream.AngularSimilarity: lambda o: partial(angular, fudge_factor=o.fudge_factor),
    upstream.EuclideanTag: lambda o: partial(tag, scale_scheme=o.scale_scheme, tag_scale=o.tag_scale),
}


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of all entries, of a large tensor row by row.

    Compiled code adds up in one pass, and loses two digits over millions of entries; rows keep them.
    """
    if tensor.numel() < LARGE or tensor.dim() < 2:
        return tensor.sum()
    return tensor.sum(tuple(range(1, tensor.dim()))).sum()  # flattened it would be copied: it may be channels-last


def total(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the sum of tensors, in their order."""
    return functools.reduce(operator.add, terms)
