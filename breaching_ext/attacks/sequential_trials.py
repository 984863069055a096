"""Breaching's own loop over trials, one after the other, as a part of the joint attack (parallel_candidates: false)."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import Any

import torch
from breaching.attacks.optimization_based_attack import OptimizationBasedAttacker

from ..matching.randomness import CandidateStreams
from ..ranks import interrupts
from ..regularizers import GroupRegularization
from .candidate_choice import Target
from .candidate_engines import forget_first_draws
from .candidate_objective import match_only_trainable
from .evaluation_count import evaluations_counted

log = logging.getLogger(__name__)


class SequentialTrials(OptimizationBasedAttacker):
    """Runs Breaching's trials with what the joint attack has: random streams, counted evaluations, Ctrl-C."""

    cfg: Any
    loss_fn: Callable[..., torch.Tensor]
    group: GroupRegularization | None
    _seed: Callable[[], int]
    _streams: Callable[..., CandidateStreams]
    _say_no_checkpoint: Callable[[], None]
    augmentations: torch.nn.Sequential

    def _run_sequentially(
        self, target: Target, stats: dict, initial_data: torch.Tensor | None, dryrun: bool
    ) -> torch.Tensor:
        """Breaching's loop: one trial after the other, each in its own random stream."""
        if self.group is not None:
            log.warning("restarts.parallel_candidates=False: there is no group, so the group term is 0.")
        self._say_no_checkpoint()
        forget_first_draws(self.augmentations)  # the first trial draws them
        streams, trials = self._streams(), self.cfg.restarts.num_trials
        starts = [None] * trials if initial_data is None else list(initial_data.expand(trials, *target.shape))
        candidates: list[torch.Tensor] = []
        # Breaching's trial ends a Ctrl-C with its best so far, and does not tell
        with evaluations_counted(self) as count, interrupts() as interrupted:
            try:
                for trial, start in enumerate(starts):
                    with streams.use(trial):
                        candidates.append(self._run_trial(*target[:3], stats, trial, start, dryrun).detach())
                    if interrupted:
                        break
            except KeyboardInterrupt:
                if not candidates:
                    raise
                interrupted.append(signal.SIGINT)
        if interrupted:
            log.warning("Interrupted in candidate %d of %d: the others were not run.", len(candidates), trials)
        assert count is not None
        stats.update(engine="sequential", seed=self._seed(), gradient_evaluations=count.number)
        stats["interrupted"] = bool(interrupted)
        never = [n for n in range(len(candidates)) if not stats.get(f"Trial_{n}_Val")]  # not finite at their start
        stats["candidate_failures"] = dict.fromkeys(never, 0)
        return torch.stack(candidates)

    def _run_trial(self, rec_model: Any, shared_data: Any, labels: Any, stats: Any, *args: Any, **kwargs: Any) -> Any:
        """Run Breaching's trial; only the objective's treatment of frozen parameters differs."""
        initialize = self.objective.initialize

        def initialize_for_matched(*inner: Any, **named: Any) -> None:
            initialize(*inner, **named)
            match_only_trainable(self.objective, rec_model, self.loss_fn, shared_data)

        self.objective.initialize = initialize_for_matched
        try:
            return super()._run_trial(rec_model, shared_data, labels, stats, *args, **kwargs)
        finally:
            del self.objective.initialize
