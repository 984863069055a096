"""Choose an engine, check it against the slow path, and say in the log when and why a slower one is taken."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .compiled_engine import CompilationError, CompiledEngine
from .engine import CandidateEngine, CandidateObjective, ClosureFactory, GradientRule, OptimizerFactory
from .list_engine import ListEngine
from .randomness import CandidateStreams
from .vmap_engine import Augmentation, VmapEngine

log = logging.getLogger(__name__)

BATCHING_MODES = ("auto", "list", "vmap", "compile")

#: one candidate's parameters -> objective value and gradients, computed by Breaching's own code
Reference = Callable[[list[torch.Tensor]], tuple[torch.Tensor, list[torch.Tensor]]]


@dataclass
class EngineParts:
    """Everything an attack hands over to have its candidates stepped.

    Attributes:
        starts: start values, each (N, ...), images first.
        streams: the candidates' random streams.
        rule: what happens to a gradient before the optimizer sees it.
        make_closure, task_loss, make_optimizer: Breaching's way for one candidate (see `ListEngine`).
        objective: the same objective as a pure function, or None.
        make_stack_optimizer: optimizer over stacks, or None where the optimizer couples the entries of a tensor.
        reference: Breaching's value and gradients for one candidate, to check `objective` against.
        why_not: why there is no `objective` or no `make_stack_optimizer`.
        augmentation, differentiable: see `VmapEngine`.
        random_steps: whether a step draws random numbers.
    """

    starts: list[torch.Tensor]
    streams: CandidateStreams
    rule: GradientRule
    make_closure: ClosureFactory
    task_loss: Callable[[], torch.Tensor]
    make_optimizer: OptimizerFactory
    reference: Reference
    objective: CandidateObjective | None = None
    make_stack_optimizer: OptimizerFactory | None = None
    why_not: str = ""
    augmentation: Augmentation | None = None
    differentiable: bool = False
    random_steps: bool = False


def build_engine(mode: str, parts: EngineParts) -> CandidateEngine:
    """Return the engine for `restarts.candidate_batching`.

    Args:
        mode: `list`, `vmap`, `compile`, or `auto`: vmap where it works and there is more than one candidate. The
            choice does not depend on timing, so the same run always takes the same engine. What does not work falls
            back, compile to vmap and vmap to list, and the log says why.
        parts: what the attack supplies.
    """
    if mode == "list" or (mode == "auto" and len(parts.starts[0]) == 1):
        return _list_engine(parts)
    reason = parts.why_not
    if not reason:
        reason = _check_objective(parts)
    if not reason:
        return _stacked_engine(mode, parts)
    level = logging.INFO if mode == "auto" else logging.WARNING
    log.log(level, "candidate_batching=%s: stepping the candidates one by one (list), because %s.", mode, reason)
    return _list_engine(parts)


def _list_engine(parts: EngineParts) -> ListEngine:
    streams = parts.streams if parts.random_steps else None
    return ListEngine(parts.starts, parts.make_closure, parts.make_optimizer, parts.task_loss, streams)


def _stacked_engine(mode: str, parts: EngineParts) -> VmapEngine:
    if mode == "compile":
        try:
            return CompiledEngine(*_stacked_arguments(parts))
        except CompilationError as error:
            log.warning("candidate_batching=compile: taking vmap, because %s.", error)
    log.info("Candidates are batched with vmap.")
    return VmapEngine(*_stacked_arguments(parts))


def _stacked_arguments(parts: EngineParts) -> tuple[Any, ...]:
    arguments = (parts.objective, parts.make_stack_optimizer, parts.rule, parts.streams)
    return (parts.starts, *arguments, parts.augmentation, parts.differentiable)


def _check_objective(parts: EngineParts) -> str:
    """Compare the pure objective with Breaching's on the first candidate; returns what speaks against it."""
    assert parts.objective is not None
    assert parts.make_stack_optimizer is not None
    probe = [start[:1] for start in parts.starts]
    try:
        plain = VmapEngine(probe, parts.objective, parts.make_stack_optimizer, parts.rule, parts.streams)
        gradients, values, _ = plain.evaluate()
    except Exception as error:  # whatever a user's model or loss throws under torch.func: the list engine still works
        return f"torch.func cannot transform this model or loss ({type(error).__name__}: {_first_line(error)})"
    value, reference = parts.reference([start[0] for start in parts.starts])
    difference = max(_relative(values, value), *(_relative(g, r) for g, r in zip(gradients, reference, strict=True)))
    tolerance = 1e-6 if probe[0].dtype == torch.float64 else 5e-3
    if difference > tolerance:  # false for NaN: a start at which nothing is finite says nothing about the engine
        return f"the batched objective differs from Breaching's by {difference:.1e} (tolerance {tolerance:.0e})"
    return ""


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    value, reference = value.detach().flatten(), reference.detach().flatten()
    scale = reference.norm().clamp_min(torch.finfo(reference.dtype).tiny)
    return ((value - reference).norm() / scale).item()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else "no message"
