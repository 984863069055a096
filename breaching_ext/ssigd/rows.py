"""Two-sided form of the rows of G: opposite rows (a box) become one constraint with two sides.

A box on n variables has 2n rows, of which at most n can be active. Pairing them halves the constraint
products that the solver caches and the systems that the batched solver factorises.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
UNBOUNDED = 1e30  # daqp's own infinity


@dataclass(frozen=True)
class PairedRows:
    """Rows of G y ≤ h written as lower ≤ R y ≤ upper.

    Attributes:
        R: one row for each pair or single row, (p, n).
        upper_of: index into h of each upper side, (p,).
        lower_of: index into h of each lower side, or -1 where there is none, (p,).
        simple_bounds: True where the first n rows of R are the identity, so that a solver can treat them as
            bounds.
    """

    R: Array
    upper_of: NDArray[np.intp]
    lower_of: NDArray[np.intp]
    simple_bounds: bool

    @cached_property
    def paired(self) -> NDArray[np.bool_]:
        """Which rows have both sides, (p,)."""
        return self.lower_of >= 0

    def sides(self, h: Array) -> tuple[Array, Array]:
        """Return (lower, upper) of shape (..., p) for h of shape (..., m); a lower that is not there is -inf."""
        upper = h[..., self.upper_of]
        lower = np.where(self.paired, -h[..., self.lower_of], -np.inf)
        return lower, upper

    def row_of(self, index: NDArray[np.intp], side: Array) -> NDArray[np.intp]:
        """Return the rows of G behind two-sided rows `index`, whose `side` is +1 (upper) or -1 (lower)."""
        return np.where(side > 0, self.upper_of[index], self.lower_of[index])


def pair_rows(G: Array) -> PairedRows:
    """Find opposite rows of G and put a full box first.

    Args:
        G: constraint matrix, (m, n).

    Returns:
        The two-sided form. Equal rows are left alone: they are a failure of LICQ which the solver reports.
    """
    G = G + 0.0  # turns -0.0 into 0.0, so that equal rows have equal bytes
    waiting: dict[bytes, list[int]] = {}
    partner = np.full(len(G), -1, dtype=np.intp)
    for i, row in enumerate(G):
        opposite = waiting.get((-row + 0.0).tobytes())
        if opposite:
            j = opposite.pop()
            partner[i], partner[j] = j, i
        else:
            waiting.setdefault(row.tobytes(), []).append(i)
    upper = [i for i in range(len(G)) if partner[i] < 0 or _is_upper(G[i])]
    upper, simple = _box_first(G, upper)
    index = np.array(upper, dtype=np.intp)
    return PairedRows(np.ascontiguousarray(G[index]), index, partner[index], simple)


def _is_upper(row: Array) -> bool:
    """Return True for the member of a pair whose first non-zero entry is positive."""
    nonzero = np.flatnonzero(row)
    return bool(len(nonzero)) and bool(row[nonzero[0]] > 0)


def _box_first(G: Array, upper: list[int]) -> tuple[list[int], bool]:
    """Order the rows e_1 … e_n first where all are there exactly once."""
    n = G.shape[1]
    unit: dict[int, int] = {}
    for i in upper:
        nonzero = np.flatnonzero(G[i])
        if len(nonzero) == 1 and G[i, nonzero[0]] == 1.0:
            unit.setdefault(int(nonzero[0]), i)
    if len(unit) < n or n == 0:
        return upper, False
    box = [unit[k] for k in range(n)]
    chosen = set(box)
    return box + [i for i in upper if i not in chosen], True
