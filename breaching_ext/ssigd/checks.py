"""Checks of the data of a QP, and the diagnosis of one that the solver gave up on."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import lapack
from scipy.optimize import linprog

from breaching_ext.ssigd.arguments import real_array
from breaching_ext.ssigd.errors import (
    InfeasibleError,
    LICQError,
    NonFiniteError,
    NotCertifiedError,
    NotStronglyConvexError,
    SSIGDError,
)
from breaching_ext.ssigd.kkt_system import SIGN_TOLERANCE
from breaching_ext.ssigd.rows import Array, PairedRows

MAX_CONDITION = 1e14


def check_matrices(Q: ArrayLike, G: ArrayLike) -> tuple[Array, Array]:
    """Return float64 copies of the symmetric part of Q (n, n) and of G (m, n), or raise what is wrong."""
    Q, G = real_array("Q", Q), real_array("G", G)
    if Q.ndim != 2 or Q.shape[0] != Q.shape[1] or not Q.size or G.ndim != 2 or G.shape[1] != Q.shape[0]:
        raise SSIGDError(f"Q has shape {Q.shape} and G {G.shape}; expected (n, n) and (m, n) with n of at least 1")
    if not (np.isfinite(Q).all() and np.isfinite(G).all()):
        raise NonFiniteError("Q or G holds NaN or infinity")
    zero = np.flatnonzero(~G.any(axis=1))
    if len(zero):
        raise SSIGDError(f"rows {zero.tolist()[:8]} of G are zero and constrain no y; remove them")
    return 0.5 * (Q + Q.T), G


def check_condition(Q: Array) -> None:
    """Raise NotStronglyConvexError where a symmetric Q is not positive definite, or singular to working precision."""
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


def check_gap(rows: PairedRows, lower: Array, upper: Array, gap: Array) -> None:
    """Raise where opposite rows leave no room (InfeasibleError) or exactly none to spare (LICQError).

    Args:
        rows: the two-sided form.
        lower: lower bounds, (p,).
        upper: upper bounds, (p,).
        gap: distance between the two hyperplanes, (upper - lower) / ‖R‖, (p,).
    """
    if not rows.paired.any():
        return
    row = int(gap.argmin())
    if gap[row] < 0:
        raise InfeasibleError(
            f"no y satisfies G y ≤ h: {_opposite(rows, row)} and their bounds cross by {-gap[row]:.3g}; relax h"
        )
    closed = (upper - lower <= SIGN_TOLERANCE * (np.abs(lower) + np.abs(upper))) & rows.paired
    if closed.any():
        raise LICQError(
            f"LICQ fails: {_opposite(rows, int(closed.argmax()))} with equal bounds, which fixes a combination of y; "
            "substitute it away"
        )


def _opposite(rows: PairedRows, row: int) -> str:
    return f"rows {rows.upper_of[row]} and {rows.lower_of[row]} of G are opposite"


def unsolved_error(
    R: Array, lower: Array, upper: Array, row_scale: Array, flag: int
) -> InfeasibleError | NotCertifiedError:
    """Tell infeasible constraints from a solver failure by a phase-1 linear program.

    Args:
        R: scaled rows, (p, n).
        lower, upper: their bounds, (p,).
        row_scale: the factors by which the rows were scaled, (p,).
        flag: the solver's exit flag.
    """
    both = np.isfinite(lower)
    bounds = np.r_[upper, -lower[both]]
    size = np.abs(bounds).max() or 1.0
    relax = np.r_[row_scale, row_scale[both]] / row_scale.max()  # a violation of one is one in the smallest row
    rows = np.c_[np.vstack([R, -R[both]]), -relax]
    n = R.shape[1]
    free = [(None, None)] * n + [(0, None)]
    options = {"primal_feasibility_tolerance": 1e-10}  # HiGHS's least; its default is 1e-7
    phase = linprog(np.r_[np.zeros(n), 1.0], A_ub=rows, b_ub=bounds / size, bounds=free, options=options)
    if phase.status == 0 and phase.fun > 0:
        return InfeasibleError(
            f"no y satisfies G y ≤ h: the smallest possible violation is {phase.fun * size / row_scale.max():.3g}; "
            "relax h, or keep x where the lower level is feasible"
        )
    return NotCertifiedError(
        f"daqp stopped with exit flag {flag}, and no violation of G y ≤ h could be shown; rescale Q, c, G and h"
    )
