"""Everything in a step but the evaluation, compiled into one function.

Clipping and signs, the optimizer's update, the projection into the box, the best point so far, and the freezing of
candidates that failed read and write the same tensors. Run one by one they take longer than the evaluation of a small
model leaves; compiled together they are a pass over memory. It is a function of its own, beside the compiled
evaluation, because candidates are evaluated in chunks and stepped all at once, and because an evaluation that runs out
of memory must not leave a half-done update behind.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..errors import first_line
from .compilation import compile_once
from .engine import GradientRule
from .tracing import TOLERANCE, SpecialisationError, relative_difference
from .track import Track, all_finite, spread
from .update_rules import Tensors, UpdateRule


class CompiledUpdate:
    """Clip, sign, step, project, track and freeze N candidates in place.

    Args:
        stacks: the candidates, each (N, ...).
        rule: the optimizer's update, with its state.
        gradient_rule: what happens to a gradient before; without noise.
        track: a track like the one that will be used; it is not changed.
        backend: torch.compile's.

    Raises:
        SpecialisationError: when torch cannot compile the step, or the result differs from the eager one.
    """

    def __init__(
        self, stacks: Tensors, rule: UpdateRule, gradient_rule: GradientRule, track: Track, backend: str = "inductor"
    ) -> None:
        self.rule, self._gradient_rule = rule, gradient_rule
        self._check(stacks, track, backend)

    def __call__(
        self, iteration: int, stacks: Tensors, gradients: Tensors, values: torch.Tensor, track: Track
    ) -> torch.Tensor:
        """Change candidates, optimizer state and track; returns which candidates failed, (N,)."""
        numbers = [self._gradient_rule.softness(iteration), *self.rule.numbers()]
        scalars = torch.tensor(numbers, dtype=values.dtype, device=values.device)
        gradients = [g.contiguous() for g in gradients]  # laid out as in the check; convolutions leave them otherwise
        state = (track.alive, track.best, track.best_values)
        with torch.no_grad():
            return self._function(stacks, gradients, values, self.rule.state(), *state, track.box, scalars)

    def _update(
        self,
        stacks: Tensors,
        gradients: Tensors,
        values: torch.Tensor,
        moments: list[Tensors],
        alive: torch.Tensor,
        best: Tensors,
        best_values: torch.Tensor,
        box: tuple[torch.Tensor, torch.Tensor] | None,
        scalars: torch.Tensor,
    ) -> torch.Tensor:
        softness, *numbers = scalars.unbind()
        moved = []
        for stack, gradient, slots in zip(stacks, gradients, moments, strict=True):
            point, new = self.rule.update(stack, self._gradient_rule.shaped(gradient, softness), slots, numbers)
            moved.append(point)
            for slot, value in zip(slots, new, strict=True):
                slot.copy_(value)
        if box is not None:
            moved[0] = torch.clamp(moved[0], *box)
        moved = [torch.where(spread(alive, new), new, old) for new, old in zip(moved, stacks, strict=True)]
        better = alive & (values < best_values) & all_finite(moved)
        failed = alive & ~values.isfinite()
        for stack, point, kept in zip(stacks, moved, best, strict=True):
            kept.copy_(torch.where(spread(better, point), point, kept))
            stack.copy_(torch.where(spread(failed, point), kept, point))
        best_values.copy_(torch.where(better, values, best_values))
        alive.copy_(alive & ~failed)
        return failed

    def _check(self, stacks: Tensors, track: Track, backend: str) -> None:
        """Compile, and compare with the same function run eagerly, on copies."""
        try:
            self._function = compile_once(self._update, backend, stacks[0].device)
            compiled, eager = (self._trial(function, stacks, track) for function in (self._function, self._update))
        except Exception as error:  # dynamo and inductor raise what they like; the eager step still works
            raise SpecialisationError(f"torch.compile failed ({type(error).__name__}: {first_line(error)})") from error
        difference = max(relative_difference(a, b) for a, b in zip(compiled, eager, strict=True))
        if difference > TOLERANCE.get(stacks[0].dtype, 1e-2):
            raise SpecialisationError(f"the compiled step differs from the eager one by {difference:.1e}")

    def _trial(self, function: Callable[..., torch.Tensor], stacks: Tensors, track: Track) -> Tensors:
        """Return everything that a step with made-up gradients changes; what it is given stays as it is."""
        generator = torch.Generator().manual_seed(0)
        gradients = [torch.randn(s.shape, generator=generator).to(s) for s in stacks]
        values = torch.rand(len(stacks[0]), generator=generator).to(stacks[0])
        scalars = torch.full((1 + self.rule.count,), 0.5).to(values)
        points, best = [s.clone() for s in stacks], [b.clone() for b in track.best]
        moments = [[torch.ones_like(slot) for slot in slots] for slots in self.rule.state()]
        alive, best_values = track.alive.clone(), track.best_values.clone()
        with torch.no_grad():
            failed = function(points, gradients, values, moments, alive, best, best_values, track.box, scalars)
        masks = [alive.to(values), failed.to(values)]
        return [*points, *best, best_values, *masks, *(slot for slots in moments for slot in slots)]
