"""The fifteen variants of the study: names, settings and schedules, and nothing else.

A1 is compared with B3, so it runs under B3's schedule by default (cosine), and so does A2. C1 and C2 run
without an outer schedule: Adafactor's relative step has its own 1/√t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, overload

from ..values import is_number
from .config import AdafactorConfig, AdamWConfig, Budget, OptimizerConfig, require, require_choice
from .optimizer import BaseOptimizer
from .schedules import LRScheduler, create_schedule


@dataclass(frozen=True)
class Variant:
    """One optimizer of the study.

    Attributes:
        id: Short name, A1 … D3.
        name: Readable name.
        config: Settings.
        schedule: Name of the schedule.
    """

    id: str
    name: str
    config: OptimizerConfig
    schedule: str

    def create_schedule(self, epochs: int, schedule: str | None = None, **options: Any) -> LRScheduler:
        """The variant's schedule, or another one by name, over ``epochs`` epochs."""
        return create_schedule(schedule or self.schedule, epochs, **options)

    def with_settings(self, **settings: Any) -> Variant:
        """The variant with other settings (fields of its config), such as ``decay="lr"``.

        Raises:
            ValueError: If a setting is unknown or its value is not valid.
        """
        valid = tuple(asdict(self.config))
        for key in settings:
            require_choice("setting", key, valid)
        return replace(self, config=replace(self.config, **settings))


_ADAMW = AdamWConfig()
_ADAMW_NORMALIZED = AdamWConfig(normalized_decay=True)
_ADAFACTOR = AdafactorConfig()
_COMBINED = AdafactorConfig(decay="schedule", normalized_decay=True)
_LABELS = {"fixed": "fixed", "step_drop": "step drop", "cosine": "cosine", "warm_restarts": "warm restarts"}


def _adamw_family() -> Iterable[Variant]:
    """B1–B8: four schedules without and with normalized decay."""
    for offset, config, kind in ((1, _ADAMW, "AdamW"), (5, _ADAMW_NORMALIZED, "AdamW, normalized decay")):
        for index, (schedule, label) in enumerate(_LABELS.items(), start=offset):
            name = "AdamWR (normalized decay, warm restarts)" if index == 8 else f"{kind}, {label}"
            yield Variant(f"B{index}", name, config, schedule)


_ALL: tuple[Variant, ...] = (
    Variant("A1", "Adam + L2", AdamWConfig(decay="l2"), "cosine"),
    Variant("A2", "SGD with momentum + L2", OptimizerConfig(), "cosine"),
    *_adamw_family(),
    Variant("C1", "Adafactor", _ADAFACTOR, "fixed"),
    Variant("C2", "Adafactor with momentum", replace(_ADAFACTOR, beta1=0.9), "fixed"),
    Variant("D1", "AdamW + Adafactor, cosine", _COMBINED, "cosine"),
    Variant("D2", "AdamW + Adafactor, warm restarts", _COMBINED, "warm_restarts"),
    Variant("D3", "AdamW + Adafactor, warm restarts, momentum", replace(_COMBINED, beta1=0.9), "warm_restarts"),
)

VARIANTS: MappingProxyType[str, Variant] = MappingProxyType({variant.id: variant for variant in _ALL})
"""All variants by id, in the order of the figure sheet."""


def get_variant(variant_id: str) -> Variant:
    """Look up a variant.

    Raises:
        ValueError: If the id is unknown.
    """
    require_choice("variant_id", variant_id, tuple(VARIANTS))
    return VARIANTS[variant_id]


@overload
def create_optimizer(variant_id: str, params: Iterable[Any], **options: Any) -> BaseOptimizer: ...


@overload
def create_optimizer(
    variant_id: str, params: None = None, **options: Any
) -> Callable[[Iterable[Any]], BaseOptimizer]: ...


def create_optimizer(
    variant_id: str,
    params: Iterable[Any] | None = None,
    *,
    lr_multiplier: float = 1.0,
    wd_multiplier: float = 1.0,
    budget: Budget | None = None,
    schedule: str | None = None,
    **settings: Any,
) -> BaseOptimizer | Callable[[Iterable[Any]], BaseOptimizer]:
    """Build a variant's optimizer for one model.

    Args:
        variant_id: A1 … D3.
        params: The model's parameters, or groups of them; without them the result is a factory that takes them.
        lr_multiplier: Factor on the base learning rate. As in torch, a group of parameters that names its own ``lr`` or
            ``weight_decay`` has that, and one that is added later has what the first ones have.
        wd_multiplier: Factor on the base weight decay.
        budget: Size of the run (schedules, normalized decay); default: the study's 60,000 points, batch 128,
            100 epochs.
        schedule: Another schedule than the variant's.
        **settings: Other settings than the variant's, such as ``decay="lr"``.

    Raises:
        ValueError: If an id, a setting, a multiplier or a value is not valid.

    Example:
        >>> import torch
        >>> optimizer = create_optimizer("B3", torch.nn.Linear(2, 1).parameters(), lr_multiplier=0.5)
        >>> optimizer.param_groups[0]["lr"]
        0.0005
        >>> optimizer.set_epoch(3 + 0 / 469)  # epoch 3, batch 0 of 469: before every step, or the schedule stands still
    """
    variant, budget = get_variant(variant_id).with_settings(**settings), budget or Budget()
    over = variant.create_schedule(budget.epochs, schedule)
    require(is_number(lr_multiplier) and lr_multiplier > 0, "lr_multiplier", lr_multiplier, "a number > 0")
    require(is_number(wd_multiplier) and wd_multiplier >= 0, "wd_multiplier", wd_multiplier, "a number >= 0")

    config = variant.config
    rates = {"lr": config.lr * lr_multiplier, "weight_decay": config.weight_decay * wd_multiplier}

    def build(parameters: Iterable[Any]) -> BaseOptimizer:
        return BaseOptimizer(parameters, config, over, budget, **rates)

    return build if params is None else build(params)
