"""Optimizer study: AdamW, Adafactor and their combination over grids of learning rate and weight decay.

A side module: it imports nothing from the attacks.

Example:
    >>> import torch
    >>> from breaching_ext.optimizer_study import run_grid
    >>> images = torch.rand(32, 1, 4, 4)
    >>> grid = run_grid("B3", "mlp", images, images, lr_multipliers=[0.5, 1], wd_multipliers=[0, 1],
    ...                 epochs=2, batch_size=16, progress=False)
    >>> grid.get_heatmap_data()[0].shape
    (2, 2)
"""

from .config import AdafactorConfig, AdamWConfig, Budget, OptimizerConfig
from .grid import LR_MULTIPLIERS, WD_MULTIPLIERS, run_grid
from .optimizer import BaseOptimizer
from .records import GridSearchResult, OptimizerExperiment
from .schedules import Cosine, Fixed, LRScheduler, StepDrop, WarmRestarts
from .training_log import TrainingLog
from .variants import VARIANTS, Variant, create_optimizer

__all__ = [
    "LR_MULTIPLIERS",
    "VARIANTS",
    "WD_MULTIPLIERS",
    "AdafactorConfig",
    "AdamWConfig",
    "BaseOptimizer",
    "Budget",
    "Cosine",
    "Fixed",
    "GridSearchResult",
    "LRScheduler",
    "OptimizerConfig",
    "OptimizerExperiment",
    "StepDrop",
    "TrainingLog",
    "Variant",
    "WarmRestarts",
    "create_optimizer",
    "run_grid",
]
