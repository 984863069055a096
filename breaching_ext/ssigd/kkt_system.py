"""The KKT system of a QP on any set W of its rows: Q y + R_Wᵀ λ = r, R_W y = e, with Q and R fixed.

Everything that depends on Q and R alone is computed once: Q⁻¹, Q⁻¹Rᵀ and R Q⁻¹Rᵀ. A set of rows then costs one
Cholesky factor of its Schur complement R_W Q⁻¹ R_Wᵀ.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from scipy.linalg import lapack

from breaching_ext.ssigd.errors import LICQError, NotCertifiedError
from breaching_ext.ssigd.rows import Array
from breaching_ext.ssigd.solution import Index

# Condition number of Q from which KKT solves are refined with residuals in extended precision. Where long
# double is no wider than double (macOS on ARM, Windows), the refinement is an ordinary one and the error
# grows to about 1e-16 times the condition number.
REFINE_ABOVE = 1e3
#: Share of its scale below which a sign counts as zero.
SIGN_TOLERANCE = 1e-12
#: Rounding errors of y, relative to its largest entry, from which on it is refined.
CANCELLED = 1e-13
EPS = float(np.finfo(float).eps)
#: Steps of a refinement at most; it ends where they no longer halve.
MOST_REFINEMENTS = 10


def cancels(inverse_size: float, c: Any, y: Any) -> Any:
    """Whether y may be so small a difference of large numbers that one solve leaves it inexact.

    The active rows need not show it: they may be met exactly while other entries are off.

    Args:
        inverse_size: ‖Q⁻¹‖∞.
        c, y: their largest entries, numbers or tensors of one shape.
    """
    return EPS * inverse_size * c > CANCELLED * y


class KKTSystem:
    """Solves the system for one set of rows after another.

    Args:
        Q: symmetric positive definite, (n, n); best with a diagonal near one.
        R: rows, (p, n); best of length near one.
        names: what error messages call the rows, (p,).

    Attributes:
        condition: condition number of Q.
        Q_inverse: Q⁻¹, (n, n).
        T: Q⁻¹Rᵀ, (n, p).
        K: R Q⁻¹Rᵀ, (p, p).
        inverse_size: ‖Q⁻¹‖∞.
    """

    def __init__(self, Q: Array, R: Array, names: Index) -> None:
        """See the class."""
        self.Q, self.R, self._names = Q, R, names
        values = np.linalg.eigvalsh(Q)
        self.condition = float(values[-1] / values[0])
        factor, _ = lapack.dpotrf(Q, lower=1)
        inverse, _ = lapack.dpotri(factor, lower=1)
        self.Q_inverse = np.tril(inverse) + np.tril(inverse, -1).T
        self.T = self.Q_inverse @ self.R.T
        self._T_rows = np.ascontiguousarray(self.T.T)
        self.K = self.R @ self.T
        self.inverse_size = float(np.abs(self.Q_inverse).sum(axis=1).max(initial=0.0))

    @cached_property
    def _long(self) -> tuple[Array, Array]:
        """Q and R in extended precision."""
        return self.Q.astype(np.longdouble), self.R.astype(np.longdouble)

    def solve(self, index: Index, r: Array, e: Array, factor: Array | None = None) -> tuple[Array, Array, Array | None]:
        """Solve on the rows `index`.

        Args:
            index: the rows W, (k,).
            r, e: right-hand sides, (n,) and (k,).
            factor: what an earlier call returned for the same rows.

        Returns:
            y (n,), λ (k,), positive on the upper side, and the factor of R_W Q⁻¹ R_Wᵀ.

        Raises:
            LICQError: the rows are linearly dependent.
            NotCertifiedError: the system is singular to working precision.
        """
        if factor is None and len(index):
            factor = self._schur(index)
        y, signed = self._once(index, r, e, factor)
        if self.condition > REFINE_ABOVE:
            y, signed = self.refined(index, r, e, y, signed, factor)
        return y, signed, factor

    def refined(
        self, index: Index, r: Array, e: Array, y: Array, signed: Array, factor: Array | None
    ) -> tuple[Array, Array]:
        """Return a solution on the rows `index` improved by residuals in extended precision; arguments as above."""
        Q, R = self._long
        last = np.inf
        for _ in range(MOST_REFINEMENTS):
            lag = r - Q @ y - R[index].T @ signed
            gap = e - R[index] @ y
            dy, ds = self._once(index, lag.astype(float), gap.astype(float), factor)
            y, signed = y + dy, signed + ds
            size = np.abs(dy).max()
            if size <= 1e-16 * np.abs(y).max() or size > 0.5 * last:
                break
            last = size
        return y, signed

    def stationarity(self, c: Array, y: Array, index: Index, signed: Array) -> float:
        """Return ‖Qy + c + R_Wᵀλ‖∞."""
        return float(np.abs(self.Q @ y + c + signed @ self.R.take(index, 0)).max())

    def check_licq(self, index: Index) -> None:
        """Raise LICQError where the rows `index` are linearly dependent."""
        unit = self.R[index] / np.linalg.norm(self.R[index], axis=1)[:, None]
        if len(index) > len(self.Q) or np.linalg.svd(unit, compute_uv=False)[-1] < 1e-10:
            names = self._names[index].tolist()
            raise LICQError(
                f"LICQ fails: the active rows {names[:8]} of G (or their opposites) are linearly dependent: "
                "the multipliers and the gradient are not unique; remove duplicate or redundant rows"
            )

    def _once(self, index: Index, r: Array, e: Array, factor: Array | None) -> tuple[Array, Array]:
        y = self.Q_inverse @ r
        if factor is None:
            return y, np.zeros(0)
        signed, _ = lapack.dpotrs(factor, self.R.take(index, 0) @ y - e, lower=1)
        return y - signed @ self._T_rows.take(index, 0), signed

    def _schur(self, index: Index) -> Array:
        """Return the Cholesky factor of R_W Q⁻¹ R_Wᵀ, or raise LICQError where the rows are dependent."""
        S = self.K[index[:, None], index]
        factor, info = lapack.dpotrf(S, lower=1, clean=0)
        if info or ((factor.diagonal() ** 2) < 1e-8 * S.diagonal()).any():
            self.check_licq(index)
        if info:
            raise NotCertifiedError("the KKT matrix is singular to working precision; rescale Q and G")
        return factor
