"""What a run is, for its record and for telling it from others."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..tensor_files import digest
from .task import TrainingTask


def describe(task: TrainingTask) -> dict[str, Any]:
    """Settings, schedule, protocol, versions and device of a run (JSON types)."""
    return {
        "optimizer": {"kind": type(task.variant.config).__name__, **asdict(task.variant.config)},
        "schedule": task.schedule.describe(),
        "budget": asdict(task.budget),
        "test_points": len(task.test),
        "input_shape": list(task.train.shape[1:]),
        "model": repr(task.model),
        "n_parameters": sum(p.numel() for p in task.model.parameters()),
        "loss": "mse",
        "initial_weights_sha256": digest(*task.model.state_dict().values())[:16],
        "data_sha256": data_digest(task.train, task.test),
        "seed": task.seed,
        "dtype": str(task.train.dtype),
        "device": str(task.train.device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def data_digest(train: Tensor, test: Tensor) -> str:
    """Return what names the images of a run in its files."""
    return digest(train, test)[:16]
