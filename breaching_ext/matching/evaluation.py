"""Objective and gradient of a stack of candidates, in chunks that fit into memory."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.func import grad_and_value, vmap

from ..errors import first_line
from ..out_of_memory import is_out_of_memory
from .engine import CandidateObjective
from .graph_costs import Costs
from .heap import give_back

log = logging.getLogger(__name__)

#: stacks, each (n, ...) -> (gradients, each (n, ...); objectives (n,); task losses (n,))
Evaluate = Callable[..., tuple]

#: number of a window's first candidate, its stacks -> the stacks to evaluate, what brings their gradients back
Through = Callable[
    [int, list[torch.Tensor]], tuple[list[torch.Tensor], Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]]
]

#: makes a faster form of an evaluation for stacks of one shape
Specialise = Callable[[Evaluate, list[torch.Tensor]], Evaluate]


class StackedEvaluation:
    """Evaluates N candidates at once with torch.func, or in chunks of at most `chunk` of them.

    Candidates do not depend on each other, so chunks give the same numbers up to rounding. Where memory runs out, the
    chunk is halved and the evaluation repeated; nothing but that evaluation's time is lost.

    Args:
        objective: one candidate's parameters -> (objective, task loss); pure.
        parameters: number of tensors that make up a candidate.
        chunk: most candidates at a time; None: all.
        specialise: makes a faster form for stacks of some shapes; called once for these.
        alone: there is one candidate, and no axis of candidates is carried through its operations. torch.func makes
            other operations of those with such an axis, which round otherwise.
    """

    def __init__(
        self,
        objective: CandidateObjective,
        parameters: int,
        chunk: int | None = None,
        specialise: Specialise | None = None,
        alone: bool = False,
    ) -> None:
        gradient = grad_and_value(objective, argnums=tuple(range(parameters)), has_aux=True)

        def plain(*stacks: torch.Tensor) -> tuple:
            gradients, (values, task_losses) = vmap(gradient, randomness="different")(*stacks)
            return gradients, values, task_losses

        def plain_alone(*stacks: torch.Tensor) -> tuple:
            gradients, (value, task_loss) = gradient(*(stack[0] for stack in stacks))
            return tuple(g.unsqueeze(0) for g in gradients), value.unsqueeze(0), task_loss.unsqueeze(0)

        self.plain: Evaluate = plain_alone if alone else plain
        self.chunk = chunk
        self._specialise = specialise
        self._special: dict[tuple[torch.Size, ...], Evaluate] = {}  # an augmentation may change the images' size

    @property
    def operations(self) -> int:
        """Operations of the recorded graph; 0 where there is none."""
        return self._recorded("operations")

    @property
    def recording_seconds(self) -> float:
        """Seconds that recording the graph took; 0 where there is none."""
        return self._recorded("recording_seconds")

    def costs(self, stacks: list[torch.Tensor], seconds: float) -> Costs:
        """Return where the time of an evaluation of these stacks goes, by its first chunk; nothing without a graph.

        It is measured for about so many seconds.
        """
        part = [stack[: self._size(len(stacks[0]))] for stack in stacks]
        function = self._function(part)
        return function.costs(part, seconds) if hasattr(function, "costs") else Costs()

    def _recorded(self, name: str) -> Any:
        return max((getattr(function, name, 0) for function in self._special.values()), default=0)

    def __call__(self, *stacks: torch.Tensor, through: Through | None = None) -> tuple:
        """Return gradients (each (N, ...)), objectives (N,) and task losses (N,).

        Args:
            stacks: the candidates, each (N, ...).
            through: changes candidates before they are evaluated, as many as are evaluated at a time; the same
                candidate perhaps several times in one call, each time to the same values.
        """
        while True:
            try:
                return self._in_chunks(list(stacks), through)
            except Exception as error:
                if not is_out_of_memory(error) or self._size(len(stacks[0])) == 1:
                    raise
                reason = first_line(error)
            self._halve(len(stacks[0]), stacks[0].device, reason)  # after the handler: its traceback keeps tensors

    def _size(self, count: int) -> int:
        """Candidates at a time: equal chunks, so that one specialised form serves all of them."""
        chunks = -(-count // min(count, self.chunk or count))
        return -(-count // chunks)

    def _halve(self, count: int, device: torch.device, reason: str) -> None:
        size = self._size(count)
        self.chunk = size // 2
        self._special.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        log.warning("Out of memory with %d candidates at a time (%s); going on with %d.", size, reason, self.chunk)

    def _in_chunks(self, stacks: list[torch.Tensor], through: Through | None) -> tuple:
        count = len(stacks[0])
        size = self._size(count)
        if size == count:
            return self._window(0, stacks, through)
        parts = []
        for start in range(0, count, size):
            begin = min(start, count - size)  # the last window reaches back, and its first rows are thrown away
            window = [stack[begin : begin + size] for stack in stacks]
            gradients, values, task_losses = self._window(begin, window, through)
            fresh = start - begin
            parts.append(([g[fresh:] for g in gradients], values[fresh:], task_losses[fresh:]))
        columns, values, task_losses = zip(*parts, strict=True)
        return [torch.cat(c) for c in zip(*columns, strict=True)], torch.cat(values), torch.cat(task_losses)

    def _window(self, begin: int, window: list[torch.Tensor], through: Through | None) -> tuple:
        if through is None:
            return self._function(window)(*window)
        changed, back = through(begin, window)
        gradients, values, task_losses = self._function(changed)(*changed)
        return back(gradients), values, task_losses

    def _function(self, stacks: list[torch.Tensor]) -> Evaluate:
        shapes = tuple(stack.shape for stack in stacks)
        if shapes not in self._special:
            function = self.plain
            if self._specialise is not None:
                function = self._specialise(self.plain, stacks)
                give_back()  # checking it took the plain form's memory, in other pieces
            self._special[shapes] = function
        return self._special[shapes]
