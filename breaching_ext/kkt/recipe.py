"""How a network is trained, how that ended, and the start of the training."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..errors import ConfigError
from ..values import check_number, check_seed, check_whole
from .models import HomogeneousNetwork


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Args:
        first_layer_std: standard deviation of the first layer's start; its bias starts at 0.
        head_scale: factor on the default start of the other layers. Small values bring the network nearer to a KKT
            point, because gradient flow preserves the differences of the layers' squared norms.
        lr: decrease of log L a step.
        weight_decay: 0 is plain gradient descent.
        target_loss: train at least to this loss.
        target_residual: and until the KKT residual of the training data, relative to ‖θ‖², is below this.
        max_steps: give up after so many steps, with a warning.
        check_every: steps between two evaluations of the residual and two checkpoints.
        dtype: 'auto' is float64 where the device has it, else float32.
        seed: of the start; None takes torch's current state.
    """

    first_layer_std: float = 1e-3
    head_scale: float = 1.0
    lr: float = 0.01
    weight_decay: float = 0.0
    target_loss: float = 1e-12
    target_residual: float = 0.01
    max_steps: int = 50_000
    check_every: int = 1000
    dtype: str = "auto"
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("first_layer_std", "head_scale", "lr", "target_loss"):
            check_number(f"case.training.{name}", getattr(self, name), above=0)
        for name in ("weight_decay", "target_residual"):
            check_number(f"case.training.{name}", getattr(self, name), least=0)
        for name in ("max_steps", "check_every"):
            check_whole(f"case.training.{name}", getattr(self, name), 1)
        check_seed("case.training.seed", self.seed)
        if self.dtype not in ("auto", "float", "float32", "double", "float64"):
            raise ConfigError(f"case.training.dtype={self.dtype} is not possible; valid: auto, float32, float64.")

    def seeded(self) -> Recipe:
        """Return the recipe with the seed that it takes now."""
        return replace(self, seed=torch.initial_seed() % 2**63) if self.seed is None else self


@dataclass
class TrainingReport:
    """How a training ended: steps, loss, relative KKT residual of its data, seconds, whether it met both targets."""

    steps: int
    loss: float
    residual: float
    seconds: float
    converged: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def initialise(model: HomogeneousNetwork, recipe: Recipe) -> None:
    """Draw the start: a small first layer without bias, the others from torch's default, scaled."""
    generator = torch.Generator()
    seed = recipe.seeded().seed
    assert seed is not None
    generator.manual_seed(seed)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                parameter.zero_()
            elif index == 0:
                parameter.copy_(recipe.first_layer_std * draw)
            else:  # the variance of torch's default for linear layers, 1 / (3 fan-in), as a normal distribution
                parameter.copy_(recipe.head_scale * draw / math.sqrt(3 * parameter[0].numel()))
