"""Breaching's gradient distances without in-place updates, so that torch.func can transform them.

Each function takes the candidate's gradient and the observed one, two sequences of tensors of equal shapes, and
returns a scalar. Terms are added in Breaching's order, so the numbers are the same.
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
GradientDistance = Callable[[Gradient, Gradient], torch.Tensor]


def euclidean(rec: Gradient, data: Gradient) -> torch.Tensor:
    """Half the squared Euclidean distance."""
    return 0.5 * _total((r - d).pow(2).sum() for r, d in zip(rec, data, strict=True))


def l1(rec: Gradient, data: Gradient) -> torch.Tensor:
    """Half the L1 distance."""
    return 0.5 * _total((r - d).abs().sum() for r, d in zip(rec, data, strict=True))


def cosine(rec: Gradient, data: Gradient) -> torch.Tensor:
    """One minus the cosine similarity."""
    return 1 - _dot(rec, data) / (_squared_norm(rec).sqrt() * _squared_norm(data).sqrt())


def fast_cosine(rec: Gradient, data: Gradient) -> torch.Tensor:
    """One minus the cosine similarity, with no gradient through the norms."""
    return 1 - _dot(rec, data) / _squared_norm([r.detach() for r in rec]).sqrt() / _squared_norm(data).sqrt()


def masked_cosine(rec: Gradient, data: Gradient, mask_value: float) -> torch.Tensor:
    """One minus the cosine similarity over the entries in which the observed gradient is not small."""
    masks = [d.abs() > mask_value for d in data]
    rec = [r * m for r, m in zip(rec, masks, strict=True)]
    data = [d * m for d, m in zip(data, masks, strict=True)]
    return 1 - _dot(rec, data) / _squared_norm(rec).sqrt() / _squared_norm(data).sqrt()


def angular(rec: Gradient, data: Gradient, fudge_factor: float) -> torch.Tensor:
    """The angle between the gradients as a share of pi."""
    similarity = 1 - cosine(rec, data)
    return torch.acos(similarity.clamp(min=-1 + fudge_factor, max=1 - fudge_factor)) / torch.pi


def tag(rec: Gradient, data: Gradient, scale_scheme: str, tag_scale: float) -> torch.Tensor:
    """Squared Euclidean plus layer-weighted L1 distance (Deng et al., "TAG", EMNLP 2021)."""
    weights = torch.arange(len(rec), 0, -1, dtype=rec[0].dtype, device=rec[0].device)
    if scale_scheme == "linear":
        weights = weights / len(rec)
    elif scale_scheme == "exp":
        weights = weights.softmax(dim=0)
        weights = weights / weights[0]
    else:
        weights = torch.ones_like(weights)
    terms = zip(rec, data, weights, strict=True)
    return 0.5 * _total((r - d).pow(2).sum() + tag_scale * w * (r - d).abs().sum() for r, d, w in terms)


def gradient_distance(objective: Any) -> GradientDistance | None:
    """Return the pure function that equals a Breaching objective, its scale included; None if there is none.

    The exact type decides: a subclass may have changed anything.
    """
    build = _EQUIVALENTS.get(type(objective))
    if build is None:
        return None
    distance = build(objective)
    return lambda rec, data: distance(rec, data) * objective.scale


_EQUIVALENTS: dict[type, Callable[..., GradientDistance]] = {
    upstream.Euclidean: lambda o: euclidean,
    upstream.L1Loss: lambda o: l1,
    upstream.CosineSimilarity: lambda o: cosine,
    upstream.FastCosineSimilarity: lambda o: fast_cosine,
    upstream.MaskedCosineSimilarity: lambda o: partial(masked_cosine, mask_value=o.mask_value),
    upstream.AngularSimilarity: lambda o: partial(angular, fudge_factor=o.fudge_factor),
    upstream.EuclideanTag: lambda o: partial(tag, scale_scheme=o.scale_scheme, tag_scale=o.tag_scale),
}


def _dot(rec: Gradient, data: Gradient) -> torch.Tensor:
    return _total((r * d).sum() for r, d in zip(rec, data, strict=True))


def _squared_norm(gradient: Gradient) -> torch.Tensor:
    return _total(g.pow(2).sum() for g in gradient)


def _total(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(operator.add, terms)
