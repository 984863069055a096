"""Checks of the data of a QP, and the diagnosis of one that the solver gave up on."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import lapack
from scipy.optimize import linprog

from breaching_ext.ssigd.errors import (
    InfeasibleError,
    LICQError,
    NonFiniteError,
    NotCertifiedError,
    NotStronglyConvexError,
    SSIGDError,
)
from breaching_ext.ssigd.rows import Array, PairedRows

SIGN_TOLERANCE = 1e-12  # relative; below it a multiplier or a slack counts as zero
MAX_CONDITION = 1e14


def check_matrices(Q: ArrayLike, G: ArrayLike) -> tuple[Array, Array]:
    """Return float64 copies of the symmetric part of Q (n, n) and of G (m, n), or raise what is wrong."""
    Q, G = np.array(Q, dtype=float), np.array(G, dtype=float)
    if Q.ndim != 2 or Q.shape[0] != Q.shape[1] or G.ndim != 2 or G.shape[1] != Q.shape[0]:
        raise SSIGDError(f"Q has shape {Q.shape} and G {G.shape}; expected (n, n) and (m, n)")
    if not (np.isfinite(Q).all() and np.isfinite(G).all()):
        raise NonFiniteError("Q or G holds NaN or infinity")
    zero = np.flatnonzero(~G.any(axis=1))
    if len(zero):
        raise SSIGDError(f"rows {zero.tolist()[:8]} of G are zero and constrain no y; remove them")
    return 0.5 * (Q + Q.T), G


def check_condition(Q: Array) -> float:
    """Return the condition number of a symmetric Q, or raise NotStronglyConvexError."""
    eigenvalues = np.linalg.eigvalsh(Q)
    low, high = float(eigenvalues[0]), float(eigenvalues[-1])
    if low <= 0 or lapack.dpotrf(Q, lower=1)[1]:
        raise NotStronglyConvexError(
            f"Q is not positive definite: its smallest eigenvalue is {low:.3g}; add a multiple of the identity"
        )
    if high / low > MAX_CONDITION:
        raise NotStronglyConvexError(
            f"Q is singular to working precision: its condition number {high / low:.1e} is above "
            f"{MAX_CONDITION:.0e}; rescale the variables or add a multiple of the identity"
        )
    return high / low


def check_gap(rows: PairedRows, lower: Array, upper: Array, gap: Array) -> None:
    """Raise where opposite rows leave no room (InfeasibleError) or exactly none to spare (LICQError).

    Args:
        rows: the two-sided form.
        lower: lower bounds, (p,).
        upper: upper bounds, (p,).
        gap: distance between the two hyperplanes, (upper - lower) / ‖R‖, (p,).
    """
    row = int(gap.argmin())
    names = f"rows {rows.upper_of[row]} and {rows.lower_of[row]} of G are opposite"
    if gap[row] < 0:
        raise InfeasibleError(f"no y satisfies G y ≤ h: {names} and their bounds cross by {-gap[row]:.3g}; relax h")
    if gap[row] <= SIGN_TOLERANCE:
        raise LICQError(f"LICQ fails: {names} with equal bounds, which fixes a combination of y; substitute it away")


def unsolved_error(G: Array, h: Array, flag: int) -> InfeasibleError | NotCertifiedError:
    """Tell infeasible constraints from a solver failure by a phase-1 linear program.

    Args:
        G: constraint matrix, (m, n).
        h: right-hand side, (m,).
        flag: the solver's exit flag.
    """
    m, n = G.shape
    cost = np.r_[np.zeros(n), 1.0]
    bounds = [(None, None)] * n + [(0, None)]
    phase = linprog(cost, A_ub=np.c_[G, -np.ones(m)], b_ub=h, bounds=bounds)
    if phase.status == 0 and phase.fun > 0:
        return InfeasibleError(
            f"no y satisfies G y ≤ h: the smallest possible violation is {phase.fun:.3g}; relax h, "
            "or keep x where the lower level is feasible"
        )
    return NotCertifiedError(f"daqp stopped with exit flag {flag} on a feasible problem; rescale Q, c, G and h")
