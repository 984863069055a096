"""The keys of `config/attack/magia.yaml`, checked and put into the form that the engine takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import OmegaConf

from ..errors import ConfigError
from ..matching.magia_engine import Annealing, OptimizerOptions, Pyramid, Schedule
from ..matching.magia_optimizer import STEP_SIZES
from ..matching.subset_matching import SubsetTerm
from ..regularizers.color_tv import anisotropic_total_variation, color_total_variation
from ..values import check_number, check_switches

__all__ = ["PRIORS", "MagiaOptions"]

#: Breaching's keys that this attack does not use, and the only value that says so.
_UNUSED: dict[str, Any] = {
    "objective.type": "euclidean",
    "objective.scale": 1.0,
    "objective.task_regularization": 0.0,
    "optim.signed": None,
    "optim.step_size_decay": None,
    "optim.langevin_noise": 0.0,
    "optim.warmup": 0,
    "optim.grad_clip": None,
    "augmentations": None,
    "differentiable_augmentations": False,
    "label_strategy": None,
    "impl.memory_budget": None,
}
#: Breaching's keys that do not go together with this attack's objective, likewise.
_IMPOSSIBLE: dict[str, Any] = {"normalize_gradients": False, "impl.mixed_precision": False, "impl.JIT": None}
#: Valid values of image_prior.kind.
PRIORS = ("color", "anisotropic")


@dataclass(frozen=True)
class MagiaOptions:
    """Everything that the attack's config says about the objective and the optimizer.

    Attributes:
        term: the subset term.
        schedule: subset sizes.
        annealing: weight of the image prior.
        optimizer: the optimizer.
        pyramid: grids, coarse to fine.
        prior_kind, chroma, eps: the image prior (see `breaching_ext.regularizers.color_tv`).
        relative: whether the prior's weights are in units of the shared gradient's squared norm.
    """

    term: SubsetTerm
    schedule: Schedule
    annealing: Annealing
    optimizer: OptimizerOptions
    pyramid: Pyramid
    prior_kind: str = "color"
    chroma: float = 5.0
    eps: float = 0.01
    relative: bool = False

    @classmethod
    def from_config(cls, cfg: Any) -> MagiaOptions:
        """Read an attack config.

        Raises:
            ConfigError: naming the key, its value and the valid ones.
        """
        _check_unused(cfg)
        check_switches(cfg, ["image_prior.relative"])
        subset, prior, optim, grids = (cfg.get(key) or {} for key in ("subset", "image_prior", "optim", "pyramid"))
        kind = str(prior.get("kind", "color"))
        if kind not in PRIORS:
            raise ConfigError(f"image_prior.kind={kind!r} is unknown; valid: {', '.join(PRIORS)}.")
        eps, chroma = _number(prior, "image_prior.eps", 0.01), _number(prior, "image_prior.chroma", 5.0)
        if not eps > 0:  # equal neighbours, as on an enlarged grid, have no gradient at 0
            raise ConfigError(f"image_prior.eps={eps} is out of range; valid: above 0.")
        if not chroma >= 0:
            raise ConfigError(f"image_prior.chroma={chroma} is out of range; valid: 0 or more.")
        first = None if prior.get("anneal_from") is None else _number(prior, "image_prior.anneal_from")
        try:
            return cls(
                term=_term(subset),
                schedule=_schedule(subset),
                annealing=Annealing(_number(prior, "image_prior.weight", 0.001), first),
                optimizer=_optimizer(optim),
                pyramid=Pyramid(
                    _several(grids, "pyramid.factors", (4, 2, 1)), _several(grids, "pyramid.shares", (0.25, 0.3))
                ),
                prior_kind=kind,
                chroma=chroma,
                eps=eps,
                relative=bool(prior.get("relative", False)),
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def without_effect(self) -> list[str]:
        """What the config says about subsets although there is no subset term, as "subset.key=value"."""
        if self.term.kind != "none":
            return []
        said = [("alpha", self.term.alpha, SubsetTerm().alpha), ("rescaling", self.term.rescaling, "none")]
        keys = {
            "mode": "sel_mode",
            "k": "sel_k",
            "l_iter": "sel_l_iter",
            "a": "sig_a",
            "b": "sig_b",
            "redraw": "redraw",
        }
        said += [(key, getattr(self.schedule, name), getattr(Schedule(), name)) for name, key in keys.items()]
        return [f"subset.{key}={value}" for key, value, default in said if value != default]

    def annealing_for(self, squared_norm: float) -> Annealing:
        """Weights of the prior against the distance from a gradient of that ‖g*‖², with which the distance grows."""
        return self.annealing.times(squared_norm) if self.relative else self.annealing

    def prior(self, pixels: torch.Tensor) -> torch.Tensor:
        """The image prior of one candidate (B, C, H, W) in [0, 1], a scalar."""
        if self.prior_kind == "anisotropic":
            return anisotropic_total_variation(pixels)
        return color_total_variation(pixels, self.chroma, self.eps)


def _check_unused(cfg: Any) -> None:
    for key, only in {**_UNUSED, **_IMPOSSIBLE}.items():
        value = OmegaConf.select(cfg, key)
        off = value in (None, "none") or (OmegaConf.is_config(value) and not value)
        if not off and value != only:
            why = "has no effect on" if key in _UNUSED else "does not work with"
            valid = "empty" if only is None else only
            raise ConfigError(f"attack.{key}={value} {why} magia; valid: {valid}.")


def _number(part: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Read `name`, of which the last word is the key in that part of the config."""
    value = part.get(name.rsplit(".", 1)[-1], default)
    check_number(name, value)
    return float(value)


def _several(part: Mapping[str, Any], name: str, default: tuple) -> tuple:
    value = part.get(name.rsplit(".", 1)[-1], default)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{name}={value} is not possible; valid: a list of numbers, as {list(default)}.")
    return tuple(value)


def _whole(part: Mapping[str, Any], name: str, default: int, least: float = -math.inf) -> int:
    value = _number(part, name, default)
    if value < least:
        raise ConfigError(f"{name}={value:g} is out of range; valid: {least} or more.")
    if not value.is_integer():
        raise ConfigError(f"{name}={value} is not possible; valid: a whole number.")
    return int(value)


def _term(subset: Mapping[str, Any]) -> SubsetTerm:
    factor = subset.get("rescaling", "none")
    factor = factor if isinstance(factor, str) else _number(subset, "subset.rescaling")
    return SubsetTerm(str(subset.get("term", "none")), _number(subset, "subset.alpha", 0.999), factor)


def _schedule(subset: Mapping[str, Any]) -> Schedule:
    return Schedule(
        mode=str(subset.get("sel_mode", "constk")),
        k=_whole(subset, "subset.sel_k", 2),
        l_iter=_whole(subset, "subset.sel_l_iter", 100, least=1),
        a=_number(subset, "subset.sig_a", -0.1),
        b=_number(subset, "subset.sig_b", 200.0),
        redraw=str(subset.get("redraw", "step")),
    )


def _optimizer(optim: Mapping[str, Any]) -> OptimizerOptions:
    name = str(optim.get("optimizer", "l-bfgs")).lower()
    chosen = optim.get("step_size") is not None
    return OptimizerOptions(
        name=name,
        step_size=_number(optim, "optim.step_size") if chosen else STEP_SIZES.get(name, 1.0),
        inner_iterations=_whole(optim, "optim.inner_iterations", 20),
        history_size=_whole(optim, "optim.history_size", 100),
        line_search=optim.get("line_search"),
        label_scale=_number(optim, "optim.label_scale", 5.0),
    )
