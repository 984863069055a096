"""The solution of the KKT system on one set of sides, and whether its signs make it the minimiser.

Most signs are clear: they are far from zero on the scale of the largest entry. Where one is not, a large entry may hide
the error of a small row. The point is then refined and each row is judged on a scale of its own: the size of the terms
that it sums up, and its own rounding error (Skeel, J. ACM 1979).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from breaching_ext.ssigd.errors import NotCertifiedError
from breaching_ext.ssigd.kkt_system import EPS, SIGN_TOLERANCE, KKTSystem, cancels
from breaching_ext.ssigd.rows import Array
from breaching_ext.ssigd.solution import Index

RESIDUAL_TOLERANCE = 1e-9
#: signs above this share of the largest entry of c and y are clear
CLEAR = 1e-10
EXTENDED, TINY = float(np.finfo(np.longdouble).eps), float(np.finfo(float).tiny)


class KKTPoint:
    """A point in the variables of its system, with the active rows on their bounds.

    Args:
        kkt: the system.
        side: active sides, 1 upper, -1 lower, 0 not active, (p,).
        c, lower, upper: linear term (n,) and bounds of R y (p,).

    Attributes:
        index, sides: the active rows and their sides, (k,).
        y, signed: the point (n,), and the multipliers, positive on the upper side, (k,).
        factor: of the Schur complement of the active rows.
        force: multipliers, positive where they push the right way, (k,).
        slack: distance to the nearer bound, infinite for active rows, (p,).
        gap: how far active rows are from their bounds at most.
        size: largest entry of c and y, the scale of all signs.
        reach: largest entry of y and of the active bounds; where these are zero, the rounding error of y counts.
        residual: largest relative violation of stationarity and feasibility, once certified.
        near, weak: which rows (p,) and which active rows (k,) are zero on their own scale; None where all signs are
            clear.

    Raises:
        LICQError, NotCertifiedError: see KKTSystem.
    """

    def __init__(self, kkt: KKTSystem, side: Array, c: Array, lower: Array, upper: Array) -> None:
        """See the class."""
        self._kkt, self._c, self._lower, self._upper = kkt, c, lower, upper
        self.index = index = side.nonzero()[0]
        self.sides = sides = side[index]
        self._bound = np.where(sides > 0, upper[index], lower[index])
        self._c_size = float(np.abs(c).max(initial=0.0))
        self._bound_size = float(np.abs(self._bound).max(initial=0.0))
        self.y, self.signed, self.factor = kkt.solve(index, -c, self._bound)
        self.residual = np.inf
        self.near: NDArray[np.bool_] | None = None
        self.weak: NDArray[np.bool_] | None = None
        self._refined = False
        self._measure()
        if self.gap > SIGN_TOLERANCE * self.reach or cancels(kkt.inverse_size, self._c_size, self._y_size):
            self._refine()

    @property
    def clear(self) -> bool:
        """Whether every sign is right, and far from zero."""
        return self._least > CLEAR * self.size

    @property
    def doubtful(self) -> bool:
        """Whether the worst sign is near zero on the scale of the largest entry."""
        return abs(self._least) <= CLEAR * self.size

    @property
    def kink(self) -> bool:
        """Whether a sign is zero on its row's own scale, so that y* has no derivative."""
        return self.near is not None and self.weak is not None and bool(self.near.any() or self.weak.any())

    @property
    def binding(self) -> Index:
        """Rows that hold with equality, with a multiplier or without."""
        binding = np.isinf(self.slack) if self.near is None else self.near | np.isinf(self.slack)
        return np.flatnonzero(binding)

    def _measure(self) -> None:
        index, y = self.index, self.y
        self._Ry = Ry = self._kkt.R @ y
        self.slack = slack = np.minimum(self._upper - Ry, Ry - self._lower)
        self.gap = float(np.abs(slack[index]).max(initial=0.0))
        slack[index] = np.inf
        self.force = self.signed * self.sides
        self._least = min(self.force.min(initial=np.inf), slack.min(initial=np.inf))
        self._y_size = float(np.abs(y).max(initial=0.0))
        self.size = max(self._c_size, self._y_size)
        self.reach = max(self._y_size, self._bound_size or EPS * self.size)

    def _refine(self) -> None:
        if not self._refined:
            self._refined = True
            arguments = self.index, -self._c, self._bound, self.y, self.signed, self.factor
            self.y, self.signed = self._kkt.refined(*arguments)
            self._measure()

    def settled(self) -> bool:
        """Whether all signs are right, each on its own row's scale; sets `near` and `weak`."""
        self._refine()
        self._slack_zero, self._force_zero = self._tolerances()
        self.near, self.weak = self.slack <= self._slack_zero, self.force <= self._force_zero
        return bool((self.force >= -self._force_zero).all() and (self.slack >= -self._slack_zero).all())

    def correct(self, side: Array) -> None:
        """Change the row of `side` in place that `settled` found worst: drop a force or add a violation."""
        force = np.where(self.force < -self._force_zero, self.force, 0.0)
        slack = np.where(self.slack < -self._slack_zero, self.slack, 0.0)
        worst = force.min(initial=0.0)
        if worst < 0 and worst <= slack.min():
            side[self.index[force.argmin()]] = 0.0
        else:
            row = slack.argmin()
            side[row] = 1.0 if self._Ry[row] > self._upper[row] else -1.0

    def exchange(self, side: Array) -> None:
        """Change all wrong rows of `side` at once in place: a primal-dual active-set step."""
        tolerance = SIGN_TOLERANCE * self.size
        side[self.index] = np.where(self.force < -tolerance, 0.0, self.sides)
        side += np.where(self.slack < -tolerance, np.where(self._Ry > self._upper, 1.0, -1.0), 0.0)

    def certify(self) -> None:
        """Set `residual`, or raise NotCertifiedError where it is large: the system was not solved."""
        lag = self._kkt.stationarity(self._c, self.y, self.index, self.signed)
        scale = max(self.size, float(np.abs(self.signed).max(initial=0.0)), TINY)
        reach = max(self.reach, TINY)
        if not lag <= RESIDUAL_TOLERANCE * scale:
            raise NotCertifiedError(f"KKT residual {lag / scale:.3g} after the polish; rescale Q, c, G and h")
        if self.gap > RESIDUAL_TOLERANCE * reach:
            raise NotCertifiedError(
                f"active rows are off their bounds by {self.gap / reach:.3g} of the size of y; rescale Q, c, G and h"
            )
        self.residual = max(lag / scale, -float(self.slack.min(initial=0.0)) / reach, self.gap / reach)

    def _tolerances(self) -> tuple[Array, Array]:
        """Return below which slack (p,) and which force (k,) the sign cannot be told.

        It is SIGN_TOLERANCE of the terms of the row, and the rounding error of a refined y and λ, which |KKT⁻¹| times
        the terms of the residual bounds entry by entry.
        """
        kkt, index, size_y = self._kkt, self.index, np.abs(self.y)
        R, T, magnitude = kkt.R[index], kkt.T[:, index], np.abs(kkt.R)
        terms = np.abs(kkt.Q) @ size_y + np.abs(self._c) + np.abs(self.signed) @ magnitude[index]  # stationarity, (n,)
        reach = magnitude[index] @ size_y + np.abs(self._bound)  # of the active rows, (k,)
        schur = np.linalg.pinv(R @ T, hermitian=True)
        cross = T @ schur
        error = np.abs(kkt.Q_inverse - cross @ T.T) @ terms + np.abs(cross) @ reach
        error_force = np.abs(cross).T @ terms + np.abs(schur) @ reach
        upper, lower = self._upper - self._Ry, self._Ry - self._lower
        nearer = np.abs(np.where(upper <= lower, self._upper, self._lower))
        unit = 64.0 * EXTENDED
        rounding = 16.0 * EPS**2 * (np.abs(kkt.Q_inverse) @ terms)
        slack = SIGN_TOLERANCE * (magnitude @ size_y + nearer) + magnitude @ (unit * error + rounding)
        return slack, SIGN_TOLERANCE * (magnitude[index] @ terms) + unit * error_force
