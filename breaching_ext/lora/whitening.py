"""The same observation in an equivalent adapter whose factors are orthonormal.

A distance between factor gradients weighs the directions of G with the singular values of A and B: ∂B = s·G Aᵀ. These
are public. With A = X diag(α) Vᵀ and B = U diag(β) Yᵀ (compact), the server can compute

    ∂B X diag(1/α) = s·G V      and      diag(1/β) Yᵀ ∂A = s·Uᵀ G,

which, divided by s, are the factor gradients of the adapter (A', B', s') = (Vᵀ, U, 1) at the same effective weight. So
an attack on that adapter uses exactly what was observed, and its distance is that of G, restricted to the columns of B
and the rows of A. Where both span their whole space, or one does and the other is zero, it is the distance between full
gradients.
"""

from __future__ import annotations

import torch

from .decode import Factors, not_zero

__all__ = ["whitened"]


def whitened(
    grad_a: torch.Tensor, grad_b: torch.Tensor, factors: Factors, tolerance: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, Factors]:
    """Return (∂A', ∂B', factors') of the equivalent adapter, of the same rank r (padded with zeros).

    Args:
        grad_a: ∂A (r, i).
        grad_b: ∂B (o, r).
        factors: A (r, i), B (o, r) and s.
        tolerance: relative size below which a singular value of A or B counts as zero; see :func:`.decode.not_zero`.
    """
    x, alpha, vt = _compact_svd(factors.a, tolerance)  # (r, p), (p,), (p, i)
    u, beta, yt = _compact_svd(factors.b, tolerance)  # (o, q), (q,), (q, r)
    rows, columns = torch.zeros_like(factors.a), torch.zeros_like(factors.b)
    new_a, new_b = torch.zeros_like(grad_a), torch.zeros_like(grad_b)
    rows[: len(alpha)] = vt
    columns[:, : len(beta)] = u
    new_b[:, : len(alpha)] = grad_b @ x / (factors.scale * alpha)
    new_a[: len(beta)] = (yt @ grad_a) / (factors.scale * beta[:, None])
    return new_a, new_b, Factors(rows, columns, 1.0)


def _compact_svd(matrix: torch.Tensor, tolerance: float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    kept = not_zero(values, matrix, tolerance)
    return u[:, kept], values[kept], vt[kept]
