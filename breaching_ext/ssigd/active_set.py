"""The active set of ½yᵀQy + cᵀy, lower ≤ R y ≤ upper, found by daqp from the one it found last.

Arnström, Bemporad, Axehill: "A dual active-set solver for embedded quadratic programming using recursive LDLᵀ
updates", IEEE TAC 2022.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import daqp
import numpy as np

from breaching_ext.ssigd.rows import UNBOUNDED, Array

# Absolute, of data whose size is near one.
_SETTINGS = {"primal_tol": 1e-10, "dual_tol": 1e-12}
#: how far the size of the data may drift before they are scaled anew
_DRIFT = 2.0**6


class WarmStartedSides:
    """The solver, with Q and R fixed. Not thread-safe: the warm start lives in it.

    Args:
        Q: Hessian, (n, n), positive definite, with a diagonal near one.
        R: rows, (p, n), of length near one; where `simple_bounds`, the first n are the identity.
        simple_bounds: whether the first n rows bound single variables, which daqp takes as such.

    Attributes:
        flag: daqp's exit flag of the last solve, 1 where the sides were found.
    """

    def __init__(self, Q: Array, R: Array, simple_bounds: bool) -> None:
        """See the class."""
        self.flag = 0
        self._Q = Q
        self._general = np.ascontiguousarray(R[len(Q) :] if simple_bounds else R)
        self._model: daqp.Model | None = None
        self._upper: Array | None = None  # the bounds that the solver holds,
        self._unit = 1.0  # divided by this power of two, as c is
        self._typical = np.inf  # size of a bound

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin without a warm start: it lives in C."""
        return {**self.__dict__, "_model": None, "_upper": None}

    def guesses(self, c: Array, lower: Array, upper: Array) -> Iterator[Array]:
        """Yield sides that daqp takes for the solution's: 1 upper, -1 lower, 0 not active, (p,).

        The first is nearly always right. Where it is not, a warm start has led astray, or numbers of very different
        size have hidden one another: then come the sides from a cold start, and those from data divided by the largest
        number instead of a typical one.

        Args:
            c: linear term, (n,).
            lower, upper: bounds, (p,). The same arrays as in the last call mean the same bounds.
        """
        if upper is not self._upper:
            self._typical = float(np.sort(np.abs(upper))[len(upper) // 2]) or np.inf
        largest = float(np.abs(c).max())
        typical = min(largest or np.inf, self._typical)
        if self._model is not None:
            yield from self._solve(c, lower, upper, typical)
        self._model = None
        yield from self._solve(c, lower, upper, typical)
        self._model = None
        largest = max(largest, float(lower.max()), -float(upper.min()))  # y is as large as bounds that exclude 0
        yield from self._solve(c, lower, upper, largest)

    def _solve(self, c: Array, lower: Array, upper: Array, size: float) -> Iterator[Array]:
        """Yield the sides where daqp finds some."""
        self.flag = self._put_in(c, lower, upper, size)
        if self.flag >= 0 and self._model is not None:
            _, _, self.flag, info = self._model.solve()
            if self.flag == 1:
                yield np.sign(info["lam"])
            else:
                self._model = None  # a failed solve must not be the next one's warm start

    def _put_in(self, c: Array, lower: Array, upper: Array, size: float) -> int:
        same = upper is self._upper and self._model is not None
        if 0.0 < size < np.inf and not 1.0 / _DRIFT <= size / self._unit <= _DRIFT:
            self._unit, same = float(np.exp2(np.round(np.log2(size)))), False
        self._upper, c = upper, c / self._unit
        if not same:
            lower, upper = np.maximum(lower / self._unit, -UNBOUNDED), np.minimum(upper / self._unit, UNBOUNDED)
        if self._model is not None:
            return self._model.update(f=c, **({} if same else {"bupper": upper, "blower": lower}))
        self._model = daqp.Model()
        self._model.settings = _SETTINGS
        flag, _ = self._model.setup(self._Q, c, self._general, upper, lower)
        self._model.settings = _SETTINGS  # setting up resets them
        return flag
