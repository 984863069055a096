"""The (stochastic, inexact) gradient that the algorithms see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from breaching_ext.ssigd.arguments import check_number
from breaching_ext.ssigd.backends import check_backend, implicit_gradient
from breaching_ext.ssigd.errors import NonFiniteError, SSIGDError
from breaching_ext.ssigd.gradients import adjoint_gradient
from breaching_ext.ssigd.problem import QuadraticBilevelProblem
from breaching_ext.ssigd.rows import Array
from breaching_ext.ssigd.solution import QPSolution


@dataclass(frozen=True)
class Sample:
    """One gradient with the lower-level solution that it came from.

    Attributes:
        gradient: ∇F_q(x) or its stochastic, inexact version, (n,).
        solution: the perturbed lower level at x.
    """

    gradient: Array
    solution: QPSolution


class GradientOracle:
    """Draws gradients of F_q with noise ξ on ∇f and an inexact lower level.

    Args:
        problem: the bilevel problem.
        backend: "kkt" (default), "cvxpylayers" or "fd".
        noise_std: standard deviation of each entry of the noise on ∇ₓf and ∇ᵧf, default 0. The noise goes
            through the Jacobian of y*, as in f̃(x, y; ξ) = f(x, y) + ξₓᵀx + ξᵧᵀy: unbiased with bounded
            variance (Assumption 4 of Khanduri et al., Assumption 5 of arXiv 2504.04545).
        inexactness: δ, default 0. ∇f is taken at a feasible ŷ with ‖ŷ − y*‖ ≤ δ and the right active set
            (Assumption 2 of Khanduri et al.).

    Raises:
        SSIGDError: the backend is unknown, a parameter is negative, or noise or inexactness is asked of a
            backend other than "kkt".
    """

    def __init__(
        self,
        problem: QuadraticBilevelProblem,
        *,
        backend: str = "kkt",
        noise_std: float = 0.0,
        inexactness: float = 0.0,
    ) -> None:
        """See the class."""
        for name, value in (("noise_std", noise_std), ("inexactness", inexactness)):
            check_number(name, value, least=0)
            if value and backend != "kkt":
                raise SSIGDError(f'{name}={value} needs backend="kkt", not {backend!r}')
        self.problem, self.backend = problem, check_backend(backend)
        self.noise_std, self.inexactness = noise_std, inexactness

    def sample(self, x: Array, q: Array, rng: np.random.Generator) -> Sample:
        """Draw a gradient at x (n,) under the perturbation q (p,)."""
        solution = self.problem.certified_solution(x, q)
        if self.backend == "kkt":
            y = inexact_solution(self.problem, x, solution, self.inexactness, rng) if self.inexactness else None
            noise = (self._noise(len(x), rng), self._noise(len(q), rng)) if self.noise_std else None
            gradient = adjoint_gradient(self.problem, x, solution, y=y, noise=noise)
        else:
            tensors = torch.from_numpy(x), torch.from_numpy(q)
            gradient = implicit_gradient(self.problem, *tensors, backend=self.backend).numpy()
        if not np.isfinite(gradient).all():
            raise NonFiniteError("the implicit gradient holds NaN or infinity; reduce the step size")
        return Sample(gradient, solution)

    def _noise(self, size: int, rng: np.random.Generator) -> Array:
        return self.noise_std * rng.standard_normal(size)


def inexact_solution(
    problem: QuadraticBilevelProblem, x: Array, solution: QPSolution, delta: float, rng: np.random.Generator
) -> Array:
    """Return a feasible ŷ with ‖ŷ − y*‖ ≤ δ whose active set is that of y*, (p,).

    The error is a random direction within the active constraints, shortened where it would use up more than
    half of the slack of another one.
    """
    G, rows = problem.solver.G, solution.active
    direction = rng.standard_normal(len(solution.y))
    if len(rows):
        active = G[rows]
        direction -= active.T @ np.linalg.lstsq(active.T, direction, rcond=None)[0]
    length = np.linalg.norm(direction)
    if length <= 1e-12:  # a vertex: the active constraints leave no room
        return solution.y
    direction *= delta / length
    slack, slope = problem.right_hand_side(x) - G @ solution.y, G @ direction
    slope[rows] = 0.0
    toward = slope > 0
    room = (0.5 * slack[toward] / slope[toward]).min(initial=1.0)
    return solution.y + max(room, 0.0) * direction
