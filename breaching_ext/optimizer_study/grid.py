"""A grid of learning-rate and weight-decay multipliers for one variant."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..values import is_number, is_whole
from .checkpoint import Checkpoint
from .clock import Spent
from .config import Budget, require
from .data import images_of
from .description import describe
from .executor import Plan, check_choices, make_plan
from .models import create_model
from .records import GridSearchResult, OptimizerExperiment
from .task import Cell, TrainingTask
from .training import SequentialRun, StackedRun, train
from .variants import get_variant

log = logging.getLogger(__name__)

LR_MULTIPLIERS: tuple[float, ...] = tuple(2.0**power for power in range(-10, 2))
"""1/1024 … 2."""
WD_MULTIPLIERS: tuple[float, ...] = (0.0, *(2.0**power for power in range(-5, 6)))
"""0, 1/32 … 32."""


def run_grid(
    variant_id: str,
    model: nn.Module | str,
    train: Dataset | Tensor,
    test: Dataset | Tensor,
    lr_multipliers: Sequence[float] = LR_MULTIPLIERS,
    wd_multipliers: Sequence[float] = WD_MULTIPLIERS,
    epochs: int = 100,
    batch_size: int = 128,
    seed: int = 42,
    executor: str = "auto",
    *,
    compile: object = "auto",
    chunk: int | None = None,
    schedule: str | None = None,
    schedule_options: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    log_steps: bool = False,
    sample_epochs: Sequence[int] = (),
    progress: bool = True,
) -> OptimizerExperiment:
    """Train a variant at every point of a grid.

    All members start from the model's weights and see the same batches.

    Args:
        variant_id: A1 … D3.
        model: An autoencoder without buffers, on the device to use, or a name of `models.MODELS` (its weights
            are then drawn from ``seed``). The module itself is not changed.
        train: Training inputs: a dataset (items or their first entries) or a tensor (n, …).
        test: Test inputs, likewise.
        lr_multipliers: Factors on the base learning rate, > 0.
        wd_multipliers: Factors on the base weight decay, >= 0.
        epochs: Length of the runs; warm restarts round it down to the end of a period (``schedule_options``).
        batch_size: Images a batch; a last, smaller batch is used too.
        seed: Seed of the order of the batches.
        executor: ``auto`` (measured), ``stacked`` or ``sequential``.
        compile: Whether the stacked step is compiled: True, False or ``auto``.
        chunk: Most members in a stack (they are split evenly: 144 by at most 100 into 72 and 72); default: the fastest
            of 16, 36 and as many as fit into half of the free memory and take about a second a step.
        schedule: Another schedule than the variant's.
        schedule_options: Arguments of the schedule, such as ``{"end": "up"}``.
        settings: Other settings than the variant's, such as ``{"decay": "lr"}``.
        checkpoint: Where every chunk is kept as soon as it is finished; a later call with the same arguments, and any
            cells, continues there. It does not hold what `log_steps` and `sample_epochs` record, so it is not used with
            them.
        log_steps: Record loss, gradient norm, weight norm and learning rate of every step.
        sample_epochs: Epochs after which reconstructions of eight test images are kept.
        progress: Whether to show a bar over member-steps.

    Returns:
        The experiment, its cells in the order of the multipliers, learning rate outermost.

    Raises:
        ValueError: If an argument is not valid, or the checkpoint another run's; checked before anything is trained.
    """
    variant = get_variant(variant_id).with_settings(**(settings or {}))
    cells = check_cells(lr_multipliers, wd_multipliers)
    inputs, held_out = images_of(train), images_of(test)
    require(
        inputs.shape[1:] == held_out.shape[1:],
        "test",
        tuple(held_out.shape),
        f"shaped like {inputs.shape[1:]}",
    )
    if isinstance(model, str):
        valid = "images (n, 1, S, S) for a model that is named"
        require(inputs.shape[1:] == (1, inputs.shape[-1], inputs.shape[-1]), "train", tuple(inputs.shape), valid)
        model = create_model(model, inputs.shape[-1], seed)
    _check_model(model)
    check_choices(executor, compile, chunk)
    check_seed(seed)
    rates = variant.create_schedule(epochs, schedule, **(schedule_options or {}))
    for epoch in sample_epochs:
        valid = f"whole numbers from 1 to {rates.epochs}, the length of the run"
        require(is_whole(epoch) and 1 <= epoch <= rates.epochs, "sample_epochs", list(sample_epochs), valid)
    parameter = next(model.parameters())
    task = TrainingTask(
        variant=variant,
        schedule=rates,
        budget=Budget(len(inputs), batch_size, epochs),
        model=model,
        train=inputs.to(parameter),
        test=held_out.to(parameter),
        seed=int(seed),
        log_steps=log_steps,
        sample_epochs=tuple(sample_epochs),
    )
    return _Grid(task, cells, checkpoint, progress).run(executor, compile, chunk)


def _check_model(model: nn.Module) -> None:
    """Refuse what members of one stack cannot share, or what would make a test loss depend on the moment."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    require(not frozen, "model", f"frozen parameters {frozen[:4]}", "a model all of whose parameters are trained")
    random = [name for name, m in model.named_modules() if isinstance(m, _DropoutNd) and m.training and m.p > 0]
    require(not random, "model", f"dropout in training mode {random[:4]}", "a model without it")


class _Grid:
    """One call of `run_grid`, after its arguments were checked."""

    def __init__(self, task: TrainingTask, cells: list[Cell], checkpoint: str | Path | None, progress: bool) -> None:
        """Read what an earlier, interrupted call left."""
        self.task, self.cells, self.progress = task, cells, progress
        self.spent, self.done = Spent(), dict[Cell, GridSearchResult]()
        if checkpoint is not None and (task.log_steps or task.sample_epochs):
            log.warning("checkpoint=%s is not used: it holds neither the logs of steps nor samples.", checkpoint)
            checkpoint = None
        self.checkpoint = None if checkpoint is None else Checkpoint(checkpoint, task)
        if self.checkpoint is not None:
            self.done, before = self.checkpoint.read()
            self.spent.before |= before

    def run(self, executor: str, compiled: object, chunk: int | None) -> OptimizerExperiment:
        """Train the cells that are missing."""
        started = time.perf_counter()
        missing = [cell for cell in self.cells if cell not in self.done]
        plan = make_plan(self.task, missing, executor, compiled, chunk) if missing else None
        if plan is not None:
            try:
                self._train(missing, plan, time.perf_counter() - started)
            except BaseException:
                if self.done:
                    self._keep([])  # the seconds of the chunk that is lost
                raise
        config = {
            **describe(self.task),
            "plan": None if plan is None else plan.to_dict(),
            **self.spent.so_far(),
        }
        variant = self.task.variant
        results = [self.done[cell] for cell in self.cells]
        return OptimizerExperiment(variant.id, variant.name, config, results)

    def _train(self, cells: list[Cell], plan: Plan, planning: float) -> None:
        """Train chunk after chunk; the first one bears the seconds of planning and compiling."""
        total = len(self.cells) * self.task.steps
        with tqdm(
            total=total,
            initial=total - len(cells) * self.task.steps,
            unit="member-step",
            desc=self.task.variant.id,
            disable=not self.progress,
        ) as bar:
            for first in range(0, len(cells), plan.chunk):
                chunk = cells[first : first + plan.chunk]
                started = time.perf_counter() - (planning if first == 0 else 0.0)
                run = (
                    StackedRun(self.task, chunk, plan.compiled)
                    if plan.executor == "stacked"
                    else SequentialRun(self.task, chunk)
                )
                logs = train(run, len(chunk), bar.update, started)
                self._keep([self._result(cell, training) for cell, training in zip(chunk, logs, strict=True)])

    def _result(self, cell: Cell, training: Any) -> GridSearchResult:
        """A cell with its absolute rates."""
        config = self.task.variant.config
        return GridSearchResult(*cell, config.lr * cell[0], config.weight_decay * cell[1], training)

    def _keep(self, results: list[GridSearchResult]) -> None:
        """Take finished cells, and put them into the checkpoint."""
        self.done |= {result.cell: result for result in results}
        if self.checkpoint is not None:
            self.checkpoint.add(results, self.spent.so_far())


def check_cells(lr_multipliers: Sequence[float], wd_multipliers: Sequence[float]) -> list[Cell]:
    """The points of the grid, learning rate outermost; ValueError for multipliers that are not valid."""
    lrs, wds = _multipliers("lr_multipliers", lr_multipliers), _multipliers("wd_multipliers", wd_multipliers)
    require(all(lr > 0 for lr in lrs), "lr_multipliers", lrs, "a list of finite numbers > 0")
    require(all(wd >= 0 for wd in wds), "wd_multipliers", wds, "a list of finite numbers >= 0")
    return [(lr, wd) for lr in lrs for wd in wds]


def _multipliers(key: str, values: Sequence[float]) -> list[float]:
    """One axis of a grid."""
    found = [x.item() if isinstance(x, (np.generic, Tensor)) else x for x in values] if np.iterable(values) else []
    require(bool(found) and all(map(is_number, found)), key, values, "a list of finite numbers, such as [0, 0.5, 1]")
    require(len(set(found)) == len(found), key, found, "without repetition")
    return [float(x) for x in found]


def check_seed(seed: object) -> None:
    """Raise ValueError unless torch's generators take ``seed`` in every epoch."""
    require(is_whole(seed) and abs(seed) < 2**62, "seed", seed, "a whole number")
