"""Batched Cholesky factors of the Schur complements R_W Q⁻¹ R_Wᵀ, one active set W a member."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PIVOT_TOLERANCE = 1e-8
#: entries factored at once on a CPU (256 kB): more leave the cache, and the temporaries cost twice the arithmetic
CACHED = 2**15


@dataclass(frozen=True)
class ActiveFactor:
    """Cholesky factors of R_W Q⁻¹ R_Wᵀ, padded with ones to the largest active set of the batch.

    Attributes:
        rows: two-sided rows, the active ones first, (N, k).
        valid: which of them are active, (N, k).
        cholesky: lower factors, (N, k, k).
    """

    rows: Tensor
    valid: Tensor
    cholesky: Tensor

    @classmethod
    def of(cls, K: Tensor, mask: Tensor) -> ActiveFactor:
        """Factorise for K = R Q⁻¹ Rᵀ (p, p) and active rows mask (N, p)."""
        count = int(mask.sum(dim=1).max()) if mask.numel() else 0
        rows = mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
        valid = mask.gather(1, rows)
        cholesky = K.new_empty(len(rows), count, count).mT  # the layout that LAPACK writes
        step = max(1, len(rows)) if K.is_cuda else max(1, CACHED // max(count * count, 1))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            cholesky[part] = _factor(K, rows[part], valid[part])
        return cls(rows, valid, cholesky)

    def solve(self, right: Tensor) -> Tensor:
        """Solve on the active rows for right (N, p); zero on the others, (N, p)."""
        part = torch.where(self.valid, right.gather(1, self.rows), 0.0)[:, :, None]
        # Two triangular solves read the factor where it lies; cholesky_solve copies it first.
        part = torch.linalg.solve_triangular(self.cholesky, part, upper=False)
        part = torch.linalg.solve_triangular(self.cholesky.mT, part, upper=True)[:, :, 0]
        return torch.zeros_like(right).scatter_(1, self.rows, part)

    def sound(self, K: Tensor) -> Tensor:
        """Return where the factor exists and no pivot is small: where LICQ holds comfortably, (N,)."""
        pivots = self.cholesky.diagonal(dim1=1, dim2=2) ** 2
        return (~self.valid | (pivots >= PIVOT_TOLERANCE * K.diagonal()[self.rows])).all(dim=1)


def _factor(K: Tensor, rows: Tensor, valid: Tensor) -> Tensor:
    """Return the Cholesky factors of K at rows (N, k), ones on the diagonal where a row is padding, (N, k, k)."""
    flat = (rows[:, :, None] * len(K)).add(rows[:, None, :])
    # In place: at this size the time goes into allocating temporaries, not into arithmetic.
    schur = K.reshape(-1).take(flat).mul_(valid[:, :, None]).mul_(valid[:, None, :])
    schur.diagonal(dim1=1, dim2=2).add_((~valid).to(K.dtype))
    return torch.linalg.cholesky_ex(schur).L
