"""SSIGD: stochastic smoothed implicit gradient descent with one perturbation q for the whole run.

Source: Khanduri, Tsaknakis, Zhang, Liu, Liu, Zhang, Hong: "Linearly constrained bilevel optimization: a
smoothed implicit gradient approach", ICML 2023, Algorithm 2. Theorems and assumptions are numbered as in its
ICLR 2023 submission, which is public.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from breaching_ext.ssigd.arguments import check_number, check_whole
from breaching_ext.ssigd.descent import BilevelDescent, Update
from breaching_ext.ssigd.errors import SSIGDError
from breaching_ext.ssigd.finish import CertifiedPoint, certified_finish, check_finish
from breaching_ext.ssigd.history import BilevelResult, Snapshot
from breaching_ext.ssigd.problem import QuadraticBilevelProblem
from breaching_ext.ssigd.rows import Array

logger = logging.getLogger(__name__)

REGIMES = ("strongly_convex", "convex", "weakly_convex")


class SSIGD(BilevelDescent):
    """x ← proj_X(x − β_r ∇F_q(x; ξ)), with q drawn once.

    The step size is β_r = min(1/(μ_F (r+1)), 1/L) in the regime "strongly_convex" (Theorem 3, capped), and
    β = step/√T in "convex" and "weakly_convex" (Theorems 4 and 2). The output is an average of the iterates,
    weighted by r+1 in the strongly convex regime, where early iterates are far off, and uniform otherwise
    (Theorem 4). `x_last` and `x_best` of the result are there as well.

    Args:
        problem: the bilevel problem.
        regime: "strongly_convex" (default), "convex" or "weakly_convex": what is known of F.
        mu: μ_F, default the smallest eigenvalue of Q_upper; the modulus of F where f is linear in y and F
            convex.
        lipschitz: L, default the largest eigenvalue of Q_upper.
        step: scale of the constant step size, default 1/L.
        q_std: standard deviation of the entries of q, default 1e-6. |F_q − F| ≤ L_f ‖q‖/μ_g
            (Proposition 2).
        noise_std, inexactness, backend, seed: see BilevelDescent.

    Raises:
        SSIGDError: the regime is unknown or a constant is not positive.
    """

    def __init__(
        self,
        problem: QuadraticBilevelProblem,
        *,
        regime: str = "strongly_convex",
        mu: float | None = None,
        lipschitz: float | None = None,
        step: float | None = None,
        q_std: float = 1e-6,
        noise_std: float = 0.0,
        inexactness: float = 0.0,
        backend: str = "kkt",
        seed: int = 0,
    ) -> None:
        """See the class."""
        super().__init__(problem, q_std=q_std, noise_std=noise_std, inexactness=inexactness, backend=backend, seed=seed)
        if regime not in REGIMES:
            raise SSIGDError(f"regime={regime!r} is unknown; expected one of {REGIMES}")
        values = np.linalg.eigvalsh(problem.arrays.hessian)
        self.regime = regime
        self.mu = float(values[0]) if mu is None else mu
        self.lipschitz = float(values[-1]) if lipschitz is None else lipschitz
        constants = {"mu": self.mu} if regime == "strongly_convex" else {}
        if constants or step is None:
            constants["lipschitz"] = self.lipschitz
        for name, value in constants.items():
            check_number(name, value, above=0, where=f" in the regime {regime!r}")
        self.step = 1.0 / self.lipschitz if step is None else step
        check_number("step", self.step, above=0)

    def solve_certified(
        self, iterations: int, x0: Tensor | None = None, finish_gradients: int = 50
    ) -> tuple[BilevelResult, CertifiedPoint]:
        """Spend a budget of gradients on a run and its certified finish, for convex F with f linear in y.

        At an optimum on a kink of F the run alone stays at a gap of O(log T / T); the finish closes it (see
        `certified_finish`).

        Args:
            iterations: gradients in all, T.
            x0: start, (n,), as for `solve`.
            finish_gradients: how many of them are kept for the finish.

        Returns:
            The run of T − finish_gradients iterations, and the point after the finish with its certified gap. Where
            the finish cannot start, the log says so, and the point is the run's best with an infinite gap.

        Raises:
            SSIGDError: the finish would get no gradient or all of them, or does not apply (`check_finish`).
        """
        check_whole("iterations", iterations, 4)
        check_whole("finish_gradients", finish_gradients, 3)
        if finish_gradients >= iterations:
            raise SSIGDError(f"finish_gradients={finish_gradients} is out of range; valid: 3 to {iterations - 1}")
        check_finish(self.problem)
        result = self.solve(iterations - finish_gradients, x0)
        points = [result.x_last, result.x_average]
        try:
            found = certified_finish(self.problem, points, max_gradients=finish_gradients)
        except SSIGDError as error:  # the run is not lost with it
            logger.warning("The finish cannot start, and the run's best point has no bound: %s", error)
            return result, CertifiedPoint(result.x_best, result.objectives["best"], -np.inf, 0)
        if result.objectives["best"] < found.objective:  # few gradients may end the finish above the run's best
            found = replace(found, x=result.x_best, objective=result.objectives["best"])
        return result, found

    def parameters(self) -> dict[str, Any]:
        """Return the parameters for the record."""
        return {"regime": self.regime, "mu": self.mu, "lipschitz": self.lipschitz, "step": self.step}

    def step_size(self, r: int, iterations: int) -> float:
        """Return β_r of iteration r = 0, 1, … of T."""
        if self.regime == "strongly_convex":
            return min(1.0 / (self.mu * (r + 1)), 1.0 / self.lipschitz)
        return self.step / iterations**0.5

    def perturbation(self) -> Tensor:
        """Return the perturbation q that a run uses, (p,)."""
        return torch.from_numpy(self._draw_q(np.random.default_rng(self.seed)))

    def _weight(self, r: int) -> float:
        return r + 1.0 if self.regime == "strongly_convex" else 1.0

    def _prepare(self, x: Array, rng: np.random.Generator) -> dict[str, Array]:
        return {"q": self._draw_q(rng)}

    def _step(self, snapshot: Snapshot, iterations: int, rng: np.random.Generator) -> Update:
        x, q = snapshot.x, snapshot.vectors["q"]
        sample = self.oracle.sample(x, q, rng)
        step = self.step_size(snapshot.iteration, iterations)
        moved = self.project(x - step * sample.gradient)
        return Update(moved, snapshot.vectors, step, sample.gradient, sample.solution, x)
