"""Train a homogeneous network by full-batch gradient descent until the KKT conditions nearly hold.

The loss is the binary cross-entropy on labels ±1, L = mean_i log(1 + exp(−y_i Φ(x_i))). What is descended is log L,
with the step lr / ‖∇ log L‖², which for L itself is lr / (L · ‖∇ log L‖²): every step lowers log L by about lr, so
that the loss falls geometrically to any value the arithmetic can name, although its gradient vanishes. With weight
decay the same step follows L + (decay / 2)‖θ‖², whose minimiser satisfies the KKT conditions at a finite loss.

A fully connected network is trained in the span of its data. The first layer is always W₁ = s·W₀ + Cᵀ X, so that
steps are taken on C (n, m), with the metric of W₁, and pre-activations are s·Z₀ + X Xᵀ C: exact, and for n ≪ D much
cheaper than steps on W₁.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import ConfigError, SharedDataError
from ..files import write_atomically
from .models import MLP, HomogeneousNetwork
from .multipliers import kkt_residual

log = logging.getLogger(__name__)


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

    first_layer_std: float = 1e-4
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
        for name in ("first_layer_std", "head_scale", "lr", "target_loss", "max_steps", "check_every"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"training.{name}={getattr(self, name)} is not possible; valid: above 0.")
        for name in ("weight_decay", "target_residual"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"training.{name}={getattr(self, name)} is not possible; valid: 0 or more.")
        if self.dtype not in ("auto", "float", "float32", "double", "float64"):
            raise ConfigError(f"training.dtype={self.dtype} is not possible; valid: auto, float32, float64.")


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


def train(
    model: HomogeneousNetwork,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
) -> TrainingReport:
    """Initialise a network and train it in place.

    Args:
        model: the network; its device is used.
        images: (n, C, H, W) in [0, 1].
        labels: ±1, (n,).
        recipe: see :class:`Recipe`.
        checkpoint: a file from which a stopped run goes on, bit for bit; it is removed at the end.
        progress: show a bar; None shows it in a terminal.

    Raises:
        SharedDataError: for labels other than ±1, no images, or images that do not fit the network.
    """
    check_training_set(model, images, labels)
    device = model.mean.device
    final = next(model.parameters()).dtype
    model.to(_dtype(recipe.dtype, device))
    dtype = model.mean.dtype
    initialise(model, recipe)
    descent = _descent(model, images.to(device, dtype), labels.to(device, dtype), recipe)
    start = time.perf_counter()
    report = _loop(descent, recipe, None if checkpoint is None else Path(checkpoint), progress)
    descent.write_back()
    model.to(final)
    report.seconds = time.perf_counter() - start
    if not report.converged:
        log.warning(
            "Training stopped after %d steps at loss %.1e and KKT residual %.4f (targets %.1e and %.4f).",
            *(report.steps, report.loss, report.residual, recipe.target_loss, recipe.target_residual),
        )
    return report


def train_or_load(
    model: HomogeneousNetwork, images: Tensor, labels: Tensor, recipe: Recipe, path: str | Path
) -> TrainingReport:
    """Train as :func:`train` does and keep the result in a file, or take it from there: several attacks on one network.

    Raises:
        ConfigError: when the file holds a network of another recipe or other images.
    """
    path = Path(path)
    key = repr((recipe, tuple(model.state_dict()), float(images.cpu().double().sum()), labels.tolist()))
    if path.exists():
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["key"] != key:
            raise ConfigError(f"{path} holds a network of another recipe or other images; remove it or choose another.")
        model.load_state_dict(content["state_dict"])
        return TrainingReport(**content["report"])
    report = train(model, images, labels, recipe, path.with_suffix(".part.pt"))
    content = {"key": key, "state_dict": model.state_dict(), "report": report.as_dict()}
    write_atomically(path, lambda target: torch.save(content, target))
    return report


def check_training_set(model: HomogeneousNetwork, images: Tensor, labels: Tensor) -> None:
    """Check a training set.

    Raises:
        SharedDataError: naming what does not fit.
    """
    if len(images) == 0:
        raise SharedDataError("n=0 images: there is nothing to train on; valid: 1 or more.")
    if tuple(images.shape[1:]) != model.shape or len(labels) != len(images):
        raise SharedDataError(
            f"Images {tuple(images.shape)} with labels {tuple(labels.shape)} do not fit the network; valid: "
            f"(n, {', '.join(map(str, model.shape))}) and (n,)."
        )
    wrong = sorted(set(labels.tolist()) - {-1, 1})
    if wrong:
        raise SharedDataError(f"Labels {wrong} are not valid for the logistic loss; valid: -1 and +1.")


def initialise(model: HomogeneousNetwork, recipe: Recipe) -> None:
    """Draw the start: a small first layer without bias, the others from torch's default, scaled."""
    generator = torch.Generator()
    generator.manual_seed(torch.initial_seed() % 2**63 if recipe.seed is None else recipe.seed)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                parameter.zero_()
            elif index == 0:
                parameter.copy_(recipe.first_layer_std * draw)
            else:  # the variance of torch's default for linear layers, 1 / (3 fan-in), as a normal distribution
                parameter.copy_(recipe.head_scale * draw / math.sqrt(3 * parameter[0].numel()))


def log_loss(margins: Tensor) -> Tensor:
    """Return log mean_i log(1 + exp(−q_i)) of margins q (n,), exact also where the loss itself underflows."""
    small = torch.nn.functional.softplus(-margins.clamp_max(30)).log()
    return torch.logsumexp(torch.where(margins > 30, -margins, small), dim=0) - math.log(len(margins))


class _Descent:
    """Steps on all parameters of any network; `_SpanDescent` takes them in the span of the data."""

    def __init__(self, model: HomogeneousNetwork, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
        self.model, self.images, self.labels, self.recipe = model, images, labels, recipe
        self.parameters: list[Tensor] = list(model.parameters())

    def tensors(self) -> list[Tensor]:
        """What a step changes."""
        return self.parameters

    def step(self) -> Tensor:
        """Take one step; returns log L before it."""
        value = log_loss(self.labels * self.model(self.images)[:, 0])
        gradients = torch.autograd.grad(value, self.parameters)
        self._move(value.detach(), self.parameters, list(gradients), sum(g.square().sum() for g in gradients))
        return value.detach()

    def _move(self, value: Tensor, tensors: list[Tensor], gradients: list[Tensor], squared_norm: Any) -> Tensor:
        rate = self.recipe.lr / squared_norm  # of log L, whose gradient is ∇L / L
        decay = 1 - self.recipe.weight_decay * rate / value.exp() if self.recipe.weight_decay else None
        if decay is not None:
            decay = decay.clamp_min(0.5)  # far out, where L is tiny, the decay would outrun the step
        with torch.no_grad():
            for tensor, gradient in zip(tensors, gradients, strict=True):
                if decay is not None:
                    tensor.mul_(decay)
                tensor.sub_(rate * gradient)
        return torch.ones_like(value) if decay is None else decay

    def write_back(self) -> None:
        """Bring the network's parameters up to date."""


class _SpanDescent(_Descent):
    """Steps of a fully connected network with C in place of the first layer."""

    model: MLP

    def __init__(self, model: MLP, images: Tensor, labels: Tensor, recipe: Recipe) -> None:
        super().__init__(model, images, labels, recipe)
        first: Any = model.layers[0]
        self.x = (images - model.mean).flatten(1)  # (n, D)
        self.has_bias = first.bias is not None
        self.gram = self.x @ self.x.T + float(self.has_bias)
        self.start = first.weight.detach().clone()
        with torch.no_grad():
            self.start_z = first(self.x)  # (n, m)
        self.c = torch.zeros_like(self.start_z)
        self.shrink = torch.ones((), dtype=self.x.dtype, device=self.x.device)
        self.rest: list[Tensor] = [p for layer in list(model.layers)[1:] for p in layer.parameters()]

    def tensors(self) -> list[Tensor]:
        return [self.c, self.shrink, *self.rest]

    def step(self) -> Tensor:
        z = (self.shrink * self.start_z + self.gram @ self.c).requires_grad_()
        value = log_loss(self.labels * self.model.after_first(z)[:, 0])
        of_z, *of_rest = torch.autograd.grad(value, [z, *self.rest])
        # the gradient of W₁ is of_zᵀ X, hence of C it is of_z, with norm ⟨of_z of_zᵀ, X Xᵀ⟩
        squared_norm = ((of_z @ of_z.T) * self.gram).sum() + sum(g.square().sum() for g in of_rest)
        self.shrink.mul_(self._move(value.detach(), [self.c, *self.rest], [of_z, *of_rest], squared_norm))
        return value.detach()

    def write_back(self) -> None:
        with torch.no_grad():
            first: Any = self.model.layers[0]
            first.weight.copy_(self.shrink * self.start + self.c.T @ self.x)
            if first.bias is not None:
                first.bias.copy_(self.c.sum(dim=0))


def _descent(model: HomogeneousNetwork, images: Tensor, labels: Tensor, recipe: Recipe) -> _Descent:
    return (_SpanDescent if isinstance(model, MLP) else _Descent)(model, images, labels, recipe)  # type: ignore[arg-type]


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "mps" else torch.float64
    return torch.float64 if name in ("double", "float64") else torch.float32


def _loop(descent: _Descent, recipe: Recipe, checkpoint: Path | None, progress: bool | None) -> TrainingReport:
    key = repr((asdict(recipe), float(descent.images.cpu().double().sum()), descent.labels.tolist()))
    start = _resume(descent, checkpoint, key)
    report = TrainingReport(start, math.nan, math.nan, 0.0, False)
    bar = tqdm(
        total=recipe.max_steps, initial=start, desc="training", disable=None if progress is None else not progress
    )
    with bar:
        for step in range(start, recipe.max_steps):
            value = descent.step()
            if (step + 1) % recipe.check_every and step + 1 < recipe.max_steps:
                continue
            bar.update(step + 1 - bar.n)
            _check(descent, recipe, report, step + 1, float(value))
            bar.set_postfix(loss=f"{report.loss:.1e}", kkt=f"{report.residual:.4f}")
            if report.converged:
                break
            if checkpoint is not None:
                _save(descent, checkpoint, key, step + 1)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return report


def _check(descent: _Descent, recipe: Recipe, report: TrainingReport, steps: int, log_value: float) -> None:
    """Bring the report up to date; the residual costs more than a step, so it waits until the loss is there."""
    report.steps, report.loss = steps, math.exp(log_value) if log_value > -740 else 0.0
    last = steps >= recipe.max_steps
    if not math.isfinite(log_value):
        raise ConfigError(f"Training diverged after {steps} steps (loss {log_value}); lower training.lr={recipe.lr}.")
    if log_value <= math.log(recipe.target_loss) or recipe.weight_decay or last:
        descent.write_back()
        report.residual = kkt_residual(descent.model, descent.images, descent.labels)
    small_loss = log_value <= math.log(recipe.target_loss) or recipe.weight_decay > 0
    report.converged = small_loss and report.residual <= recipe.target_residual


def _save(descent: _Descent, checkpoint: Path, key: str, steps: int) -> None:
    state = {"key": key, "step": steps, "tensors": [t.detach() for t in descent.tensors()]}
    write_atomically(checkpoint, lambda target: torch.save(state, target))


def _resume(descent: _Descent, checkpoint: Path | None, key: str) -> int:
    if checkpoint is None or not checkpoint.exists():
        return 0
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if content["key"] != key:
        raise ConfigError(f"The checkpoint {checkpoint} belongs to another training run; remove it.")
    with torch.no_grad():
        for mine, saved in zip(descent.tensors(), content["tensors"], strict=True):
            mine.copy_(saved)
    log.info("Training goes on after step %d from %s.", content["step"], checkpoint)
    return int(content["step"])
