"""The optimizer of stacked MAGIA candidates, and its settings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .lbfgs import BatchedLBFGS

__all__ = ["STEP_SIZES", "OptimizerOptions"]

#: What users get who name an optimizer and no step size.
STEP_SIZES = {"l-bfgs": 1.0, "adam": 0.05}


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer of the candidates.

    Attributes:
        name: 'l-bfgs' or 'adam'.
        step_size: L-BFGS's fixed step (1), or Adam's learning rate at the start (cosine decay over the run).
        inner_iterations: optimizer iterations an outer step.
        history_size: L-BFGS curvature pairs.
        line_search: None or 'strong_wolfe' (L-BFGS).
        label_scale: logits are label_scale times the variable that is optimised; above 1 lets labels move earlier.

    Raises:
        ValueError: for an unknown optimizer or line search, or a number that is not positive.
    """

    name: str = "l-bfgs"
    step_size: float = 1.0
    inner_iterations: int = 20
    history_size: int = 100
    line_search: str | None = None
    label_scale: float = 5.0

    def __post_init__(self) -> None:
        if self.name not in ("l-bfgs", "adam"):
            raise ValueError(f"optim.optimizer={self.name!r} is unknown; valid: l-bfgs, adam.")
        if self.line_search not in (None, "strong_wolfe"):
            raise ValueError(f"optim.line_search={self.line_search!r} is unknown; valid: empty, strong_wolfe.")
        for key in ("label_scale", "step_size"):
            if not getattr(self, key) > 0:
                raise ValueError(f"optim.{key}={getattr(self, key)} is out of range; valid: above 0.")
        for key in ("inner_iterations", "history_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"optim.{key}={getattr(self, key)} is out of range; valid: 1, 2, 3, ...")

    def build(self, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        """The optimizer over stacks (N, ...); both kinds keep the candidates apart."""
        if self.name == "adam":  # elementwise, so that a stack is N independent runs
            return torch.optim.Adam(parameters, lr=self.step_size)
        return BatchedLBFGS(
            parameters,
            lr=self.step_size,
            max_iter=self.inner_iterations,
            tolerance_grad=0.0,  # torch's tolerances are absolute: late in a run every change is below them, and an
            tolerance_change=0.0,  # outer step would end after one iteration
            history_size=self.history_size,
            line_search_fn=self.line_search,
        )
