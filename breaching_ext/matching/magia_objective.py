"""MAGIA's objective as pure functions of gradients: the full-batch term, the subset term and their rescaling.

Notation. B images X with soft labels Y = softmax(logits); g_i is the gradient of the (soft-label) cross-entropy of
image i with respect to the model's parameters, G = (1/B) Σ_i g_i that of the batch mean, G_S = (1/S) Σ_{i∈S} g_i
that of the mean over a subset S of S images, and g* what the user shared: G at the true batch. All norms run over
all parameters; Σ_l runs over parameter tensors of n_l entries.

The objective of one candidate is

    L = α · c · ‖G − g*‖² + (1 − α) · c · sub + tv · TV(X),

with α = 0.999 and tv = 0.005 in the released script.

**Subset terms** (`sub`)

`released`
    Σ_l (1/n_l) ‖G_S/S − g*/B‖²_l, as in the released script. The cross-entropy is a mean already, so that this
    divides by the number of images twice: in sums it compares Σ_{i∈S} g_i / S² with Σ_i g*_i / B². At S = B it is
    Σ_l ‖G − g*‖²_l / (n_l B²): the full term with every tensor weighted by 1/(n_l B²), which explains why its pull
    is orders of magnitude below the full term's.
`mean`
    ‖G_S − g*‖²: the mean over the subset against the mean over the batch, i.e. the term above without the second
    division and with the full term's norm. At S = B it *is* the full term. For S < B it asks of a subset to look
    like the batch, which the truth does not: at the true batch its gradient is not zero.
`residual`
    ‖G_S − (B g* − Σ_{i∉S} sg(g_i)) / S‖², where sg( ) stops gradients. What the batch gradient leaves for the
    subset once the present estimate of the others is taken off. As B G = S G_S + Σ_{i∉S} g_i, its value is
    (B/S)² ‖G − g*‖² and its gradient the block of that for the images in S: "the share of the subset", zero at the
    true batch. At S = B it is the full term. This is our reading of "per-image signals", not the paper's formula.

**Rescaling** c ("closed-form combinatorial rescaling"; the paper's formula is not in its released code, so that
both named options are guesses)

`none`
    1.
`ratio`
    S/B = C(B−1, S−1)/C(B, S): the share of the subsets of size S that contain a given image.
`variance`
    (B − S)/(S (B − 1)): the variance of the mean of S images drawn without replacement, in units of the variance of
    one. It is 0 at S = B, which would switch the data term off and leave TV alone; there it is clamped to the value
    with one image left out of the numerator's reach, 1/(S (B − 1)) = 1/(B (B − 1)) (1 for B = 1).
a number
    that number.

c multiplies both data terms: with a constant S it does nothing but divide tv by c.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["RESCALINGS", "SUBSET_TERMS", "data_term", "full_term", "rescaling", "subset_term"]

Gradients = Sequence[torch.Tensor]

#: Valid values of `subset_term`.
SUBSET_TERMS = ("none", "released", "mean", "residual")
#: Valid names of `rescaling` (a number is valid, too).
RESCALINGS = ("none", "ratio", "variance")


def squared_distance(a: Gradients, b: Gradients) -> torch.Tensor:
    """‖a − b‖² over all parameters, a scalar."""
    return torch.stack([(x - y).square().sum() for x, y in zip(a, b, strict=True)]).sum()


def full_term(batch: Gradients, target: Gradients) -> torch.Tensor:
    """‖G − g*‖², a scalar."""
    return squared_distance(batch, target)


def subset_term(
    kind: str, subset: Gradients, batch: Gradients, target: Gradients, size: int, batch_size: int
) -> torch.Tensor:
    """The subset term (see the module's docstring).

    Args:
        kind: 'released', 'mean' or 'residual'.
        subset: G_S, gradient of the mean loss over the subset.
        batch: G, gradient of the mean loss over the batch; only 'residual' looks at it.
        target: g*.
        size: S.
        batch_size: B.

    Returns:
        A scalar.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind == "released":
        parts = [(s / size - t / batch_size).square().mean() for s, t in zip(subset, target, strict=True)]
        return torch.stack(parts).sum()
    if kind == "mean":
        return squared_distance(subset, target)
    if kind == "residual":
        share = size / batch_size
        others = [(g - share * s).detach() for g, s in zip(batch, subset, strict=True)]  # Σ_{i∉S} g_i / B
        left = [(t - o) / share for t, o in zip(target, others, strict=True)]
        return squared_distance(subset, left)
    raise ValueError(f"subset_term={kind!r} is unknown; valid: {', '.join(SUBSET_TERMS)}.")


def rescaling(kind: str | float, size: int, batch_size: int) -> float:
    """The factor c (see the module's docstring).

    Raises:
        ValueError: for an unknown name, or a number that is not finite and positive.
    """
    if kind == "none":
        return 1.0
    if kind == "ratio":
        return size / batch_size
    if kind == "variance":
        return max(batch_size - size, 1) / (size * max(batch_size - 1, 1))
    if isinstance(kind, str):
        raise ValueError(f"rescaling={kind!r} is unknown; valid: {', '.join(RESCALINGS)}, or a number.")
    if not (math.isfinite(kind) and kind > 0):
        raise ValueError(f"rescaling={kind} is out of range; valid: a positive number.")
    return float(kind)


def data_term(
    batch: Gradients,
    subset: Gradients | None,
    target: Gradients,
    *,
    kind: str,
    alpha: float,
    scale: float,
    size: int,
    batch_size: int,
) -> torch.Tensor:
    """α c ‖G − g*‖² + (1 − α) c sub, a scalar.

    Args:
        batch: G.
        subset: G_S; None (or kind 'none') leaves the subset term out.
        target: g*.
        kind: the subset term.
        alpha: α in [0, 1].
        scale: c.
        size: S.
        batch_size: B.
    """
    value = alpha * full_term(batch, target)
    if subset is not None and kind != "none":
        value = value + (1.0 - alpha) * subset_term(kind, subset, batch, target, size, batch_size)
    return scale * value
