"""A guess of the active sets of many QPs at once, by a short ADMM run.

References:
    Stellato, Banjac, Goulart, Bemporad, Boyd, "OSQP: an operator splitting solver for quadratic programs", Math. Prog.
    Comp. 2020. Ghadimi, Teixeira, Shames, Johansson, IEEE TAC 2015 (step size).
"""

from __future__ import annotations

import torch
from torch import Tensor

RELAXATION = 1.6  # over-relaxation, the usual value
CHECK_EVERY = 5  # steps between looks at the active sets


class ADMMGuess:
    """ADMM on R y, for min ½yᵀQy + cᵀy with lower ≤ R y ≤ upper.

    Args:
        Q: (n, n), positive definite.
        R: (p, n).
        K: R Q⁻¹Rᵀ, (p, p).
        steps: most steps.
    """

    def __init__(self, Q: Tensor, R: Tensor, K: Tensor, steps: int) -> None:
        """See the class."""
        self.steps, self._rho = steps, _step_size(K)
        inverse = torch.linalg.inv(Q + self._rho * R.T @ R)
        self._T = inverse @ R.T  # (n, p)
        self._M = R @ self._T  # (p, p)

    def sides(self, c: Tensor, free: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """Step until the active sets stop changing.

        Args:
            c: linear terms, (N, n).
            free: R y of the minimisers without constraints, (N, p).
            lower, upper: bounds of R y, (N, p).

        Returns:
            1 at the upper side, −1 at the lower, 0 where not active, (N, p).
        """
        rho, base = self._rho, -(c @ self._T)
        z = torch.clamp(free, lower, upper)
        w = torch.zeros_like(z)
        side = torch.sign(free - z)
        for step in range(1, self.steps + 1):
            s = RELAXATION * (base + (rho * z - w) @ self._M) + (1 - RELAXATION) * z
            shifted = s + w / rho
            z = torch.clamp(shifted, lower, upper)
            w = rho * (shifted - z)
            if step % CHECK_EVERY == 0:
                previous, side = side, torch.sign(w)
                if torch.equal(previous, side):
                    break
        return side


def _step_size(K: Tensor) -> float:
    """Return ρ = 1/√(λ_min λ_max) of R Q⁻¹ Rᵀ (Ghadimi et al.), guarded for dependent rows."""
    if not len(K):
        return 1.0
    values = torch.linalg.eigvalsh(K)
    high = float(values[-1])
    return 1.0 / (high * max(float(values[0]), 1e-4 * high)) ** 0.5
