"""What a certified QP solve returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class QPSolution:
    """Minimiser of ½ yᵀQy + cᵀy subject to G y ≤ h with its certificate.

    Attributes:
        y: the minimiser, (n,).
        active: rows of G that hold with equality and carry a multiplier, (k,).
        active_multipliers: their multipliers in the same order, all ≥ 0, (k,).
        margin: strict-complementarity margin: the smallest of λᵢ‖Gᵢ‖ over active rows and (h − Gy)ᵢ/‖Gᵢ‖
            over the others; inf without constraints. At 0 the solution map has a kink and the gradient is
            one-sided.
        residual: largest relative violation of stationarity and feasibility after the polish.
        rows: number of rows of G.
        kink: whether a multiplier or a slack is zero to working precision, on the scale of its own row.
        work: two-sided active rows, their sides, and the factor of their scaled Schur complement; private.
    """

    y: Array
    active: Index
    active_multipliers: Array
    margin: float
    residual: float
    rows: int
    kink: bool
    work: tuple[Index, Array, Array | None] = field(repr=False)

    @property
    def multipliers(self) -> Array:
        """Multipliers of all rows of G, zero where a row is not active, (m,)."""
        full = np.zeros(self.rows)
        full[self.active] = self.active_multipliers
        return full
