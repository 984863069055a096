"""EnhancedSSIGD: the name under which users of an earlier prototype know the cvxpylayers backend."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from breaching_ext.ssigd.arguments import check_number, check_whole
from breaching_ext.ssigd.backends import implicit_gradient
from breaching_ext.ssigd.cvxpy_backends import available
from breaching_ext.ssigd.problem import QuadraticBilevelProblem
from breaching_ext.ssigd.ssigd import SSIGD

logger = logging.getLogger(__name__)
_fallback_told = False


class EnhancedSSIGD:
    """SSIGD with gradients through cvxpylayers, or through the KKT system where cvxpylayers is not installed.

    Prefer `SSIGD` with its default backend: it is faster and more exact. In the prototype the lower level
    did not contain x, so its y* was constant and its timings compared solver overheads; here it does.

    Args:
        problem: the bilevel problem.
        use_cvxpylayers: False for the "kkt" backend, default True.
        device: accepted for compatibility; the algorithm runs on the CPU in float64.
        q_std, seed: as in SSIGD.

    Attributes:
        backend: the backend in use.
        q: the perturbation, (p,).
    """

    def __init__(
        self,
        problem: QuadraticBilevelProblem,
        use_cvxpylayers: bool = True,
        device: str | torch.device = "cpu",
        *,
        q_std: float = 1e-6,
        seed: int = 0,
    ) -> None:
        """See the class."""
        global _fallback_told
        self.problem, self.q_std, self.seed = problem, q_std, seed
        self.device = torch.device(device)
        self.backend = "cvxpylayers" if use_cvxpylayers and available() else "kkt"
        if use_cvxpylayers and self.backend == "kkt" and not _fallback_told:
            _fallback_told = True
            logger.warning('cvxpylayers is not installed (pip install "breaching-ext[ssigd]"): using backend="kkt"')
        self.q = self._algorithm("convex", step=1.0, lipschitz=1.0).perturbation()

    def grad_F(self, x: Tensor, y: Tensor | None = None) -> Tensor:  # noqa: N802 (the prototype's name)
        """Return ∇F_q(x), (n,). y is accepted for compatibility and not needed."""
        return implicit_gradient(self.problem, x, self.q, backend=self.backend)

    def solve_ll(self, x: Tensor) -> Tensor:
        """Return the unperturbed y*(x), (p,)."""
        return self.problem.solve_lower_level(x)

    def solve_ll_with_q(self, x: Tensor, q: Tensor) -> Tensor:
        """Return the perturbed y*(x), (p,)."""
        return self.problem.solve_lower_level(x, q)

    def solve(
        self,
        T: int = 1000,
        beta: float = 0.01,
        x0: Tensor | None = None,
        diminishing: bool = True,
        mu_F: float | None = None,
    ) -> dict[str, Any]:
        """Run SSIGD with the prototype's signature.

        Args:
            T: iterations.
            beta: step size; with diminishing=True the cap of 1/(μ_F (r+1)).
            x0: start, (n,), default 0.
            diminishing: step sizes of the strongly convex regime (default) instead of a constant one.
            mu_F: modulus, default the smallest eigenvalue of Q_upper.

        Returns:
            A dict with x_final, losses, grad_norms, final_loss, final_grad_norm, final_gradient_norm,
            iterations, method, and the full `result`.
        """
        check_whole("T", T, 1)
        check_number("beta", beta, above=0)
        if diminishing:
            algorithm = self._algorithm("strongly_convex", lipschitz=1.0 / beta, mu=mu_F)
        else:
            algorithm = self._algorithm("convex", step=beta * T**0.5)
        result = algorithm.solve(T, x0)
        losses, norms = result.history["objective"], result.history["gradient_norm"]
        return {
            "x_final": result.x_last, "losses": losses, "grad_norms": norms, "final_loss": losses[-1],
            "final_grad_norm": norms[-1], "final_gradient_norm": norms[-1], "iterations": T,
            "method": "SSIGD", "result": result,
        }  # fmt: skip

    def _algorithm(self, regime: str, **parameters: Any) -> SSIGD:
        return SSIGD(self.problem, regime=regime, q_std=self.q_std, backend=self.backend, seed=self.seed, **parameters)
