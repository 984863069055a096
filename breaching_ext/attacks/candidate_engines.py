"""What an engine needs to know of Breaching's attack, where it starts, and which engine a run takes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import open_dict

from ..matching.build import choose_engine
from ..matching.client import unscripted
from ..matching.engine import CandidateObjective, GradientRule
from ..matching.engine_parts import BuiltEngine, EngineParts
from ..matching.lbfgs import BatchedLBFGS
from ..matching.memory import parse_bytes
from ..matching.randomness import CandidateStreams
from ..ranks import Ranks
from .candidate_choice import Target
from .candidate_objective import pure_objective
from .checkpoint import Checkpoint, KeepsCheckpoint, fingerprint, saved_engine

log = logging.getLogger(__name__)

_LBFGS_OPTIONS = (
    "lr",
    "max_iter",
    "max_eval",
    "tolerance_grad",
    "tolerance_change",
    "history_size",
    "line_search_fn",
)
#: torch's defaults, which Breaching leaves: evaluations an iteration, about, and pairs of vectors in the history.
_LBFGS_EVALUATIONS, _LBFGS_HISTORY = 20, 100
_DRAWS_AT_EVERY_CALL = (
    "L-BFGS draws noise or augmentations at every evaluation, of which candidates need different numbers"
)


class CandidateEngines(KeepsCheckpoint):
    """The part of a joint attack that describes one candidate to the engines: how it starts, is evaluated and stepped.

    Mixed into a Breaching attacker, of which it uses the objective, the regularizers, the optimizer and the closure.
    """

    cfg: Any
    setup: dict[str, Any]
    objective: Any
    loss_fn: Any
    dm: torch.Tensor
    ds: torch.Tensor
    augmentations: torch.nn.Sequential
    regularizers: list[Any]
    current_task_loss: Any
    _compute_objective: Callable[..., Callable[[], torch.Tensor]]
    _init_optimizer: Callable[..., Any]
    _box: Callable[[], Any]
    _initialize_data: Callable[[list[int]], torch.Tensor]

    def _seed(self) -> int:
        seed = self.cfg.restarts.get("seed")
        return (torch.initial_seed() if seed is None else int(seed)) % 2**63

    def _streams(self, own: range | None = None) -> CandidateStreams:
        """Return the random streams of the candidates `own` (all by default); candidate i's depends on i alone."""
        own = range(self.cfg.restarts.num_trials) if own is None else own
        return CandidateStreams([self._seed() + index for index in own], torch.device(self.setup["device"]))

    def _starts(
        self, target: Target, streams: CandidateStreams, initial_data: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Return start values, each (N, ...). Streams advance as in Breaching, which draws before it looks for data."""
        starts = []
        for index in range(len(streams.states)):
            with streams.use(index):
                starts.append(self._initialize_data(target.shape).detach())
        stack = torch.stack(starts)  # (N, B, C, H, W)
        if initial_data is not None:
            stack = initial_data.detach().to(**self.setup).expand_as(stack).clone()
        return [stack]

    def _draw_once(self, target: Target, streams: CandidateStreams, own: range) -> None:
        """Draw what an augmentation draws once and keeps (Breaching's ColorJitter), for all candidates.

        As in Breaching, whose first trial draws it after its start; so it is the same in every process, in a run that
        goes on from a checkpoint, and however long `auto` tries engines.
        """
        once = forget_first_draws(self.augmentations)
        if not once:
            return
        first = CandidateStreams([self._seed()], torch.device(self.setup["device"]))
        with first.use(0):
            self._initialize_data(target.shape)
            for module in once:
                module.shuffle(target.shape[0], **self.setup)
        if own.start == 0:
            streams.states[0] = first.states[0]

    def _checkpoint(
        self, target: Target, starts: list[torch.Tensor], engine: str, dryrun: bool, ranks: Ranks | None = None
    ) -> Checkpoint | None:
        """Return where the run keeps its state; None where the config does not ask for it, or for a single step."""
        ranks, self._kept = ranks or Ranks(), None
        every, path = self.cfg.impl.get("checkpoint_every"), ranks.from_first(self.cfg.impl.get("checkpoint_path"))
        if every and not path and not dryrun:
            log.warning("impl.checkpoint_every=%d has no effect without impl.checkpoint_path.", every)
        if path and not every and not dryrun:
            log.warning("impl.checkpoint_path=%s has no effect without impl.checkpoint_every.", path)
        if not every or not path or dryrun:
            return None
        evaluated = [model for model in target.models if not model.training]  # the others go by the batch's statistics
        known = [target.labels, self.dm, self.ds, *(buffer for model in evaluated for buffer in model.buffers())]
        known += [parameter for model in target.models for parameter in model.parameters()]
        known += target.local_hyperparams["labels"] if target.local_hyperparams else []
        loss = unscripted(self.loss_fn)
        known += loss.buffers() if isinstance(loss, torch.nn.Module) else []
        described = f"{engine} {ranks.size} {self._seed()} {self._identity(target)} {_with_settings(loss)}"
        run = fingerprint(self.cfg, target.shared_data, starts, described, known)
        self._kept = Checkpoint(path, every, run, engine, ranks, self._seed())
        return self._kept

    def _say_no_checkpoint(self) -> None:
        if self.cfg.impl.get("checkpoint_every"):
            log.warning("restarts.parallel_candidates=False: impl.checkpoint_every has no effect.")

    def _choose_engine(self, parts: EngineParts, ranks: Ranks, dryrun: bool = False) -> BuiltEngine:
        """Return the engine; where `auto` goes on from a checkpoint, that run's. All processes take the first's."""
        mode = self.cfg.restarts.get("candidate_batching", "auto")
        if mode == "auto" and ranks.first and not dryrun and self.cfg.impl.get("checkpoint_every"):
            mode = saved_engine(self.cfg.impl.get("checkpoint_path")) or mode
        built = choose_engine(mode, parts) if ranks.first else None
        name = ranks.from_first(built.engine.name if built else None)
        return built or choose_engine(name, parts)

    def _engine_parts(
        self, target: Target, starts: list[torch.Tensor], streams: CandidateStreams, dryrun: bool = False
    ) -> EngineParts:
        """Describe to the engine how one candidate is started, evaluated and stepped."""
        optim = self.cfg.optim
        signed = optim.signed if optim.signed in ("hard", "soft") else None
        rule = GradientRule(optim.max_iterations, optim.langevin_noise, optim.grad_clip, signed)
        objective, why_not = self._pure_objective(target)
        random = rule.random or len(self.augmentations) > 0
        training = any(model.training for model in target.models)  # perhaps with dropout, which draws, too
        models, shared_data, labels = target[:3]

        def make_closure(
            candidate: list[torch.Tensor], optimizer: torch.optim.Optimizer, iteration: int
        ) -> Callable[[], torch.Tensor]:
            return self._compute_objective(candidate[0], labels, models, optimizer, shared_data, iteration)

        return EngineParts(
            starts=starts,
            streams=streams,
            rule=rule,
            make_closure=make_closure,
            task_loss=lambda: torch.as_tensor(self.current_task_loss),
            make_optimizer=self._init_optimizer,
            reference=lambda candidate: self._reference(candidate, target),
            objective=objective,
            compiled_objective=self._pure_objective(target, compiled=True)[0],
            make_stack_optimizer=self._init_stack_optimizer,
            why_not=why_not or (_DRAWS_AT_EVERY_CALL if random and self._by_lbfgs else ""),
            augmentation=self.augmentations if len(self.augmentations) else None,
            differentiable=self.cfg.differentiable_augmentations,
            random_steps=random or training,
            box=self._box(),
            iterations=1 if dryrun else optim.max_iterations,
            evaluations_each=_LBFGS_EVALUATIONS if self._by_lbfgs else 1,
            alone=self.cfg.restarts.num_trials == 1,
            copies=self._histories() * 2 * _LBFGS_HISTORY if self._by_lbfgs else 0,
            memory_budget=parse_bytes(self.cfg.impl.get("memory_budget")),
            identity=self._identity(target),
        )

    def _histories(self) -> int:
        """How many engines with a history of their own there are at a time: `auto` compares two."""
        return 2 if self.cfg.restarts.get("candidate_batching", "auto") == "auto" else 1

    @property
    def _by_lbfgs(self) -> bool:
        return str(self.cfg.optim.optimizer).lower() == "l-bfgs"

    def _identity(self, target: Target) -> str:
        """Return text that says what a step is: the models' structure, objective, regularizers, optimizer."""
        sizes = [[tuple(p.shape) for p in model.parameters()] for model in target.models]
        names = [repr(model) for model in target.models]
        optimizer = str(self.cfg.optim.optimizer).lower()
        modes = [[model.training for model in target.models], self.cfg.impl.mixed_precision]
        return f"{names} {sizes} {modes} {self.objective!r} {self.regularizers} {target.local_hyperparams} {optimizer}"

    def _init_stack_optimizer(
        self, stacks: list[torch.Tensor]
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Return Breaching's optimizer and schedule over stacks; L-BFGS in the form that keeps candidates apart."""
        optimizer, scheduler = self._init_optimizer(stacks)
        if not isinstance(optimizer, torch.optim.LBFGS):
            return optimizer, scheduler  # elementwise: one over the stack is one for every candidate
        (options,) = optimizer.param_groups
        batched = BatchedLBFGS(stacks, **{key: value for key, value in options.items() if key in _LBFGS_OPTIONS})
        batched.param_groups = optimizer.param_groups  # the schedule goes on driving the step size,
        optimizer._opt_called = True  # type: ignore[attr-defined]  # and need not warn that its optimizer does not step
        return batched, scheduler

    def _pure_objective(self, target: Target, compiled: bool = False) -> tuple[CandidateObjective | None, str]:
        """Return the objective of one candidate as a pure function, or None and the reason why there is none."""
        known = (self.objective, self.regularizers, self.loss_fn, self.cfg.impl)
        return pure_objective(*known, *target[:3], compiled)

    def _reference(self, candidate: list[torch.Tensor], target: Target) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return Breaching's objective and gradient at one candidate, before clipping, noise and signs."""
        leaf = candidate[0].detach().clone().requires_grad_()
        leaf.grad = torch.zeros_like(leaf)
        cfg, augmentations = self.cfg, self.augmentations
        self.cfg, self.augmentations = copy.deepcopy(cfg), torch.nn.Sequential()  # what the closure reads
        with open_dict(self.cfg):
            self.cfg.optim.update(signed=None, grad_clip=None, langevin_noise=0.0)
        try:
            optimizer = torch.optim.SGD([leaf], lr=0.0)
            models, shared_data, labels = target[:3]
            value = self._compute_objective(leaf, labels, models, optimizer, shared_data, 0)()
        finally:
            self.cfg, self.augmentations = cfg, augmentations
        return value.detach(), [leaf.grad]


def forget_first_draws(augmentations: Any) -> list[Any]:
    """Let augmentations that keep what they drew first (Breaching's ColorJitter) draw again; returns these."""
    once = [module for module in augmentations if hasattr(module, "shuffled") and not module.shuffle_every]
    for module in once:
        module.shuffled = False  # of an earlier attack
    return once


def _with_settings(loss_fn: Any) -> str:
    """Return text that says what a loss is; modules have settings, of which they do not tell."""
    kinds = (str, int, float, bool, tuple)
    settings = {key: value for key, value in getattr(loss_fn, "__dict__", {}).items() if isinstance(value, kinds)}
    return f"{loss_fn!r} {sorted(settings.items())}"


def record_choice(stats: dict, built: BuiltEngine) -> None:
    """Record how the engine was chosen, and what the run takes of memory."""
    stats["calibration"] = built.calibration.as_dict() if built.calibration else None
    chunk = getattr(getattr(built.engine, "evaluation", None), "chunk", 1)  # the list engine goes one by one
    stats["memory"] = {
        "bytes_per_candidate": built.memory.per_candidate,
        "budget": built.memory.budget,
        "candidates_at_a_time": chunk,
    }
