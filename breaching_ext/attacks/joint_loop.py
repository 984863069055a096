"""The loop over all candidates: consensus, step, projection, best so far, failures, checkpoints, progress."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..matching.engine import CandidateEngine
from ..matching.track import Track, advancing, settle
from ..out_of_memory import is_out_of_memory
from ..ranks import Ranks
from ..regularizers import GroupRegularization
from .checkpoint import Checkpoint

log = logging.getLogger(__name__)


@dataclass
class LoopResult:
    """What the loop found.

    Attributes:
        best: each candidate's best parameters, each (N, ...).
        best_values: their objectives (N,).
        histories: objective values of each candidate, up to the iteration in which it failed, if it did.
        failures: candidate -> iteration in which its objective was not finite.
        interrupted: whether Ctrl-C, or a lack of memory, ended the loop.
        out_of_memory: whether it was the latter.
    """

    best: list[torch.Tensor]
    best_values: torch.Tensor
    histories: list[list[float]] = field(default_factory=list)
    failures: dict[int, int] = field(default_factory=dict)
    interrupted: bool = False
    out_of_memory: bool = False

    @classmethod
    def joined(cls, parts: Sequence[LoopResult]) -> LoopResult:
        """Return the result of candidates that ran in several loops, block after block."""
        failures, offset = {}, 0
        for part in parts:
            failures.update({offset + n: step for n, step in part.failures.items()})
            offset += len(part.best_values)
        return cls(
            [torch.cat(stacks) for stacks in zip(*(part.best for part in parts), strict=True)],
            torch.cat([part.best_values for part in parts]),
            [history for part in parts for history in part.histories],
            failures,
            any(part.interrupted for part in parts),
            any(part.out_of_memory for part in parts),
        )

    def of_all(self, ranks: Ranks, count: int) -> LoopResult:
        """Return the result of all `count` candidates from the shares of several processes."""
        if ranks.size == 1:
            return self
        offset = ranks.share(count).start
        own = (self.histories, {offset + n: step for n, step in self.failures.items()}, self.interrupted)
        histories, failures, interrupted = zip(*ranks.gather(own), strict=True)
        return LoopResult(
            [ranks.collect(best, count) for best in self.best],
            ranks.collect(self.best_values, count),
            [history for part in histories for history in part],
            {n: step for part in failures for n, step in part.items()},
            any(interrupted),
        )


class JointLoop:
    """Run an engine to the end, keeping every candidate's best point (see `Track`).

    Args:
        engine: the engine that owns the candidates.
        cfg: the attack config (`optim` and `impl.progress` are read).
        box: least and largest valid image values, or None.
        group: the group term, if there is one; it gets the live candidates before every step.
        checkpoint: where to keep the state, or None.
        ranks: the processes that share the candidates; this loop's are the block `offset`, ... of all.
        offset: number of this loop's first candidate.
    """

    def __init__(
        self,
        engine: CandidateEngine,
        cfg: Any,
        box: tuple[torch.Tensor, torch.Tensor] | None = None,
        group: GroupRegularization | None = None,
        checkpoint: Checkpoint | None = None,
        ranks: Ranks | None = None,
        offset: int = 0,
    ) -> None:
        self.engine, self.optim, self.group = engine, cfg.optim, group
        self.checkpoint = checkpoint
        self.ranks, self.offset = ranks or Ranks(), offset
        self.progress = cfg.impl.get("progress", "auto") if self.ranks.first else False
        self.track = Track.start(engine.parameters, box)
        self._advance = advancing(engine)
        self.result = LoopResult(self.track.best, self.track.best_values)
        self._values: list[torch.Tensor] = []

    def run(self, dryrun: bool = False) -> LoopResult:
        """Run all iterations (one if `dryrun`); Ctrl-C and a lack of memory end the loop and keep what there is."""
        start = self._resume()
        iterations = min(start + 1, self.optim.max_iterations) if dryrun else self.optim.max_iterations
        try:
            with logging_redirect_tqdm(), self.ranks.interrupts_noted(), self._bar(start, iterations) as bar:
                for iteration in bar:
                    going_on = self._iterate(iteration, bar)
                    last = iteration + 1 == self.optim.max_iterations  # what follows it is not settled yet
                    if self.checkpoint is not None and self.checkpoint.due(iteration) and not last:
                        self.checkpoint.save(self._state(iteration + 1))
                    if not going_on:
                        break
                    if self.ranks.size > 1 and self.ranks.number(self.ranks.interrupted):
                        raise KeyboardInterrupt
                if start < iterations:
                    settle(self.engine, self.track)
                self._save_the_end()
        except KeyboardInterrupt:
            log.warning("Interrupted in iteration %d: returning the best candidates so far.", len(self._values) + 1)
            self.result.interrupted = True
        except Exception as error:  # one candidate at a time was still too much
            if not is_out_of_memory(error) or not self._values or self.ranks.size > 1:
                raise  # with several processes the others would wait for this one: the checkpoint remains
            log.error("Out of memory in iteration %d: returning the best candidates so far.", len(self._values) + 1)
            self.result.interrupted = self.result.out_of_memory = True
        self.result.best, self.result.best_values = self.track.best, self.track.best_values
        self.result.histories = self._histories()
        return self.result

    def _iterate(self, iteration: int, bar: tqdm) -> bool:
        """Take one step; returns whether any candidate is still alive."""
        if self.group is not None:
            living, before = self.engine.parameters[0], self.group.active
            self.group.update(living if self.track.whole else living[self.track.alive], iteration)
            if self.group.active and not before:  # a term more: earlier values do not compare with what follows
                self.track.forget_values()
        values, task_losses, failed = self._advance(iteration, self.track)
        self._values.append(values)
        self._report(iteration, values, task_losses, bar)
        if not self.track.whole:
            self._note(failed, iteration)
        return self.ranks.number(len(values) - len(self.result.failures)) > 0

    def _note(self, failed: torch.Tensor, iteration: int) -> None:
        for index in failed.nonzero().flatten().tolist():
            self.result.failures[index] = iteration
            log.warning(
                "Candidate %d: objective not finite in iteration %d; frozen at its best, the others go on.",
                self.offset + index,
                iteration + 1,
            )

    # -- going on where another process stopped ------------------------------------------------------------------

    def _save_the_end(self) -> None:
        """What follows, choosing and saving, may take long or fail; then the loop need not run again."""
        if self.checkpoint is not None:
            with contextlib.suppress(KeyboardInterrupt):  # nothing is left to interrupt
                self.checkpoint.save(self._state(self.optim.max_iterations))

    def _state(self, iteration: int) -> dict[str, Any]:
        return {
            "iteration": iteration,
            "engine": self.engine.state(),
            "group": self.group.state() if self.group else None,
            "alive": self.track.alive,
            "best": self.track.best,
            "best_values": self.track.best_values,
            "failures": self.result.failures,
            "values": torch.stack(self._values) if self._values else None,  # one tensor, however many steps
        }

    def _resume(self) -> int:
        """Restore the checkpoint, if there is one; returns the first iteration that is still to do."""
        state = self.checkpoint.load() if self.checkpoint is not None else None
        if state is None:
            return 0
        track, device = self.track, self.track.alive.device
        self.engine.restore(state["engine"], state["iteration"])
        if self.group is not None:
            self.group.restore(state["group"])
        track.alive = state["alive"].to(device)
        track.best = [p.to(device) for p in state["best"]]
        track.best_values = state["best_values"].to(device)
        self.result.failures = state["failures"]
        track.whole = not self.result.failures
        self._values = [] if state["values"] is None else list(state["values"].to(device))
        return state["iteration"]

    # -- telling -------------------------------------------------------------------------------------------------

    def _bar(self, start: int, iterations: int) -> tqdm:
        disable = {"auto": None, True: False, False: True}.get(self.progress)  # None: only where there is a terminal
        self._clock = time.perf_counter()
        todo = range(start, iterations)
        return tqdm(todo, desc="candidates", unit="it", initial=start, total=iterations, disable=disable, leave=False)

    def _report(self, iteration: int, values: torch.Tensor, task_losses: torch.Tensor, bar: tqdm) -> None:
        last = iteration + 1 == self.optim.max_iterations
        if not bar.disable and (last or iteration % 10 == 0):
            best = " ".join(f"{v:.3g}" for v in self.track.best_values.tolist()[:8])
            bar.set_postfix_str(f"best {best}", refresh=False)
        if last or iteration % self.optim.callback == 0:
            now = time.perf_counter()
            log.info(
                "| It: %d | Rec. loss: %s | Task loss: %s | T: %.2fs",
                iteration + 1,
                _short(values),
                _short(task_losses),
                now - self._clock,
            )
            self._clock = now

    def _histories(self) -> list[list[float]]:
        if not self._values:
            return [[] for _ in self.track.alive]
        columns = torch.stack(self._values).T.tolist()  # (N, iterations)
        return [values[: self.result.failures.get(index, len(values))] for index, values in enumerate(columns)]


def _short(values: torch.Tensor, most: int = 8) -> str:
    shown = " ".join(f"{v:.4f}" for v in values.tolist()[:most])
    return shown + (" ..." if len(values) > most else "")
