"""The gradient of a full layer from the gradients of its LoRA factors, in closed form.

A layer with weight W = W₀ + s·B A, W (o, i), B (o, r), A (r, i), has G = ∂L/∂W, and the chain rule gives what a
client shares:

    ∂A = s·Bᵀ G      (r, i)
    ∂B = s·G Aᵀ      (o, r)

Both are linear in G. Their common kernel is { Z : BᵀZ = 0 and Z Aᵀ = 0 }, the matrices with columns orthogonal to B's
and rows orthogonal to A's, of dimension (o − rank B)·(i − rank A). Hence

- **for every G**: G is determined if and only if rank A = i or rank B = o (:func:`determines`);
- **for one G**: what is missing is exactly (I − P_B) G (I − P_A), where P_B projects on the columns of B and P_A on the
  rows of A (:func:`unseen`); the minimum-norm estimate is G without it (:func:`minimum_norm`);
- **for G of low rank**: where rank(Bᵀ G Aᵀ) = rank(G), the two-sided sketch G = ∂B (∂A Aᵀ)⁺ ∂A / s holds
  (:func:`low_rank_sketch`), and supplies the missing part. With B and A in general position that is rank(G) ≤ r, which
  the server knows beforehand where few examples, tokens or positions enter a layer (:func:`completed`).

References:
    Hu et al., "LoRA: Low-rank adaptation of large language models", ICLR 2022.
    Tropp, Yurtsever, Udell & Cevher, "Practical sketching algorithms for low-rank matrix approximation", SIAM J.
    Matrix Anal. Appl. 38 (2017); Nakatsukasa, "Fast and stable randomized low-rank matrix approximation",
    arXiv:2009.11392 (the two-sided sketch, "generalised Nyström").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = [
    "Factors",
    "completed",
    "cosine",
    "determines",
    "factor_gradients",
    "is_determined",
    "low_rank_sketch",
    "minimum_norm",
    "rank",
    "unseen",
]

#: Singular values below this share of the largest count as zero, or below ROUNDING of the type for each row or column.
TOLERANCE, ROUNDING = 1e-10, 10.0


@dataclass(frozen=True)
class Factors:
    """The public half of an adapted layer.

    Attributes:
        a: A (r, i).
        b: B (o, r).
        scale: s, peft's `lora_alpha / r`.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def factor_gradients(gradient: torch.Tensor, factors: Factors) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (∂A, ∂B) for the gradient G (o, i) of the full weight."""
    return factors.scale * factors.b.T @ gradient, factors.scale * gradient @ factors.a.T


def not_zero(values: torch.Tensor, matrix: torch.Tensor, tolerance: float | None = None) -> torch.Tensor:
    """Return which singular values of a matrix are more than rounding, (k,) bool; none of a zero matrix.

    Args:
        values: singular values, (k,).
        matrix: what they are of.
        tolerance: least share of the largest; None is 1e-10, or ten roundings for each row or column of the longer
            side, whichever is more (1e-10 in double precision up to 45,000, 1e-3 in single for 1,000).
    """
    if tolerance is None:
        tolerance = max(TOLERANCE, ROUNDING * max(matrix.shape) * torch.finfo(matrix.dtype).eps)
    return values > tolerance * values.max() if values.numel() else values > 0


def rank(matrix: torch.Tensor, tolerance: float | None = None) -> int:
    """Numerical rank: the number of singular values that are `not_zero`."""
    return int(not_zero(torch.linalg.svdvals(matrix), matrix, tolerance).sum())


def determines(factors: Factors, tolerance: float | None = None) -> bool:
    """Return whether the factors determine every gradient: rank A = i or rank B = o."""
    wide = rank(factors.a, tolerance) == factors.a.shape[1]
    return wide or rank(factors.b, tolerance) == factors.b.shape[0]


def is_determined(factors: Factors, rank_bound: int | None = None, tolerance: float | None = None) -> bool:
    """Return whether (∂A, ∂B) of one step determine a gradient of which only `rank(G) <= rank_bound` is known.

    The second way, rank(B), rank(A) >= rank_bound, holds for almost all gradients of that rank: all but those whose
    columns or rows meet the kernel of Bᵀ or A in more than zero.
    """
    if determines(factors, tolerance):
        return True
    if rank_bound is None:
        return False
    return min(rank(factors.a, tolerance), rank(factors.b, tolerance)) >= rank_bound


def unseen(matrix: torch.Tensor, factors: Factors, tolerance: float | None = None) -> torch.Tensor:
    """Return (I − P_B) M (I − P_A), the part of M (..., o, i) on which neither ∂A nor ∂B depends."""
    columns, rows = _basis(factors.b, tolerance), _basis(factors.a.T, tolerance)  # (o, rank B), (i, rank A)
    rest = matrix - columns @ (columns.T @ matrix)
    return rest - (rest @ rows) @ rows.T


def minimum_norm(
    grad_a: torch.Tensor, grad_b: torch.Tensor, factors: Factors, tolerance: float | None = None
) -> torch.Tensor:
    """Return the least-squares estimate of G (o, i) of smallest norm.

    It minimises ‖s·Bᵀ G − ∂A‖² + ‖s·G Aᵀ − ∂B‖². In the bases of singular vectors B = U diag(β) Yᵀ, A = X diag(α) Vᵀ
    the entries of g = Uᵀ G V decouple, s·β_j g_jk = (Yᵀ∂A V)_jk and s·α_k g_jk = (Uᵀ∂B X)_jk, so each is a weighted
    mean, and an entry that neither equation sees is zero.

    Args:
        grad_a: ∂A (r, i).
        grad_b: ∂B (o, r).
        factors: A, B and s.
        tolerance: relative size below which a singular value of A or B counts as zero; see :func:`not_zero`.
    """
    u, beta, y = _full_svd(factors.b, tolerance)  # (o, o), (o,), (r, o)
    v, alpha, x = _full_svd(factors.a.T, tolerance)  # (i, i), (i,), (r, i)
    seen = beta[:, None] * (y.T @ grad_a @ v) + alpha[None, :] * (u.T @ grad_b @ x)  # (o, i)
    weight = factors.scale * (beta[:, None].square() + alpha[None, :].square())
    sees = weight != 0  # of the sign of s
    entries = torch.where(sees, seen / torch.where(sees, weight, 1.0), 0.0)
    return u @ entries @ v.T


def low_rank_sketch(
    grad_a: torch.Tensor,
    grad_b: torch.Tensor,
    factors: Factors,
    rank_bound: int | None = None,
    tolerance: float | None = None,
) -> torch.Tensor:
    """Return ∂B (∂A Aᵀ)⁺ ∂A / s (o, i), which equals G if rank(Bᵀ G Aᵀ) = rank(G).

    Proof: let G = L R with full column and row rank q, and let BᵀL and R Aᵀ keep rank q. Then ∂A Aᵀ = s (BᵀL)(R Aᵀ) is
    a full-rank factorisation, its pseudo-inverse is (R Aᵀ)⁺ (BᵀL)⁺ / s, and
    ∂B (∂A Aᵀ)⁺ ∂A / s = L (R Aᵀ)(R Aᵀ)⁺ (BᵀL)⁺(BᵀL) R = L R = G.

    The formula does not name B and does not depend on the size of ∂A: after several local steps, which move B away from
    zero, it uses a ∂A that a first step from B = 0 leaves at zero.

    Args:
        grad_a, grad_b, factors, tolerance: see :func:`minimum_norm`.
        rank_bound: largest rank to invert the core at; keeps what is above the known rank, which can only be noise or
            drift over local steps, out of the pseudo-inverse.
    """
    core = grad_a @ factors.a.T  # (r, r)
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    kept = not_zero(values, core, tolerance)
    if rank_bound is not None:
        kept = kept & (torch.arange(len(values), device=values.device) < rank_bound)
    inverse = (right[kept].T / values[kept]) @ left[:, kept].T
    return grad_b @ inverse @ grad_a / factors.scale


def completed(
    grad_a: torch.Tensor,
    grad_b: torch.Tensor,
    factors: Factors,
    rank_bound: int | None = None,
    tolerance: float | None = None,
) -> torch.Tensor:
    """Return the minimum-norm estimate, with its missing part from the low-rank sketch where that is justified.

    Justified is: a rank of at most A's and B's is known beforehand (`rank_bound`), or shows, because the observed ∂A Aᵀ
    has a rank below the smaller of A's and B's (or, after several steps, in which B has moved, above it). Otherwise the
    sketch of a matrix of higher rank would be added, which can be arbitrarily far off, and the minimum-norm estimate is
    returned as it is.

    Args:
        grad_a, grad_b, factors, tolerance: see :func:`minimum_norm`.
        rank_bound: what is known about rank(G), for a linear layer the number of rows that enter it.
    """
    estimate = minimum_norm(grad_a, grad_b, factors, tolerance)
    if determines(factors, tolerance) or not _shows_low_rank(grad_a, factors, rank_bound, tolerance):
        return estimate
    return estimate + unseen(low_rank_sketch(grad_a, grad_b, factors, rank_bound, tolerance), factors, tolerance)


def cosine(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """Cosine similarity of two gradients, each a list of tensors of equal shapes; 0 if one of them is zero."""
    pairs = [(f.detach().double().flatten(), s.detach().double().flatten()) for f, s in zip(first, second, strict=True)]
    dot = sum(float(f @ s) for f, s in pairs)
    norms = [sum(float(t @ t) for t in side) ** 0.5 for side in zip(*pairs, strict=True)]
    return dot / (norms[0] * norms[1]) if min(norms) > 0 else 0.0


def _shows_low_rank(grad_a: torch.Tensor, factors: Factors, rank_bound: int | None, tolerance: float | None) -> bool:
    found = rank(grad_a @ factors.a.T, tolerance)
    if found == 0:
        return False
    limit = min(rank(factors.a, tolerance), rank(factors.b, tolerance))
    if found < limit:
        return True
    if rank_bound is None or rank_bound > factors.a.shape[0]:
        return False
    return rank_bound <= limit or found > limit


def _basis(matrix: torch.Tensor, tolerance: float | None) -> torch.Tensor:
    """Orthonormal basis (n, rank) of the columns of a matrix (n, m)."""
    u, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, not_zero(values, matrix, tolerance)]


def _full_svd(matrix: torch.Tensor, tolerance: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SVD of (n, r) with all n left vectors: (n, n), singular values padded with zeros (n,), right vectors (r, n)."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=True)
    values = torch.where(not_zero(values, matrix, tolerance), values, 0.0)
    size, kept = matrix.shape[0], min(matrix.shape)
    padded = torch.zeros(size, dtype=matrix.dtype, device=matrix.device)
    padded[:kept] = values
    vectors = torch.zeros(matrix.shape[1], size, dtype=matrix.dtype, device=matrix.device)
    vectors[:, :kept] = right[:kept].T
    return left, padded, vectors
