"""Certified parametric QP: ½ yᵀQy + cᵀy, G y ≤ h for many (c, h) with Q and G fixed, and its derivative.

daqp finds the active set from a warm start (see `active_set`). The point is then polished: one KKT solve on
that set (see `kkt_system`), whose signs and residual are checked again and whose set is corrected where they
fail.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import ArrayLike

from breaching_ext.ssigd.active_set import WarmStartedSides
from breaching_ext.ssigd.checks import (
    SIGN_TOLERANCE,
    check_condition,
    check_gap,
    check_matrices,
    unsolved_error,
)
from breaching_ext.ssigd.errors import (
    DegenerateError,
    LICQError,
    NonFiniteError,
    NotCertifiedError,
    SSIGDError,
)
from breaching_ext.ssigd.kkt_system import KKTSystem
from breaching_ext.ssigd.rows import Array, pair_rows
from breaching_ext.ssigd.solution import Index, QPSolution

logger = logging.getLogger(__name__)

RESIDUAL_TOLERANCE = 1e-9
MAX_CORRECTIONS = 50
# A dual active-set solver adds rows one by one. From this many rows on, primal-dual active-set steps, which
# exchange all rows that are on the wrong side at once, reach the set sooner; daqp takes over where they do
# not settle.
PREDICT_FROM = 100
MAX_PREDICTIONS = 12


class ParametricQP:
    """The QP with fixed Q and G. Not thread-safe: the warm start lives in the solver.

    Args:
        Q: Hessian, (n, n); its symmetric part counts. Must be positive definite.
        G: constraint matrix, (m, n); m = 0 is allowed.
        min_margin: raise DegenerateError where the strict-complementarity margin is below this value.
            None (default) logs one warning where a gradient is taken at a margin of zero.

    Raises:
        NonFiniteError: Q or G holds NaN or infinity.
        NotStronglyConvexError: Q is not positive definite, or its condition number exceeds 1e14.
        SSIGDError: the shapes do not match or a row of G is zero.
    """

    def __init__(self, Q: ArrayLike, G: ArrayLike, *, min_margin: float | None = None) -> None:
        """See the class."""
        self.Q, self.G = check_matrices(Q, G)
        self.min_margin = min_margin
        self.condition = check_condition(self.Q)
        self.rows = pair_rows(self.G)
        self.R = self.rows.R
        self.kkt = KKTSystem(self.Q, self.rows, self.condition)
        self._has_pairs = bool(self.rows.paired.any())
        self._sides_by_daqp = WarmStartedSides(self.Q, self.R, self.rows.simple_bounds)
        self._h: Array | None = None  # the last right-hand side that was checked
        self._last_side: Array | None = None
        self._warned = False

    @property
    def n(self) -> int:
        """Number of variables."""
        return self.Q.shape[0]

    @property
    def m(self) -> int:
        """Number of rows of G."""
        return self.G.shape[0]

    def solve(self, c: ArrayLike, h: ArrayLike) -> QPSolution:
        """Solve for one linear term and right-hand side and certify the result.

        Args:
            c: linear term, (n,).
            h: right-hand side, (m,).

        Returns:
            The solution with active set, margin and residual.

        Raises:
            NonFiniteError, InfeasibleError, LICQError, DegenerateError, NotCertifiedError: see errors.py.
        """
        c, h = self._check_vectors(c, h)
        lower, upper = self._sides(h)
        predicting = len(upper) >= PREDICT_FROM
        side = self._predict(c, lower, upper) if predicting else self._daqp_sides(c, lower, upper, h)
        for step in range(MAX_CORRECTIONS):
            index = side.nonzero()[0]
            sides = side[index]
            bound = np.where(sides > 0, upper[index], lower[index])
            try:
                y, signed, factor = self.kkt.solve(index, -c, bound)
            except (LICQError, NotCertifiedError):
                if not predicting:
                    raise
                # a wrong guess may hold dependent rows although the solution's set does not
                predicting, side = False, self._daqp_sides(c, lower, upper, h)
                continue
            Ry, slack, gap = self._slacks(y, index, lower, upper)
            # y is a small difference of large numbers
            if gap > SIGN_TOLERANCE * (1.0 + np.abs(y).max()) or self.kkt.cancels(c, y):
                y, signed = self.kkt.refined(index, -c, bound, y, signed, factor)
                Ry, slack, gap = self._slacks(y, index, lower, upper)
            force = signed * sides * self.kkt.norms[index]
            reach, scale = 1.0 + np.abs(y).max(), 1.0 + np.abs(c).max()
            low_force, low_slack = force.min(initial=0.0), slack.min(initial=0.0)
            if low_force >= -SIGN_TOLERANCE * scale and low_slack >= -SIGN_TOLERANCE * reach:
                if predicting and self._is_near_a_kink(index, force, slack, SIGN_TOLERANCE * max(scale, reach)):
                    predicting, side = False, self._daqp_sides(c, lower, upper, h)
                    continue
                residual = max(self._stationarity(c, y, index, signed) / scale, -low_slack / reach, gap / reach)
                if gap > RESIDUAL_TOLERANCE * reach:
                    raise NotCertifiedError(f"active rows are off their bounds by {gap:.3g}; rescale Q, c, G and h")
                margin = self._margin(side, index, force, slack, reach)
                self._last_side = side
                active, multipliers = self.rows.row_of(index, sides), np.maximum(signed * sides, 0.0)
                return QPSolution(y, active, multipliers, margin, residual, self.m, (index, sides, factor))
            if predicting and step < MAX_PREDICTIONS:
                wrong = force < -SIGN_TOLERANCE * scale
                side += np.where(slack < -SIGN_TOLERANCE * reach, np.where(Ry > upper, 1.0, -1.0), 0.0)
                side[index] = np.where(wrong, 0.0, sides)
            elif predicting:
                predicting, side = False, self._daqp_sides(c, lower, upper, h)
            else:
                self._correct(side, index, force, slack, Ry, upper)
        raise NotCertifiedError(f"the active set did not settle in {MAX_CORRECTIONS} corrections; rescale Q and G")

    def adjoint(self, solution: QPSolution, v: Array, *, warn: bool = True) -> tuple[Array, Array]:
        """Solve the KKT system once for a vector-Jacobian product.

        On the active rows, [Q Gₐᵀ; Gₐ 0][a; b] = [v; 0] gives
        vᵀdy = −aᵀdc + bᵀdh − ½(ayᵀ + yaᵀ):dQ − (λaᵀ + byᵀ):dG.

        Args:
            solution: what `solve` returned.
            v: cotangent of y, (n,).
            warn: False where a one-sided gradient at a kink is meant, default True.

        Returns:
            a of shape (n,) and b over the active rows `solution.active`, (k,).
        """
        if warn:
            self.warn_kink(solution.margin, SIGN_TOLERANCE * (1.0 + np.abs(solution.y).max()))
        index, side, factor = solution.work
        a, b = self.adjoint_on(index, v, factor)
        return a, b * side

    def adjoint_on(self, index: Index, v: Array, factor: Array | None = None) -> tuple[Array, Array]:
        """Solve the adjoint system on the two-sided rows `index`; b is positive on the upper side.

        Raises:
            NotCertifiedError: R_W a is not zero: the active rows are too nearly dependent.
        """
        zeros = np.zeros(len(index))
        a, b, factor = self.kkt.solve(index, v, zeros, factor)
        reach = np.abs(self.kkt.Q_inverse @ v).max(initial=0.0)  # of a where nothing is active
        if self._off_rows(a, index) > SIGN_TOLERANCE * reach:
            a, b = self.kkt.refined(index, v, zeros, a, b, factor)
            off = self._off_rows(a, index)
            if not off <= RESIDUAL_TOLERANCE * reach:
                raise NotCertifiedError(f"the gradient leaves the active rows by {off:.3g}; they are nearly dependent")
        return a, b

    def _off_rows(self, a: Array, index: Index) -> float:
        """Return by how much a leaves the active rows at most; exactly it does not."""
        return float((np.abs(self.R.take(index, 0) @ a) / self.kkt.norms[index]).max(initial=0.0))

    def _slacks(self, y: Array, index: Index, lower: Array, upper: Array) -> tuple[Array, Array, float]:
        """Return R y, each row's distance to its nearer bound, and how far active rows are from theirs at most."""
        Ry = self.R @ y
        slack = np.minimum(upper - Ry, Ry - lower) / self.kkt.norms
        return Ry, slack, float(np.abs(slack[index]).max(initial=0.0))

    @staticmethod
    def _is_near_a_kink(index: Index, force: Array, slack: Array, tolerance: float) -> bool:
        """Whether a sign is within its tolerance, which grows with the largest entry of c and y.

        The set of another solution may then pass though it is wrong by what is large for its own row.
        """
        inactive = slack.copy()
        inactive[index] = np.inf
        return min(force.min(initial=np.inf), inactive.min(initial=np.inf)) <= tolerance

    def _predict(self, c: Array, lower: Array, upper: Array) -> Array:
        """Return the sides of the last solution, or at first the bounds that the free minimiser violates."""
        if self._last_side is not None:
            return self._last_side.copy()
        free = -(c @ self.kkt.T)
        return (free > upper).astype(float) - (free < lower)

    def _daqp_sides(self, c: Array, lower: Array, upper: Array, h: Array) -> Array:
        """Return the active sides that daqp finds: 1 upper, -1 lower, 0 not active, (p,)."""
        if not len(upper):
            return upper
        side, flag = self._sides_by_daqp.find(c, lower, upper)
        if flag != 1:
            raise unsolved_error(self.G, h, flag)
        return side

    def _stationarity(self, c: Array, y: Array, index: Index, signed: Array) -> float:
        """Return ‖Qy + c + R_Wᵀλ‖∞, or raise where the polish left it large."""
        error = self.kkt.stationarity(c, y, index, signed)
        scale = 1.0 + np.abs(c).max() + np.abs(signed).max(initial=0.0)
        if not error <= RESIDUAL_TOLERANCE * scale:
            raise NotCertifiedError(f"KKT residual {error:.3g} after the polish; rescale Q, c, G and h")
        return error

    @staticmethod
    def _correct(side: Array, index: Index, force: Array, slack: Array, Ry: Array, upper: Array) -> None:
        """Change one row of the set in place: drop the most negative force or add the worst violation."""
        worst_force = force.min() if len(force) else 0.0
        if worst_force < 0 and -worst_force >= -slack.min():
            side[index[force.argmin()]] = 0.0
        else:
            row = slack.argmin()
            side[row] = 1.0 if Ry[row] > upper[row] else -1.0

    def _margin(self, side: Array, index: Index, force: Array, slack: Array, reach: float) -> float:
        """Return the strict-complementarity margin and act on a degenerate one."""
        slack[index] = self._width[index]  # the opposite side of an active row is a constraint too
        margin = max(float(min(force.min(initial=np.inf), slack.min(initial=np.inf))), 0.0)
        if margin <= SIGN_TOLERANCE * reach:
            self.kkt.check_licq(np.flatnonzero((side != 0) | (slack <= SIGN_TOLERANCE * reach)))
        if self.min_margin is not None and margin < self.min_margin:
            raise DegenerateError(
                f"strict-complementarity margin {margin:.3g} is below min_margin={self.min_margin:g}: a "
                "constraint is weakly active and y* has a kink here; perturb the linear term (q)"
            )
        return margin

    def warn_kink(self, margin: float, tolerance: float) -> None:
        """Log, once for each solver, that a gradient is taken where y* has none: margin ≤ tolerance."""
        if margin <= tolerance and not self._warned:
            self._warned = True
            logger.warning(
                "a constraint is weakly active (margin %.1e): y* has a kink here, its gradient is one-sided; "
                "perturb the linear term with q, or set min_margin to raise instead",
                margin,
            )

    def _check_vectors(self, c: ArrayLike, h: ArrayLike) -> tuple[Array, Array]:
        c, h = np.ascontiguousarray(c, dtype=float), np.ascontiguousarray(h, dtype=float)
        if c.shape != (self.n,) or h.shape != (self.m,):
            raise SSIGDError(f"c has shape {c.shape} and h {h.shape}; expected ({self.n},) and ({self.m},)")
        if not np.isfinite(c).all():
            raise NonFiniteError("c holds NaN or infinity")
        return c, h

    def _sides(self, h: Array) -> tuple[Array, Array]:
        """Return the two-sided bounds of h, checked; those of the previous h are kept."""
        if self._h is None or not np.array_equal(h, self._h):
            if not np.isfinite(h).all():
                raise NonFiniteError("h holds NaN or infinity; leave out rows that do not bind instead of h = inf")
            lower, upper = self.rows.sides(h)
            width = (upper - lower) / self.kkt.norms
            if self._has_pairs:
                check_gap(self.rows, lower, upper, width)
            self._h, self._bounds, self._width = h.copy(), (lower, upper), width  # together: an error leaves all
        return self._bounds
