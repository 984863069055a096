"""What benchmarks/ssigd.py compares with: gradients in 60 digits, and active sets known by construction."""

from __future__ import annotations

import mpmath
import numpy as np
import torch

from breaching_ext.ssigd import ParametricQP, StronglyConvexBilevelProblem


def exact_implicit_part(
    problem: StronglyConvexBilevelProblem, x: torch.Tensor, rows: list[int]
) -> tuple[torch.Tensor, bool]:
    """Return (∂y*/∂x)ᵀ∇ᵧf in 60 digits for the active rows, and whether these pass the KKT signs.

    The signs are checked here again, so a wrong active set cannot pass for a reference.
    """
    n, k = problem.dim_lower, len(rows)
    names = ("P", "A", "B", "c_lower", "c_upper", "b")
    with mpmath.workdps(60):
        P, A, B, c_lower, c_upper, b = (mpmath.matrix(getattr(problem, name).tolist()) for name in names)
        point = mpmath.matrix(x.tolist())
        bound = b - A * point
        kkt = mpmath.zeros(n + k)
        kkt[:n, :n] = mpmath.matrix(problem.solver.Q.tolist())
        for i, row in enumerate(rows):
            for j in range(n):
                kkt[n + i, j] = kkt[j, n + i] = B[row, j]
        z = mpmath.lu_solve(kkt, mpmath.matrix([*(-(c_lower + P.T * point)), *(bound[row] for row in rows)]))
        slack = bound - B * z[:n]
        signs = [z[n + i] for i in range(k)] + [slack[i] for i in range(len(bound)) if i not in rows]
        adjoint = mpmath.lu_solve(kkt, mpmath.matrix([*c_upper, *([0] * k)]))
        part = -(P * adjoint[:n])
        for i, row in enumerate(rows):
            part -= A[row, :].T * adjoint[n + i]
        return torch.tensor([float(value) for value in part], dtype=torch.float64), min(signs) > 0


def near_degenerate(
    qp: ParametricQP, rng: np.random.Generator, margin: float, *, active: bool
) -> tuple[np.ndarray, np.ndarray, set[int]]:
    """Return c, h and the active set of a box QP in which one constraint is decided by `margin` alone."""
    n = qp.n
    order = rng.permutation(n)
    bounded, doubtful = order[: n // 2], order[n // 2]
    y = rng.uniform(-0.8, 0.8, n)
    sign = rng.choice([-1.0, 1.0], n)
    force = np.zeros(n)
    y[bounded], force[bounded] = sign[bounded], rng.uniform(0.1, 2.0, len(bounded))
    y[doubtful] = sign[doubtful] * (1.0 if active else 1.0 - margin)
    force[doubtful] = margin if active else 0.0
    c = -qp.Q @ y - sign * force
    chosen = [*bounded, doubtful] if active else list(bounded)
    return c, np.ones(2 * n), {int(i if sign[i] > 0 else n + i) for i in chosen}
