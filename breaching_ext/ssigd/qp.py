"""Certified parametric QP: ½ yᵀQy + cᵀy, G y ≤ h for many (c, h) with Q and G fixed, and its derivative.

All work is done in scaled variables and rows (see `scaling`). daqp finds the active set from a warm start (see
`active_set`). The point is then polished: one KKT solve on that set, whose signs and residual are checked again (see
`kkt_point`) and whose set is corrected where they fail.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from breaching_ext.ssigd.active_set import WarmStartedSides
from breaching_ext.ssigd.arguments import check_number, real_array
from breaching_ext.ssigd.checks import check_condition, check_gap, check_matrices, unsolved_error
from breaching_ext.ssigd.errors import (
    DegenerateError,
    LICQError,
    NonFiniteError,
    NotCertifiedError,
    SSIGDError,
)
from breaching_ext.ssigd.kkt_point import RESIDUAL_TOLERANCE, KKTPoint
from breaching_ext.ssigd.kkt_system import SIGN_TOLERANCE, KKTSystem, cancels
from breaching_ext.ssigd.rows import Array, pair_rows
from breaching_ext.ssigd.scaling import Scaling
from breaching_ext.ssigd.solution import Index, QPSolution

logger = logging.getLogger(__name__)

MAX_CORRECTIONS = 50
# A dual active-set solver adds rows one by one. From this many rows on, primal-dual active-set steps, which
# exchange all rows that are on the wrong side at once, reach the set sooner; daqp takes over where they do
# not settle.
PREDICT_FROM = 100
MAX_PREDICTIONS = 12
# Change of c, relative to its largest entry, from which on the last solution's sides are further from the new ones than
# the bounds that the unconstrained minimiser violates (n = 100 and 200: 4.6 to 7 KKT solves against 3.4 to 6.5).
FAR = 0.5


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
        if min_margin is not None:
            check_number("min_margin", min_margin, least=0)
        self.min_margin = min_margin
        check_condition(self.Q)
        self.rows = pair_rows(self.G)
        self.R = self.rows.R
        self.scaling = Scaling.of(self.Q, self.R)
        self.kkt = KKTSystem(*self.scaling.apply(self.Q, self.R), self.rows.upper_of)
        largest = np.abs(self.R).max(axis=1, initial=0.0)  # squares of entries overflow
        self._lengths = largest * np.linalg.norm(self.R / largest[:, None], axis=1)
        #: what a scaled multiplier is multiplied by, and a scaled slack divided by, in the margin
        self.margin_units = self.scaling.rows * self._lengths
        self._sides_by_daqp = WarmStartedSides(self.kkt.Q, self.kkt.R, self.rows.simple_bounds)
        self._h: Array | None = None  # the last right-hand side that was checked
        self._last: tuple[Array, Array] | None = None  # scaled c and the sides of its solution
        self._warned = False

    @property
    def n(self) -> int:
        """Number of variables."""
        return self.Q.shape[0]

    @property
    def m(self) -> int:
        """Number of rows of G."""
        return self.G.shape[0]

    def solve(self, c: ArrayLike, h: ArrayLike, *, degenerate: bool = False) -> QPSolution:
        """Solve for one linear term and right-hand side and certify the result.

        Args:
            c: linear term, (n,).
            h: right-hand side, (m,).
            degenerate: take a solution at a kink, or where multipliers are not unique, for what its y is worth;
                False (default) raises the DegenerateErrors.

        Returns:
            The solution with active set, margin and residual.

        Raises:
            NonFiniteError, InfeasibleError, LICQError, DegenerateError, NotCertifiedError: see errors.py.
        """
        c, h = self._check_vectors(c, h)
        lower, upper = self._sides(h)
        scaled = c * self.scaling.variables
        point, side = self._minimiser(scaled, lower, upper)
        margin = self._margin(point)
        if not degenerate:
            self._check_degenerate(point, margin)
        self._last = scaled, side
        index, sides = point.index, point.sides
        multipliers = np.maximum(point.force, 0.0) * self.scaling.rows[index]
        return QPSolution(
            point.y * self.scaling.variables, self.rows.row_of(index, sides), multipliers, margin, point.residual,
            self.m, point.kink, (index, sides, point.factor),
        )  # fmt: skip

    def _minimiser(self, c: Array, lower: Array, upper: Array) -> tuple[KKTPoint, Array]:
        """Return the point whose signs are right, and its sides, for scaled data."""
        found = self._predicted(c, lower, upper) if len(upper) >= PREDICT_FROM else None
        if found is not None:
            return found
        failure: SSIGDError | None = None
        for side in self._guesses(c, lower, upper):
            try:
                return self._corrected(side, c, lower, upper)
            except (LICQError, NotCertifiedError) as error:
                failure = failure or error
        raise failure or unsolved_error(self.kkt.R, lower, upper, self.scaling.rows, self._sides_by_daqp.flag)

    def _guesses(self, c: Array, lower: Array, upper: Array) -> Iterable[Array]:
        return self._sides_by_daqp.guesses(c, lower, upper) if len(upper) else [np.zeros(0)]

    def _predicted(self, c: Array, lower: Array, upper: Array) -> tuple[KKTPoint, Array] | None:
        """Take active-set steps, if c is near the last one from its sides; None where they lead to no clear signs.

        Near a kink the sides of another solution may pass, so that the result would depend on it; and wrong sides may
        hold dependent rows although the solution's do not.
        """
        if self._last is not None and np.abs(c - self._last[0]).max() < FAR * np.abs(c).max():
            side = self._last[1].copy()
        else:  # the bounds that the minimiser without constraints violates
            free = -(c @ self.kkt.T)
            side = (free > upper).astype(float) - (free < lower)
        for _ in range(1 + MAX_PREDICTIONS):
            try:
                point = KKTPoint(self.kkt, side, c, lower, upper)
                if point.clear:
                    point.certify()
                    return point, side
            except (LICQError, NotCertifiedError):
                return None
            if point.doubtful:
                return None
            point.exchange(side)
        return None

    def _corrected(self, side: Array, c: Array, lower: Array, upper: Array) -> tuple[KKTPoint, Array]:
        """Change one row of the sides after the other until all signs are right."""
        point = KKTPoint(self.kkt, side, c, lower, upper)
        for _ in range(MAX_CORRECTIONS):
            if point.clear or point.settled():
                point.certify()
                return point, side
            point.correct(side)
            try:
                point = KKTPoint(self.kkt, side, c, lower, upper)
            except LICQError:  # of a row that the correction added, which says nothing about the solution
                break
        raise NotCertifiedError(
            f"the active set did not settle in {MAX_CORRECTIONS} corrections; rescale Q, c, G and h"
        )

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
            self.warn_kink(solution.kink, solution.margin)
        index, side, factor = solution.work
        a, b = self.adjoint_on(index, v * self.scaling.variables, factor)
        return a * self.scaling.variables, b * side * self.scaling.rows[index]

    def adjoint_on(self, index: Index, v: Array, factor: Array | None = None) -> tuple[Array, Array]:
        """Solve the adjoint system on the two-sided rows `index`, all scaled; b is positive on the upper side.

        Raises:
            NotCertifiedError: R_W a is not zero: the active rows are too nearly dependent.
        """
        zeros = np.zeros(len(index))
        a, b, factor = self.kkt.solve(index, v, zeros, factor)
        reach = np.abs(self.kkt.Q_inverse @ v).max(initial=0.0)  # of a where nothing is active
        vertex = len(index) == self.n  # a is zero, whatever rounding says
        small = not vertex and cancels(1.0, reach, np.abs(a).max())
        if small or self._off_rows(a, index) > SIGN_TOLERANCE * reach:
            a, b = self.kkt.refined(index, v, zeros, a, b, factor)
            off = self._off_rows(a, index)
            if not off <= RESIDUAL_TOLERANCE * reach:
                raise NotCertifiedError(f"the gradient leaves the active rows by {off:.3g}; they are nearly dependent")
        return np.zeros_like(a) if vertex else a, b

    def _off_rows(self, a: Array, index: Index) -> float:
        """Return by how much a leaves the active rows at most; exactly it does not."""
        return float(np.abs(self.kkt.R.take(index, 0) @ a).max(initial=0.0))

    def _margin(self, point: KKTPoint) -> float:
        """Return the strict-complementarity margin in the caller's units."""
        index = point.index
        slack = point.slack / self.margin_units
        slack[index] = self._width[index]  # the opposite side of an active row is a constraint too
        force = point.force * self.margin_units[index]
        return max(float(min(force.min(initial=np.inf), slack.min(initial=np.inf))), 0.0)

    def _check_degenerate(self, point: KKTPoint, margin: float) -> None:
        """Raise LICQError where the rows that hold are dependent, DegenerateError below `min_margin`."""
        if point.kink:
            self.kkt.check_licq(point.binding)
        if self.min_margin is not None and margin < self.min_margin:
            raise DegenerateError(
                f"strict-complementarity margin {margin:.3g} is below min_margin={self.min_margin:g}: a "
                "constraint is weakly active and y* has a kink here; perturb the linear term (q)"
            )

    def warn_kink(self, kink: bool, margin: float) -> None:
        """Log, once for each solver, that a gradient is taken at a kink, where y* has none."""
        if kink and not self._warned:
            self._warned = True
            logger.warning(
                "a constraint is weakly active (margin %.1e): y* has a kink here, its gradient is one-sided; "
                "perturb the linear term with q, or set min_margin to raise instead",
                margin,
            )

    def _check_vectors(self, c: ArrayLike, h: ArrayLike) -> tuple[Array, Array]:
        try:
            c, h = np.ascontiguousarray(c, dtype=float), np.ascontiguousarray(h, dtype=float)
        except (TypeError, ValueError, RuntimeError):  # the last: a tensor that requires a gradient
            c, h = real_array("c", c), real_array("h", h)
        if c.shape != (self.n,) or h.shape != (self.m,):
            raise SSIGDError(f"c has shape {c.shape} and h {h.shape}; expected ({self.n},) and ({self.m},)")
        if not np.isfinite(c).all():
            raise NonFiniteError("c holds NaN or infinity")
        return c, h

    def _sides(self, h: Array) -> tuple[Array, Array]:
        """Return the scaled two-sided bounds of h, checked; those of the previous h are kept."""
        if self._h is None or not np.array_equal(h, self._h):
            if not np.isfinite(h).all():
                raise NonFiniteError("h holds NaN or infinity; leave out rows that do not bind instead of h = inf")
            lower, upper = self.rows.sides(h)
            width = (upper - lower) / self._lengths
            check_gap(self.rows, lower, upper, width)
            bounds = lower * self.scaling.rows, upper * self.scaling.rows
            self._h, self._bounds, self._width = h.copy(), bounds, width  # together: an error leaves all
        return self._bounds
