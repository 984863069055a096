"""One row of benchmarks/matching.py: a model, its gradient, Breaching's attacker and ours on the same starts."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property

import breaching
import torch
from breaching.attacks.optimization_based_attack import OptimizationBasedAttacker
from omegaconf import open_dict

from breaching_ext.attacks import JointCandidateAttacker
from breaching_ext.attacks.joint_candidates import Target
from breaching_ext.attacks.joint_loop import JointLoop
from breaching_ext.environment import seed_everything
from breaching_ext.matching.build import choose_engine
from breaching_ext.matching.compilation import moved_by_rounding
from breaching_ext.matching.engine_parts import BuiltEngine, EngineParts
from breaching_ext.matching.heap import keeping_freed_memory
from breaching_ext.matching.tracing import relative_difference

RUN = 2000  # iterations of the run whose total time is stated
CHECKED, CHECKED_SLOW = 8, 2  # candidates whose gradients are compared, at most
MOVED = 3  # points beside each start at which they are compared, too, where they differ by more than
ASKED = 1e-5  # what is asked for, relative
#: iterations -> (seconds, candidate-iterations)
Runner = Callable[[int], tuple[float, int]]


class Case:
    """One gradient, Breaching's attacker and ours.

    Args:
        model, batch, candidates: the row.
        device: where it runs.
    """

    def __init__(self, model: str, batch: int, candidates: int, device: torch.device) -> None:
        overrides = [
            "case=sample_photos",
            "attack=joint_candidates",
            f"case.model={model}",
            f"case.user.num_data_points={batch}",
            f"attack.restarts.num_trials={candidates}",
            f"attack.optim.max_iterations={RUN}",
            "attack.optim.callback=1000000",
            "attack.regularization.group_regularization.scale=0",
            "attack.impl.progress=false",
            "attack.restarts.seed=0",
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            cfg = breaching.get_config(overrides=overrides)
        seed_everything(0)
        setup = {"device": device, "dtype": torch.float}
        user, server, net, loss_fn = breaching.cases.construct_case(cfg.case, setup)
        self.shared, self.payload, _ = server.run_protocol(user)
        self.candidates, self.device = candidates, device
        self.slow = False  # whether to check little
        self.ours = JointCandidateAttacker(net, loss_fn, cfg.attack, setup)
        with open_dict(cfg.attack):
            plain = cfg.attack.copy()
            del plain.regularization.group_regularization
        self.theirs = OptimizationBasedAttacker(net, loss_fn, plain, setup)
        self._their_target = self.theirs.prepare_attack(self.payload, self.shared)[:2]
        models, labels, _ = self.ours.prepare_attack(self.payload, self.shared)
        self.target = Target(models, self.shared, labels, [batch, *self.ours.data_shape])
        self.ours.objective.initialize(self.ours.loss_fn, self.ours.cfg.impl, None)

    def breaching_trial(self, iterations: int) -> tuple[float, int]:
        """Run one of Breaching's trials; returns its seconds and candidate-iterations."""
        models, labels = self._their_target
        self.theirs.cfg.optim.max_iterations = iterations
        return timed(lambda: self.theirs._run_trial(models, self.shared, labels, defaultdict(list), 0)), iterations

    def parts(self, iterations: int = RUN) -> EngineParts:
        """Return what an engine is built from, for a run of that many iterations."""
        streams = self.ours._streams()
        parts = self.ours._engine_parts(self.target, self.ours._starts(self.target, streams, None), streams)
        parts.iterations, parts.identity = iterations, None  # nothing is remembered between rows
        return parts

    def build(self, mode: str) -> tuple[BuiltEngine, float]:
        """Return an engine, ready to step, and the seconds that choosing, recording and compiling took."""
        start = time.perf_counter()
        with keeping_freed_memory():
            built = choose_engine(mode, self.parts())
            if hasattr(built.engine, "evaluation"):
                built.engine.evaluation(*built.engine.parameters)
        return built, time.perf_counter() - start

    def joint_run(self, built: BuiltEngine) -> Runner:
        """Return a function that runs some iterations and returns their seconds and candidate-iterations."""

        def run(iterations: int) -> tuple[float, int]:
            self.ours.cfg.optim.max_iterations = iterations
            with keeping_freed_memory():  # as the attack does
                return timed(JointLoop(built.engine, self.ours.cfg, self.ours._box()).run), iterations * self.candidates

        return run

    @cached_property
    def _points(self) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """The starts, and the starts with every pixel moved by one rounding; with Breaching's gradients at some."""
        parts, (starts,) = self.parts(), self.parts().starts
        checked = CHECKED_SLOW if self.slow else CHECKED
        points = [starts, *(moved_by_rounding(starts, draw) for draw in range(MOVED))]
        return [([p], [parts.reference([start])[1][0] for start in p[:checked]]) for p in points]

    def agreement(self, built: BuiltEngine) -> dict[str, float] | None:
        """Return the largest relative difference of a candidate's gradient from Breaching's.

        `at`: at the start. `beside`: at the start or one of some points a rounding away from it, where it is least.
        Beside a kink of the model (ReLU) no two orders of summation agree, but points on one side of it do.
        """
        if not hasattr(built.engine, "evaluation"):
            return None  # Breaching's own closure
        found = []
        for stacks, references in self._points:
            (gradients, *_), _, _ = built.engine.evaluation(*stacks)
            found.append([relative_difference(g, expected) for g, expected in zip(gradients, references, strict=False)])
            if max(found[0]) <= ASKED:  # no kink is near, and other points of a large row take minutes
                break
        return {"at": max(found[0]), "beside": max(min(column) for column in zip(*found, strict=True))}

    def sensitivity(self) -> float:
        """Return how much Breaching's own gradient moves at most when every pixel moves by one rounding."""
        (_, expected), *moved = self._points
        return max(
            relative_difference(g, e) for _, gradients in moved for g, e in zip(gradients, expected, strict=True)
        )


def timed(function: Callable[[], object]) -> float:
    """Return the seconds of a call, with everything that it started on a GPU."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def seconds_each(runner: Runner, iterations: int) -> float:
    """Return the seconds a candidate-iteration of one call."""
    seconds, steps = runner(iterations)
    return seconds / steps


@contextlib.contextmanager
def fresh_caches() -> Iterator[None]:
    """Compile from scratch, and remember no choice of an engine."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "BREACHING_EXT_CACHE")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.update(dict.fromkeys(names, folder))
        torch._dynamo.reset()
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def quiet() -> None:
    """Keep log lines of the attacks out of the table."""
    logging.getLogger("breaching_ext").setLevel(logging.ERROR)
