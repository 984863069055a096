"""Whether the batched objective is Breaching's: checked on the first candidate before any engine uses it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import first_line
from .memory import peak_memory
from .vmap_engine import VmapEngine

if TYPE_CHECKING:
    from .engine_parts import EngineParts


def check_objective(parts: EngineParts) -> tuple[str, int]:
    """Compare the pure objective with Breaching's on the first candidate.

    Returns:
        What speaks against it ("": nothing), and the bytes that its evaluation took.
    """
    assert parts.objective is not None
    assert parts.make_stack_optimizer is not None
    probe = [start[:1] for start in parts.starts]
    try:
        factory, alone = parts.make_stack_optimizer, parts.alone
        plain = VmapEngine(probe, parts.objective, factory, parts.rule, parts.streams, alone=alone)
        result, memory = peak_memory(plain.evaluate, probe[0].device)
        memory = max(memory, _memory_augmented(parts, probe))
    except Exception as error:  # whatever a user's model or loss throws under torch.func: the list engine still works
        return f"torch.func cannot transform this model or loss ({type(error).__name__}: {first_line(error)})", 0
    difference = _difference(result, parts, probe)
    tolerance = 1e-6 if probe[0].dtype == torch.float64 else 5e-3
    if difference > tolerance:  # a start at, or beside, the solution has a gradient of rounding errors alone
        away = _moved(probe)
        plain.overwrite(away)
        difference = _difference(plain.evaluate(), parts, away)
    if difference > tolerance:  # false for NaN: a start at which nothing is finite says nothing about the engine
        return f"the batched objective differs from Breaching's by {difference:.1e} (tolerance {tolerance:.0e})", 0
    return "", memory


def _memory_augmented(parts: EngineParts, probe: list[torch.Tensor]) -> int:
    """Return the bytes of an evaluation of augmented images, which may be larger; random streams stay as they are."""
    if parts.augmentation is None or not parts.differentiable:
        return 0
    assert parts.objective is not None
    assert parts.make_stack_optimizer is not None
    known = (probe, parts.objective, parts.make_stack_optimizer, parts.rule, parts.streams, parts.augmentation, True)
    states = list(parts.streams.states)
    _, memory = peak_memory(VmapEngine(*known).evaluate, probe[0].device)
    parts.streams.states = states
    return memory


def _moved(stacks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return points well away from these, the same every time."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(stack.shape, generator=generator).to(stack) for stack in stacks]
    return [stack + 0.1 * each for stack, each in zip(stacks, noise, strict=True)]


def _difference(result: Any, parts: EngineParts, probe: list[torch.Tensor]) -> float:
    """Return by how much an evaluation's value and gradients differ from Breaching's at most, relative."""
    gradients, values, _ = result
    value, reference = parts.reference([stack[0] for stack in probe])
    return max(_relative(values, value), *(_relative(g, r) for g, r in zip(gradients, reference, strict=True)))


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    value, reference = value.detach().flatten(), reference.detach().flatten()
    if bool(reference.isfinite().all()) and not bool(value.isfinite().all()):
        return float("inf")
    scale = reference.norm().clamp_min(torch.finfo(reference.dtype).tiny)
    return ((value - reference).norm() / scale).item()
