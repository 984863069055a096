"""Powers of two that bring the variables and the rows of a QP to size one.

Tolerances compare numbers, so they mean something only where the numbers are of one size. With y = D ỹ and rows S R D,
the Hessian D Q D has a diagonal near one and every row has a length near one, whatever units the caller uses: c̃ = D c,
bounds S h, multipliers λ = S λ̃. (van der Sluis, Numer. Math. 1969: no other diagonal does much better for the condition
number.) Powers of two leave every digit as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from breaching_ext.ssigd.errors import SSIGDError
from breaching_ext.ssigd.rows import Array


@dataclass(frozen=True)
class Scaling:
    """The factors.

    Attributes:
        variables: D, (n,).
        rows: S, (p,).
    """

    variables: Array
    rows: Array

    @classmethod
    def of(cls, Q: Array, R: Array) -> Scaling:
        """Return the factors for Q (n, n), of positive diagonal, and rows R (p, n), none of them zero."""
        variables = _power_of_two(1.0 / np.sqrt(np.diag(Q)))
        with np.errstate(over="ignore"):
            scaled = R * variables
        largest = np.abs(scaled).max(axis=1, initial=0.0)  # first: squares of large entries overflow
        if not ((largest > 1e-300) & (largest < 1e300)).all():
            raise SSIGDError("rows of G are too large or too small beside the root of Q's diagonal; rescale Q and G")
        rows = _power_of_two(1.0 / largest)
        return cls(variables, rows * _power_of_two(1.0 / np.linalg.norm(scaled * rows[:, None], axis=1)))

    def apply(self, Q: Array, R: Array) -> tuple[Array, Array]:
        """Return D Q D and S R D."""
        return Q * np.outer(self.variables, self.variables), R * self.variables * self.rows[:, None]


def _power_of_two(values: Array) -> Array:
    """Return the nearest powers of two."""
    return np.exp2(np.round(np.log2(values)))
