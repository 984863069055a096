"""The random reference problem of a given size, seed and condition number."""

from __future__ import annotations

import numpy as np

from breaching_ext.ssigd.arguments import check_number, check_whole
from breaching_ext.ssigd.errors import SSIGDError
from breaching_ext.ssigd.problem import QuadraticBilevelProblem
from breaching_ext.ssigd.rows import Array

CONSTRAINTS = ("box", "coupled")


def random_spd(rng: np.random.Generator, n: int, condition: float) -> Array:
    """Return a symmetric matrix with eigenvalues spread geometrically from 1/√κ to √κ, (n, n)."""
    basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    values = np.geomspace(condition**-0.5, condition**0.5, n) if n > 1 else np.ones(1)
    matrix = (basis * values) @ basis.T
    return 0.5 * (matrix + matrix.T)


class StronglyConvexBilevelProblem(QuadraticBilevelProblem):
    """The random reference problem, in which x moves the lower level through P (and A).

    Args:
        dim: number of upper-level variables.
        seed: seed of the data, default 0.
        constraints: "box" for −1 ≤ y ≤ 1 (default), "coupled" for the box and random rows A x + B y ≤ b for
            which y = 0 is strictly feasible at every x in X.
        dim_lower: number of lower-level variables, default dim.
        num_constraints: coupled rows, default max(1, dim // 2).
        condition: condition number of Q_lower, default 10.
        coupling: scale of P and A, default 1; at 0 the lower level does not see x and the problem is not
            bilevel.
        upper_y_weight: weight of ½‖y‖² in f, default 0.
        x_bound: X is the box −x_bound ≤ x ≤ x_bound, default 2.
        min_margin: as in QuadraticBilevelProblem.
    """

    def __init__(
        self, dim: int, seed: int = 0, constraints: str = "box", *, dim_lower: int | None = None,
        num_constraints: int | None = None, condition: float = 10.0, coupling: float = 1.0,
        upper_y_weight: float = 0.0, x_bound: float = 2.0, min_margin: float | None = None,
    ) -> None:  # fmt: skip
        """See the class."""
        if constraints not in CONSTRAINTS:
            raise SSIGDError(f"constraints={constraints!r} is unknown; expected one of {CONSTRAINTS}")
        for name, size, least in (
            ("dim", dim, 1),
            ("dim_lower", dim_lower, 1),
            ("num_constraints", num_constraints, 0),
        ):
            if size is not None:
                check_whole(name, size, least)
        check_whole("seed", seed, 0)
        check_number("condition", condition, least=1)
        check_number("coupling", coupling)
        check_number("upper_y_weight", upper_y_weight, least=0)
        if constraints != "box" or x_bound != float("inf"):  # coupled rows are as wide as the box of x
            check_number("x_bound", x_bound, least=0)
        rng = np.random.default_rng(seed)
        p = dim if dim_lower is None else dim_lower
        data = {
            "Q_upper": random_spd(rng, dim, 4.0), "x_target": rng.uniform(-1.5, 1.5, dim),
            "c_upper": 2.0 * rng.standard_normal(p), "Q_lower": random_spd(rng, p, condition),
            "c_lower": rng.standard_normal(p), "P": coupling * rng.standard_normal((dim, p)) / np.sqrt(dim),
        }  # fmt: skip
        coupled = max(1, dim // 2) if num_constraints is None else num_constraints
        rows = 0 if constraints == "box" else coupled
        A = 0.3 * coupling * rng.standard_normal((rows, dim)) / dim
        B = rng.standard_normal((rows, p)) / np.sqrt(p)
        b = x_bound * np.abs(A).sum(axis=1) + rng.uniform(0.02, 0.2, rows)
        super().__init__(
            **data, A=np.vstack([np.zeros((2 * p, dim)), A]), B=np.vstack([np.eye(p), -np.eye(p), B]),
            b=np.r_[np.ones(2 * p), b], x_lower=-x_bound, x_upper=x_bound,
            Q_upper_y=upper_y_weight * np.eye(p), min_margin=min_margin,
        )  # fmt: skip
        self.seed, self.constraints = seed, constraints
