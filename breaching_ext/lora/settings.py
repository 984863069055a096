"""The keys of `config/lora/ladder.yaml`, checked before anything is computed, and the cells that they ask for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import OmegaConf

from ..attacks.checks import check_config
from ..data.sample_photos import PHOTOS
from ..errors import ConfigError, unknown
from ..values import is_whole
from .adapters import check_layers
from .models import MODELS, build_model

__all__ = ["METHODS", "RANKLESS", "STARTS", "Cell", "Settings", "plan"]

#: phase -> the ways in which it is attacked
METHODS: dict[int, tuple[str, ...]] = {
    0: ("full",),  # the adapted layers' full gradient: the ceiling
    1: ("match", "whiten"),  # match (∂A, ∂B), as they come or in orthonormal factors
    2: ("public", "closed", "learned"),  # decode G, in closed form or with the learned rest, then match G
    3: ("match", "decode"),  # match the change over K local steps, or decode its mean, then match G
}
#: cells without an adapter: the ceiling, and, as a control for the learned decoder, the mean public gradient, which is
#: what a decoder knows that saw nothing
RANKLESS = ((0, "full"), (2, "public"))
STARTS = ("zero", "random")


@dataclass(frozen=True)
class Cell:
    """One run of the ladder.

    Attributes:
        model: a key of `MODELS`.
        phase: 0 to 3.
        method: one of the phase's `METHODS`.
        rank: a number, or `full`; `-` where there is no adapter (`RANKLESS`).
        start: `zero` or `random` B; `-` where there is no adapter.
        seed: of the case.
    """

    model: str
    phase: int
    method: str
    rank: int | str
    start: str
    seed: int


@dataclass(frozen=True)
class Settings:
    """Everything that a ladder's results depend on.

    Attributes:
        model: a key of `MODELS`.
        layers: names of the adapted layers; empty takes the model's own.
        phases, ranks, starts, seeds: which cells to run.
        methods: of each phase's `METHODS` those to run; empty takes all.
        scale: s of the adapters, peft's lora_alpha / r, the same for all ranks and layers.
        batch: photos of a client.
        public: photos that the learned decoder is trained on.
        local_steps, local_lr: K and the step size of phase 3.
        ceiling: mean PSNR in dB below which Phase 0 counts as failed.
        attack: an attack config of type joint-candidates.
    """

    model: str
    layers: tuple[str, ...]
    phases: tuple[int, ...]
    ranks: tuple[int | str, ...]
    starts: tuple[str, ...]
    seeds: tuple[int, ...]
    scale: float
    batch: int
    public: int
    local_steps: int
    local_lr: float
    ceiling: float
    attack: Any
    methods: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, cfg: Any) -> Settings:
        """Read a composed config.

        Raises:
            ConfigError: naming the key, its value and the valid ones.
        """
        settings = cls(
            model=str(cfg.model),
            layers=tuple(_list(cfg.layers or ())),
            phases=tuple(_list(cfg.phases)),
            ranks=tuple(_list(cfg.ranks)),
            starts=tuple(_list(cfg.starts)),
            seeds=tuple(_list(cfg.seeds)),
            scale=_number("scale", cfg.scale),
            batch=cfg.batch,
            public=cfg.public,
            local_steps=cfg.local_steps,
            local_lr=_number("local_lr", cfg.local_lr),
            ceiling=_number("ceiling", cfg.ceiling),
            attack=cfg.attack,
            methods=tuple(_list(cfg.get("methods") or ())),
        )
        settings.check()
        return settings

    def check(self) -> None:
        """Check all values; see :meth:`from_config`."""
        if self.model not in MODELS:
            raise unknown("model", self.model, MODELS)
        if self.layers:
            check_layers(build_model(self.model, 0), self.layers)
        for phase in self.phases:
            if not _counts(phase, 0):
                raise unknown("phases", phase, METHODS)
        _check_each("phases", self.phases, METHODS)
        _check_each("starts", self.starts, STARTS)
        possible = [method for phase in self.phases for method in METHODS[phase]]
        _check_each("methods", self.methods, dict.fromkeys(possible))
        for rank in self.ranks:
            if rank != "full" and not _counts(rank):
                raise ConfigError(f"ranks={rank!r} is not possible; valid: 1, 2, 3, ... or 'full'.")
        for seed in self.seeds:
            if not _counts(seed, 0):
                raise ConfigError(f"seeds={seed!r} is not possible; valid: 0, 1, 2, ...")
        for key, least in (("batch", 1), ("public", 8), ("local_steps", 1)):
            if not _counts(getattr(self, key), least):
                raise ConfigError(f"{key}={getattr(self, key)!r} is not possible; valid: {least}, {least + 1}, ...")
        crops = [index // len(PHOTOS) % 2 for index in range(self.public)]  # as `Case.public_gradients` holds out
        if any(crops.count(side) < max(self.batch, 2) for side in (0, 1)):
            raise ConfigError(
                f"public={self.public} leaves a side of the split fewer than two photos, or than batch={self.batch}; "
                f"valid: a multiple of {2 * len(PHOTOS)}, of at least twice the batch."
            )
        for key in ("scale", "local_lr"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key}={getattr(self, key)} is not possible; valid: above 0.")
        for key in ("phases", "ranks", "starts", "seeds", "layers", "methods"):
            if not getattr(self, key) and key not in ("layers", "methods"):  # these then are all that there are
                raise ConfigError(f"{key}=[] leaves nothing to run; valid: a list of at least one.")
            repeated = [value for value in getattr(self, key) if list(getattr(self, key)).count(value) > 1]
            if repeated:
                raise ConfigError(f"{key}={list(getattr(self, key))} names {repeated[0]} twice; valid: each once.")
        if self.attack.get("attack_type") != "joint-candidates":
            raise unknown("attack.attack_type", self.attack.get("attack_type"), ["joint-candidates"])
        check_config(self.attack)

    def fingerprint(self) -> dict[str, Any]:
        """Return what a finished cell depends on besides its own name, as plain values for JSON."""
        kept = ("layers", "scale", "batch", "public", "local_steps", "local_lr")
        values = {key: value for key, value in asdict(self).items() if key in kept}
        attack: Any = OmegaConf.to_container(self.attack, resolve=True)
        for key in ("progress", "checkpoint_every", "checkpoint_path", "memory_budget"):  # no effect on results
            attack["impl"].pop(key, None)
        return {**values, "layers": list(self.layers), "attack": attack}


def plan(settings: Settings) -> list[Cell]:
    """Return the cells, the cheapest falsifying experiment first: Phase 0 for all seeds, then phase by phase."""
    return [
        Cell(settings.model, phase, method, rank, start, seed)
        for phase in sorted(set(settings.phases))
        for method, start, rank in _arms(phase, settings)
        for seed in settings.seeds
    ]


def _arms(phase: int, settings: Settings) -> list[tuple[str, str, int | str]]:
    """Return (method, start, rank) of a phase, those without an adapter first."""
    chosen = [method for method in METHODS[phase] if method in settings.methods or not settings.methods]
    rankless = [(method, "-", "-") for method in chosen if (phase, method) in RANKLESS]
    methods = [method for method in chosen if (phase, method) not in RANKLESS]
    return rankless + [(m, start, rank) for start in settings.starts for m in methods for rank in settings.ranks]


def _list(value: Any) -> Sequence[Any]:
    return list(value) if OmegaConf.is_list(value) or isinstance(value, (list, tuple)) else [value]


def _number(key: str, value: Any) -> float:
    """Return a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise ConfigError(f"{key}={value!r} is not possible; valid: a finite number.")
    return number


def _counts(value: Any, least: int = 1) -> bool:
    return is_whole(value) and value >= least


def _check_each(key: str, values: Iterable[Any], valid: Iterable[Any]) -> None:
    for value in values:
        if value not in tuple(valid):
            raise unknown(key, value, valid)
