"""What distinguishes one optimizer of the study from another, as data.

Every choice on which the papers and the libraries differ is a field here, with its source, and is acted on in
exactly one place (`rules.py` for the update, `schedules.py` for the schedule):

- ``decay`` says what multiplies the weight-decay factor λ. ``"l2"`` adds λθ to the gradient (the loss carries
  λ/2·‖θ‖²). ``"schedule"`` removes η_t·λ·θ, where η_t is the schedule's factor alone: Algorithm 2 of
  Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019. ``"lr"`` removes lr_t·λ·θ, where
  lr_t is the whole step
  size: `torch.optim.AdamW` and the Adafactor of `transformers`. The last is coupled again: only the product
      of
  learning rate and λ matters.
- ``normalized_decay`` replaces λ by λ_norm·√(b / (B·T)), with b the batch size, B the number of training
  POINTS and T the epochs of the run, or of the current period under warm restarts (appendix B.1 of the same
  paper).
- ``factored_dims`` says which two dimensions of a tensor with more than two are factored. ``"largest"``: the
  two largest, as the authors' Mesh-TensorFlow code and optax do. ``"last"``: the last two, as torch and
  transformers do; for a 3×3 convolution these are the kernel's 3×3 entries, which saves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from ..errors import ConfigError
from ..values import is_number, is_whole

Decay = Literal["l2", "schedule", "lr"]
FactoredDims = Literal["largest", "last"]
SecondMoment = Literal["none", "full", "factored"]

DECAYS: tuple[str, ...] = ("l2", "schedule", "lr")
FACTORED_DIMS: tuple[str, ...] = ("largest", "last")


@dataclass(frozen=True)
class OptimizerConfig:
    """SGD with momentum, and the fields that all optimizers of the study share.

    Attributes:
        lr: Base learning rate; a grid multiplies it.
        weight_decay: Base λ (or λ_norm); a grid multiplies it.
        beta1: Momentum coefficient; 0 keeps no first moment.
        decay: What multiplies λ, see the module's text.
        normalized_decay: Whether ``weight_decay`` is λ_norm.
    """

    lr: float = 0.1
    weight_decay: float = 1e-3
    beta1: float = 0.9
    decay: Decay = "l2"
    normalized_decay: bool = False

    def __post_init__(self) -> None:
        """Reject values outside their range.

        Raises:
            ValueError: Naming the field, its value and the valid ones.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            require(not isinstance(field.default, float) or is_number(value), field.name, value, "a finite number")
        require_choice("decay", self.decay, DECAYS)
        require(isinstance(self.normalized_decay, bool), "normalized_decay", self.normalized_decay, "true or false")
        require(self.lr > 0, "lr", self.lr, "a number > 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number >= 0")
        require(0 <= self.beta1 < 1, "beta1", self.beta1, "a number in [0, 1)")

    @property
    def second_moment(self) -> SecondMoment:
        """How the second moment of the gradient is kept."""
        return "none"


@dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    """Adam (Kingma & Ba 2015) with any of the three decays; AdamW is ``decay="schedule"``.

    Attributes:
        beta2: Decay of the second moment.
        eps: Added to the square root of the bias-corrected second moment.
    """

    lr: float = 1e-3
    decay: Decay = "schedule"
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Reject values outside their range (ValueError)."""
        super().__post_init__()
        require(0 <= self.beta2 < 1, "beta2", self.beta2, "a number in [0, 1)")
        require(self.eps > 0, "eps", self.eps, "a number > 0")

    @property
    def second_moment(self) -> SecondMoment:
        """How the second moment of the gradient is kept."""
        return "full"


@dataclass(frozen=True)
class AdafactorConfig(OptimizerConfig):
    """Adafactor (Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", ICML
    2018).

    ``lr`` is the cap in ρ_t = multiplier·min(lr, 1/√t); the grid's multiplier stands outside the minimum, so
    that it scales the whole run. The paper defines no weight decay. The default is the classical one, in the
    gradient, as for Adam + L2; ``decay="lr"`` gives that of `transformers` and ``decay="schedule"`` the
    decoupled one.

    Attributes:
        beta1: Momentum over the clipped, scaled updates; 0 (the paper's choice) keeps none.
        beta2_exponent: c in β̂₂ₜ = 1 − t^−c.
        eps1: Added to the squared gradient. It is never squared: ε₁² = 1e-60 is zero in float32.
        eps2: Lower bound of RMS(θ) in the relative step size.
        clip_threshold: d, the RMS above which an update is scaled down.
        factored_dims: Which two dimensions are factored, see the module's text.
    """

    lr: float = 0.01
    beta1: float = 0.0
    beta2_exponent: float = 0.8
    eps1: float = 1e-30
    eps2: float = 1e-3
    clip_threshold: float = 1.0
    factored_dims: FactoredDims = "largest"

    def __post_init__(self) -> None:
        """Reject values outside their range (ValueError)."""
        super().__post_init__()
        require_choice("factored_dims", self.factored_dims, FACTORED_DIMS)
        require(self.beta2_exponent > 0, "beta2_exponent", self.beta2_exponent, "a number > 0")
        require(self.eps1 > 0, "eps1", self.eps1, "a number > 0")
        require(self.eps2 > 0, "eps2", self.eps2, "a number > 0")
        require(self.clip_threshold > 0, "clip_threshold", self.clip_threshold, "a number > 0")

    @property
    def second_moment(self) -> SecondMoment:
        """How the second moment of the gradient is kept."""
        return "factored"


@dataclass(frozen=True)
class Budget:
    """The size of a run, from which normalized decay and schedules follow.

    Attributes:
        points: B, the number of training points.
        batch_size: b.
        epochs: Length of the run in epochs, before a restart schedule rounds it to the end of a period.
    """

    points: int = 60_000
    batch_size: int = 128
    epochs: int = 100

    def __post_init__(self) -> None:
        """Reject values below one (ValueError)."""
        for key in ("points", "batch_size", "epochs"):
            value = getattr(self, key)
            require(is_whole(value) and value >= 1, key, value, "a whole number >= 1")
            object.__setattr__(self, key, int(value))  # NumPy's are no whole numbers to torch

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; a last, smaller batch counts."""
        return -(-self.points // self.batch_size)


def require(holds: bool, key: str, value: object, valid: str) -> None:
    """Raise ``ConfigError``, a ValueError of one line that names key, value and the valid ones, unless ``holds``."""
    if not holds:
        raise ConfigError(f"{key}={value!r} is not valid; it must be {valid}.")


def require_choice(key: str, value: object, valid: tuple[object, ...]) -> None:
    """Raise ``ConfigError`` unless ``value`` is one of ``valid``."""
    require(value in valid, key, value, "one of " + ", ".join(map(str, valid)))
