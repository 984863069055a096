"""The whole study: variants × seeds, one file each, resumable."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from .config import require
from .data import load_fashion_mnist
from .description import data_digest
from .grid import run_grid
from .models import create_model
from .protocol import BEYOND, Protocol, Run, check_folder, planned, select_variants
from .records import saved_config

log = logging.getLogger(__name__)


def run_study(
    folder: str | Path,
    variants: Sequence[str],
    seeds: Sequence[int],
    protocol: Protocol | None = None,
    progress: bool = True,
) -> list[Path]:
    """Run what is missing of variants × seeds, each into a file of its own under ``folder``/results.

    A file that exists is kept if it was made with the same settings, so a killed study continues where it
    was; what is lost is the chunk in progress.

    Args:
        folder: Where the study lives.
        variants: Ids.
        seeds: Seeds of initial weights and order of batches.
        protocol: What they share; default: the reduced protocol.
        progress: Whether to show bars.

    Returns:
        The result files, without those of what was trained beyond the grids.

    Raises:
        ValueError: If an argument is not valid, or a file of other settings is in the way; all of it is checked
            before anything is trained.
        FileNotFoundError: If Fashion-MNIST is not at hand.
    """
    protocol = protocol or Protocol()
    runs = list(planned(folder, select_variants(variants), seeds, protocol))
    for run in runs:
        run.check()
    check_folder(folder, runs[0])
    train, test = (
        images.to(protocol.device)
        for images in load_fashion_mnist(protocol.data_folder, protocol.train_size, protocol.test_size, protocol.pool)
    )
    # One module for all seeds, so that compiled steps serve them all.
    model = create_model(protocol.model, train.shape[-1], seeds[0], **protocol.model_options).to(protocol.device)
    data = data_digest(train, test)
    for run in runs:
        if run.path.exists():
            same = saved_config(run.path).get("data_sha256", data) == data
            require(same, "out", str(run.path), "a folder without results of other images")
    for run in runs:
        _run_one(run, model, train, test, progress)
    return [run.path for run in runs if run.path.parent.name != BEYOND]


def _run_one(run: Run, model: torch.nn.Module, train: torch.Tensor, test: torch.Tensor, progress: bool) -> None:
    """Run one variant with one seed unless its file is there."""
    if run.is_done():
        log.info("%s is there already.", run.path)
        return
    start = create_model(run.protocol.model, train.shape[-1], run.seed, **run.protocol.model_options)
    model.load_state_dict(start.state_dict())
    partial = run.path.with_suffix(".partial")
    experiment = run_grid(
        run.variant.id,
        model,
        train,
        test,
        **run.arguments,
        executor=run.protocol.executor,
        compile=run.protocol.compile,
        chunk=run.protocol.chunk,
        checkpoint=partial,
        progress=progress,
    )
    experiment.config["study"] = run.key
    experiment.save(run.path)
    partial.unlink(missing_ok=True)
