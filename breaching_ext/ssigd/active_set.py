"""The active set of ½yᵀQy + cᵀy, lower ≤ R y ≤ upper, found by daqp from the one it found last.

Arnström, Bemporad, Axehill: "A dual active-set solver for embedded quadratic programming using recursive LDLᵀ
updates", IEEE TAC 2022.
"""

from __future__ import annotations

from typing import Any

import daqp
import numpy as np

from breaching_ext.ssigd.rows import Array

_SETTINGS = {"primal_tol": 1e-10, "dual_tol": 1e-12}


class WarmStartedSides:
    """The solver, with Q and R fixed. Not thread-safe: the warm start lives in it.

    Args:
        Q: Hessian, (n, n), positive definite.
        R: rows, (p, n); where `simple_bounds`, the first n are the identity.
        simple_bounds: whether the first n rows bound single variables, which daqp takes as such.
    """

    def __init__(self, Q: Array, R: Array, simple_bounds: bool) -> None:
        """See the class."""
        self._Q = Q
        self._general = np.ascontiguousarray(R[len(Q) :] if simple_bounds else R)
        self._model: daqp.Model | None = None
        self._upper: Array | None = None  # the bounds that the solver holds

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin without a warm start: it lives in C."""
        return {**self.__dict__, "_model": None, "_upper": None}

    def find(self, c: Array, lower: Array, upper: Array) -> tuple[Array, int]:
        """Return the sides (1 upper, -1 lower, 0 not active, (p,)) and daqp's exit flag, 1 where they are found.

        Args:
            c: linear term, (n,).
            lower, upper: bounds, (p,). The same arrays as in the last call mean the same bounds.
        """
        flag = self._put_in(c, lower, upper)
        if flag >= 0 and self._model is not None:
            _, _, flag, info = self._model.solve()
            if flag == 1:
                return np.sign(info["lam"]), flag
        self._model = None  # a failed solve must not be the next one's warm start
        return np.zeros_like(upper), flag

    def _put_in(self, c: Array, lower: Array, upper: Array) -> int:
        if self._model is None:
            self._model = daqp.Model()
            self._model.settings = _SETTINGS
            flag, _ = self._model.setup(self._Q, c, self._general, upper, lower)
            self._model.settings = _SETTINGS  # setting up resets them
        else:
            flag = self._model.update(f=c, **({} if upper is self._upper else {"bupper": upper, "blower": lower}))
        self._upper = upper
        return flag
