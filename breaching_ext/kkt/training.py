"""Train a homogeneous network by full-batch gradient descent until the KKT conditions nearly hold.

The loss is the binary cross-entropy on labels ±1, L = mean_i log(1 + exp(−y_i Φ(x_i))). What is descended is log L,
with the step lr / ‖∇ log L‖², which for L itself is lr / (L · ‖∇ log L‖²): every step lowers log L by about lr, so
that the loss falls geometrically to any value the arithmetic can name, although its gradient vanishes. With weight
decay the same step follows L + (decay / 2)‖θ‖², whose minimiser satisfies the KKT conditions at a finite loss.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import ConfigError
from ..files import write_atomically
from ..tensor_files import digest, read_tensors
from .descent import Descent, descent_of, log_loss
from .models import HomogeneousNetwork
from .multipliers import kkt_residual
from .recipe import Recipe, TrainingReport, initialise
from .training_set import check_training_set

log = logging.getLogger(__name__)


def train(
    model: HomogeneousNetwork,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
) -> TrainingReport:
    """Initialise a network and train it in place; however it ends, the network has the weights of its last step.

    Args:
        model: the network; its device is used.
        images: (n, C, H, W) in [0, 1].
        labels: ±1, (n,).
        recipe: see :class:`Recipe`.
        checkpoint: a file from which a stopped run goes on, bit for bit; it is removed at the end.
        progress: show a bar; None shows it in a terminal.

    Raises:
        SharedDataError: for labels other than ±1, no images, images that are not finite or do not fit the network.
        ConfigError: where the gradient is zero at the start, or the training diverges.
    """
    checkpoint = None if checkpoint is None else Path(checkpoint).expanduser()
    report = _train(model, images, labels, recipe.seeded(), checkpoint, progress)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return report


def _train(
    model: HomogeneousNetwork,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    checkpoint: Path | None,
    progress: bool | None = None,
) -> TrainingReport:
    """Train as :func:`train` does; the checkpoint stays."""
    check_training_set(model, images, labels)
    device = model.mean.device
    final = next(model.parameters()).dtype
    model.to(_dtype(recipe.dtype, device))
    dtype = model.mean.dtype
    initialise(model, recipe)
    descent = descent_of(model, images.to(device, dtype), labels.to(device, dtype), recipe)
    start = time.perf_counter()
    try:
        _check_gradient(descent)
        report = _loop(descent, recipe, checkpoint, progress)
    finally:
        descent.write_back()
        model.to(final)
    report.seconds = time.perf_counter() - start
    _warn(report, recipe)
    return report


def _warn(report: TrainingReport, recipe: Recipe) -> None:
    if not report.converged:
        log.warning(
            "Training stopped after %d steps at loss %.1e and KKT residual %.4f (targets %.1e and %.4f).",
            *(report.steps, report.loss, report.residual, recipe.target_loss, recipe.target_residual),
        )


def train_or_load(
    model: HomogeneousNetwork,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    path: str | Path,
    checkpoint: str | Path | None = None,
) -> TrainingReport:
    """Train as :func:`train` does and keep the result in a file, or take it from there: several attacks on one network.

    Args:
        model, images, labels, recipe: see :func:`train`.
        path: the file.
        checkpoint: see :func:`train`; None puts it beside the file.

    Raises:
        ConfigError: when the file holds a network of other shape, recipe, seed or images.
    """
    path, recipe = Path(path).expanduser(), recipe.seeded()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    key = repr((recipe, shapes, _digest(images, labels, model.mean)))
    if path.exists():
        content = read_tensors(
            path, "case.training.cache_path", "a network that this package trained", ("key", "report")
        )
        if content["key"] != key:
            raise ConfigError(
                f"{path} holds a network of other shape, recipe, seed or images, or of another version of this "
                "package; set training.seed, or another file."
            )
        model.load_state_dict(content["state_dict"])
        report = TrainingReport(**content["report"])
        _warn(report, recipe)
        return report
    part = path.with_suffix(".part.pt") if checkpoint is None else Path(checkpoint).expanduser()
    report = _train(model, images, labels, recipe, part)
    content = {"key": key, "state_dict": model.state_dict(), "report": report.as_dict()}
    if _written(content, path, "network"):
        part.unlink(missing_ok=True)  # only now: a training must not be lost between two files
    return report


def _digest(*tensors: Tensor) -> str:
    """Return a digest of values that is the same in single and double precision."""
    return digest(*(tensor.detach().cpu().double() for tensor in tensors))


def _check_gradient(descent: Descent) -> None:
    """Refuse a start from which no step leads: its size is divided by the gradient's norm."""
    value = log_loss(descent.labels * descent.model(descent.images)[:, 0])
    gradients = torch.autograd.grad(value, list(descent.model.parameters()))
    if not any(bool(gradient.any()) for gradient in gradients):
        raise ConfigError(
            "The gradient of the loss is zero at the start: every unit is dead, or every image equals the mean image."
        )


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "mps" else torch.float64
    return torch.float64 if name in ("double", "float64") else torch.float32


def _loop(descent: Descent, recipe: Recipe, checkpoint: Path | None, progress: bool | None) -> TrainingReport:
    shapes = [tuple(p.shape) for p in descent.model.parameters()]
    key = repr((asdict(recipe), shapes, _digest(descent.images, descent.labels, descent.model.mean)))
    start = _resume(descent, checkpoint, key)
    report = TrainingReport(start, math.nan, math.nan, 0.0, False)
    if start >= recipe.max_steps:  # it was killed after its last step
        descent.write_back()
        with torch.no_grad():
            value = log_loss(descent.labels * descent.model(descent.images)[:, 0])
        _check(descent, recipe, report, start, float(value))
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
    return report


def _check(descent: Descent, recipe: Recipe, report: TrainingReport, steps: int, log_value: float) -> None:
    """Bring the report up to date; the residual costs more than a step, so it waits until the loss is there."""
    report.steps, report.loss = steps, math.exp(log_value) if log_value > -740 else 0.0
    last = steps >= recipe.max_steps
    if not math.isfinite(log_value):
        raise ConfigError(
            f"Training diverged after {steps} steps (loss {log_value}); lower case.training.lr={recipe.lr}."
        )
    if log_value <= math.log(recipe.target_loss) or recipe.weight_decay or last:
        descent.write_back()
        report.residual = kkt_residual(descent.model, descent.images, descent.labels)
    small_loss = log_value <= math.log(recipe.target_loss) or recipe.weight_decay > 0
    report.converged = small_loss and report.residual <= recipe.target_residual


def _save(descent: Descent, checkpoint: Path, key: str, steps: int) -> None:
    _written({"key": key, "step": steps, "tensors": [t.detach() for t in descent.tensors()]}, checkpoint, "checkpoint")


def _written(content: dict[str, Any], path: Path, what: str) -> bool:
    """Write a file, and return whether it could be: a full disk does not end a training, nor lose what it gave."""
    try:
        write_atomically(path, lambda target: torch.save(content, target))
    except (OSError, RuntimeError) as error:
        log.error("The %s %s could not be written (%s); the run goes on.", what, path, error)
        return False
    return True


def _resume(descent: Descent, checkpoint: Path | None, key: str) -> int:
    if checkpoint is None or not checkpoint.exists():
        return 0
    content = read_tensors(checkpoint, "case.training.checkpoint_path", "a training checkpoint", ("key", "step"))
    if content["key"] != key:
        raise ConfigError(
            f"The checkpoint {checkpoint} belongs to another training run, or version of this package; remove it."
        )
    with torch.no_grad():
        for mine, saved in zip(descent.tensors(), content["tensors"], strict=True):
            mine.copy_(saved)
    log.info("Training goes on after step %d from %s.", content["step"], checkpoint)
    return int(content["step"])
