"""Where candidates stand besides their values: which are alive, the box they are kept in, and each one's best point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from .engine import CandidateEngine

Box = tuple[torch.Tensor, torch.Tensor]


@dataclass
class Track:
    """What a step changes besides the candidates.

    As in Breaching, the value that decides is the objective before a step, and what is kept is the point after it;
    not so with engines whose steps are long (`LongStepEngine`).

    Attributes:
        alive: (N,) candidates that have not failed.
        best: each candidate's best parameters, each (N, ...).
        best_values: their objectives (N,).
        box: least and largest valid image values, or None.
        whole: whether all candidates are alive, known without looking at a device.
    """

    alive: torch.Tensor
    best: list[torch.Tensor]
    best_values: torch.Tensor
    box: Box | None = None
    whole: bool = True

    @classmethod
    def start(cls, parameters: list[torch.Tensor], box: Box | None = None) -> Track:
        """Return the track of candidates that have not moved yet."""
        first = parameters[0]
        alive = torch.ones(len(first), dtype=torch.bool, device=first.device)
        infinite = torch.full((len(first),), float("inf"), dtype=first.dtype, device=first.device)
        return cls(alive, [p.detach().clone() for p in parameters], infinite, box)

    def forget_values(self) -> None:
        """Let the next finite value of every candidate count as its best: earlier ones do not compare with it."""
        self.best_values.fill_(float("inf"))


class Advance(NamedTuple):
    """Objective and task loss of every candidate before the step, and which candidates failed in it, (N,) each."""

    values: torch.Tensor
    task_losses: torch.Tensor
    failed: torch.Tensor


@runtime_checkable
class TrackingEngine(CandidateEngine, Protocol):
    """An engine that projects and tracks by itself, in the same pass over the candidates as its optimizer."""

    def advance(self, iteration: int, track: Track) -> Advance:
        """Do what :func:`advance` does."""


class LongStepEngine(CandidateEngine, Protocol):
    """An engine whose step has many iterations, so that the value before it says nothing about the point after it.

    What is kept is the point before the step then, and the last point is looked at once more (:func:`settle`).
    """

    def rankings(self) -> torch.Tensor:
        """Return what the present points are ranked by, (N,), as in `StepResult`."""


def advancing(engine: CandidateEngine) -> Callable[[int, Track], Advance]:
    """Return the function that takes an iteration with an engine: its own, or :func:`advance`."""
    return engine.advance if isinstance(engine, TrackingEngine) else partial(advance, engine)


def advance(engine: CandidateEngine, iteration: int, track: Track) -> Advance:
    """Step the living candidates, project them into the box, keep what improved, freeze what failed at its best."""
    before = engine.parameters if hasattr(engine, "rankings") else None
    values, task_losses, rankings, comparable = engine.step(iteration, track.alive)
    if not comparable:
        track.forget_values()
    if track.box is not None:
        _project(engine, track.box, None if track.whole else track.alive)  # None: all, which needs no mask
    ranked = values if rankings is None else rankings  # these are of the points `before`, whatever the step then did
    _keep_best(engine, ranked, track, before)
    failed = track.alive & ~values.isfinite()
    if bool(failed.any()):
        track.alive, track.whole = track.alive & ~failed, False
        engine.overwrite(track.best, failed)
    return Advance(values, task_losses, failed)


def settle(engine: CandidateEngine, track: Track) -> None:
    """After the last step: keep where a `LongStepEngine`'s candidates have arrived, where that is best."""
    if hasattr(engine, "rankings"):
        rankings = engine.rankings()
        _keep_best(engine, rankings, track)


def _project(engine: CandidateEngine, box: Box, where: torch.Tensor | None) -> None:
    """Put the images into the box: by the engine itself where its variables are not the pixels."""
    project = getattr(engine, "project", None)
    if project is not None:
        project(box, where)
        return
    images, *others = engine.parameters
    engine.overwrite([torch.clamp(images, *box), *others], where)


def _keep_best(
    engine: CandidateEngine,
    values: torch.Tensor,
    track: Track,
    points: list[torch.Tensor] | None = None,
) -> None:
    """Keep candidates that improved, where they are or at `points`.

    A step can leave a point that is not finite behind a finite value.
    """
    better = track.alive & values.isfinite() & (values < track.best_values)
    if not bool(better.any()):
        return
    parameters = engine.parameters if points is None else points
    better &= all_finite(parameters)
    track.best_values = torch.where(better, values, track.best_values)
    for best, parameter in zip(track.best, parameters, strict=True):
        best.copy_(torch.where(spread(better, parameter), parameter, best))


def all_finite(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Return which candidates (N,) have only finite parameters."""
    largest = [torch.linalg.vector_norm(p.flatten(1), float("inf"), dim=1) for p in parameters]  # NaN stays NaN
    return torch.stack(largest).isfinite().all(dim=0)


def spread(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return a mask (N,) in a shape that broadcasts against (N, ...)."""
    return mask.view(-1, *[1] * (like.dim() - 1))
