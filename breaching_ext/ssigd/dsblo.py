"""DS-BLO: a doubly stochastically perturbed method that needs no convexity of F.

Source: Khanduri, Tsaknakis, Zhang, Liu, Hong: "A doubly stochastically perturbed algorithm for linearly
constrained bilevel optimization", arXiv 2504.04545, Algorithm 1. The first perturbation is a fresh q in
every iteration, the second a point drawn between the last two iterates, where the gradient is taken.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from breaching_ext.ssigd.arguments import check_number
from breaching_ext.ssigd.descent import BilevelDescent, Update
from breaching_ext.ssigd.errors import SSIGDError
from breaching_ext.ssigd.history import Snapshot
from breaching_ext.ssigd.problem import QuadraticBilevelProblem
from breaching_ext.ssigd.rows import Array

OPTIONS = ("I", "II")


class DSBLO(BilevelDescent):
    """x ← x − m/(γ₁‖m‖ + γ₂), m ← βm + (1−β) ∇F_q(x̄), x̄ uniform on the segment between the last two
    iterates.

    One scalar places x̄ on the segment; drawing it per coordinate would leave the segment and void the
    descent argument. The paper has X = Rⁿ; where the problem has a box, the iterates are projected onto it.
    Lower-level constraints may be coupled (A x + B y ≤ b).

    Args:
        problem: the bilevel problem.
        beta: momentum, in [0, 1), default 0.9.
        gamma1, gamma2: positive constants of the step size, default 1 and 10: steps are shorter than 1/γ₁.
        option: "I" (default) takes ∇F_q, "II" its sampled version with noise_std > 0.
        q_std: standard deviation of the entries of q, default 1e-3.
        noise_std, inexactness, backend, seed: see BilevelDescent.

    Raises:
        SSIGDError: a parameter is out of range, or noise_std does not fit the option.
    """

    output = "last"

    def __init__(
        self,
        problem: QuadraticBilevelProblem,
        *,
        beta: float = 0.9,
        gamma1: float = 1.0,
        gamma2: float = 10.0,
        option: str = "I",
        q_std: float = 1e-3,
        noise_std: float = 0.0,
        inexactness: float = 0.0,
        backend: str = "kkt",
        seed: int = 0,
    ) -> None:
        """See the class."""
        super().__init__(problem, q_std=q_std, noise_std=noise_std, inexactness=inexactness, backend=backend, seed=seed)
        if option not in OPTIONS:
            raise SSIGDError(f"option={option!r} is unknown; expected one of {OPTIONS}")
        if (option == "II") != (noise_std > 0):
            raise SSIGDError(f"noise_std={noise_std} does not fit option={option!r}: I is exact, II is sampled")
        check_number("beta", beta, least=0, below=1)
        check_number("gamma1", gamma1, above=0)
        check_number("gamma2", gamma2, above=0)
        self.beta, self.gamma1, self.gamma2, self.option = beta, gamma1, gamma2, option

    def parameters(self) -> dict[str, Any]:
        """Return the parameters for the record."""
        return {"beta": self.beta, "gamma1": self.gamma1, "gamma2": self.gamma2, "option": self.option}

    def _prepare(self, x: Array, rng: np.random.Generator) -> dict[str, Array]:
        return {"momentum": self.oracle.sample(x, self._draw_q(rng), rng).gradient}

    def _step(self, snapshot: Snapshot, iterations: int, rng: np.random.Generator) -> Update:
        x, momentum = snapshot.x, snapshot.vectors["momentum"]
        step = 1.0 / (self.gamma1 * float(np.linalg.norm(momentum)) + self.gamma2)
        moved = self.project(x - step * momentum)
        between = x + rng.uniform() * (moved - x)
        sample = self.oracle.sample(between, self._draw_q(rng), rng)
        momentum = self.beta * momentum + (1.0 - self.beta) * sample.gradient
        return Update(moved, {"momentum": momentum}, step, sample.gradient, sample.solution, between)


def theorem_parameters(epsilon: float, radius: float, variance: float, lipschitz: float) -> dict[str, float]:
    """Return β, γ₁ and γ₂ for which the theorem promises an (ε, δ̄)-Goldstein stationary point.

    Args:
        epsilon: ε, target norm.
        radius: δ̄, radius of the Goldstein subdifferential.
        variance: δ_v², bound on the variance of the gradient.
        lipschitz: L̄_F, bound on its norm.

    Returns:
        The parameters by their names in DSBLO (Algorithm 1, "Input").

    Raises:
        SSIGDError: a value that is not positive (the variance may be 0), or an ε so small or large that β is not in
            (0, 1).
    """
    for name, value in (("epsilon", epsilon), ("radius", radius), ("lipschitz", lipschitz)):
        check_number(name, value, above=0)
    check_number("variance", variance, least=0)
    scale = math.sqrt(variance) + 2.0 * lipschitz
    beta = 1.0 - epsilon**2 / (960.0 * (variance + 2.0 * lipschitz**2))
    if not 0.0 < beta < 1.0:
        raise SSIGDError(f"epsilon={epsilon} makes beta={beta}; valid: an epsilon for which beta lies within (0, 1)")
    window = math.log(32.0 * scale / epsilon) / -math.log(beta)
    gamma1 = window / radius
    return {"beta": beta, "gamma1": gamma1, "gamma2": 4.0 * gamma1 * scale}
