"""The loop that SSIGD and DS-BLO share: logging, averaging, checkpoints."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from breaching_ext.ssigd.arguments import check_number, check_tensor, check_whole
from breaching_ext.ssigd.errors import SSIGDError
from breaching_ext.ssigd.history import (
    SERIES,
    BilevelResult,
    Snapshot,
    load_checkpoint,
    save_checkpoint,
    versions,
)
from breaching_ext.ssigd.oracle import GradientOracle
from breaching_ext.ssigd.problem import QuadraticBilevelProblem
from breaching_ext.ssigd.rows import Array
from breaching_ext.ssigd.solution import QPSolution

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """What one iteration of an algorithm did.

    Attributes:
        x: next iterate, (n,).
        vectors: the algorithm's other vectors after the iteration; "momentum" is logged.
        step: step size.
        gradient: gradient that was drawn, (n,).
        solution: perturbed lower level behind it.
        evaluated: where the gradient was drawn, (n,).
    """

    x: Array
    vectors: dict[str, Array]
    step: float
    gradient: Array
    solution: QPSolution
    evaluated: Array


class BilevelDescent(ABC):
    """Base of the algorithms.

    At an optimum on a kink of F the gradient does not vanish, so no algorithm stops on its norm: all
        iterations run.

    Args:
        problem: the bilevel problem.
        q_std: standard deviation of each entry of the Gaussian perturbation q.
        noise_std, inexactness, backend: see GradientOracle.
        seed: seed of q, of the noise and of every other draw.
    """

    output = "average"

    def __init__(
        self,
        problem: QuadraticBilevelProblem,
        *,
        q_std: float,
        noise_std: float = 0.0,
        inexactness: float = 0.0,
        backend: str = "kkt",
        seed: int = 0,
    ) -> None:
        """See the class."""
        if not isinstance(problem, QuadraticBilevelProblem):
            raise SSIGDError(f"problem is a {type(problem).__name__}; expected a QuadraticBilevelProblem")
        check_number("q_std", q_std, least=0)
        check_whole("seed", seed, 0)
        self.problem, self.q_std, self.seed = problem, q_std, seed
        self.oracle = GradientOracle(problem, backend=backend, noise_std=noise_std, inexactness=inexactness)

    def settings(self, iterations: int) -> dict[str, Any]:
        """Return what the run depends on besides the problem."""
        return {
            "algorithm": type(self).__name__, "iterations": iterations, "seed": self.seed,
            "q_std": self.q_std, "noise_std": self.oracle.noise_std, "inexactness": self.oracle.inexactness,
            "backend": self.oracle.backend, "problem": repr(self.problem), "device": "cpu",
            "versions": versions(), **self.parameters(),
        }  # fmt: skip

    def solve(
        self,
        iterations: int,
        x0: Tensor | None = None,
        *,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 100,
        progress: bool = False,
    ) -> BilevelResult:
        """Run the algorithm.

        Args:
            iterations: number of iterations T.
            x0: start, (n,); default 0, projected onto X.
            checkpoint: JSON file to save to and to resume from; written every `checkpoint_every` iterations
                and whenever the run stops, also on Ctrl-C or an error, which are raised again.
            checkpoint_every: default 100.
            progress: show a progress bar.

        Returns:
            The result with the log of all iterations.

        Raises:
            SSIGDError and its subclasses: see errors.py. ValueError: the checkpoint belongs to another run.
        """
        check_whole("iterations", iterations, 1)
        check_whole("checkpoint_every", checkpoint_every, 1)
        if x0 is not None:
            check_tensor("x0", x0, (self.problem.dim,))
        settings = {**self.settings(iterations), "x0": None if x0 is None else x0.tolist()}
        rng = np.random.default_rng(self.seed)
        resumed = None if checkpoint is None else load_checkpoint(checkpoint, settings)
        if resumed is None:
            snapshot = self._start(x0, rng)
            history: dict[str, list[float]] = {name: [] for name in SERIES}
        else:
            snapshot, history = resumed
            logger.info("resuming at iteration %d of %d from %s", snapshot.iteration, iterations, checkpoint)
        rng.bit_generator.state = snapshot.rng
        try:
            steps = range(snapshot.iteration, iterations)
            for r in tqdm(steps, desc=type(self).__name__, disable=not progress):
                snapshot = self._iterate(snapshot, history, iterations, rng)
                if checkpoint is not None and (r + 1) % checkpoint_every == 0:
                    save_checkpoint(checkpoint, settings, snapshot, history)
        finally:
            if checkpoint is not None:
                save_checkpoint(checkpoint, settings, snapshot, history)
        return self._result(snapshot, history, settings)

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """Return the algorithm's own parameters for the record."""

    @abstractmethod
    def _prepare(self, x: Array, rng: np.random.Generator) -> dict[str, Array]:
        """Return the vectors of the algorithm before the first iteration."""

    @abstractmethod
    def _step(self, snapshot: Snapshot, iterations: int, rng: np.random.Generator) -> Update:
        """Return what one iteration does."""

    def _weight(self, r: int) -> float:
        """Return the weight of iterate r in the average."""
        return 1.0

    def project(self, x: Array) -> Array:
        """Project onto the box X of the problem."""
        return np.clip(x, self.problem.x_lower.numpy(), self.problem.x_upper.numpy())

    def _draw_q(self, rng: np.random.Generator) -> Array:
        return self.q_std * rng.standard_normal(self.problem.dim_lower)

    def _start(self, x0: Tensor | None, rng: np.random.Generator) -> Snapshot:
        start = torch.zeros(self.problem.dim) if x0 is None else x0.detach().cpu()
        x = self.problem.project(start.to(torch.float64)).numpy()
        vectors = self._prepare(x, rng)
        return Snapshot(0, x, vectors, 0.0 * x, 0.0, x, np.inf, [], 0.0, dict(rng.bit_generator.state))

    def _iterate(
        self, before: Snapshot, history: dict[str, list[float]], iterations: int, rng: np.random.Generator
    ) -> Snapshot:
        begun = time.perf_counter()
        update = self._step(before, iterations, rng)
        seconds = before.seconds + time.perf_counter() - begun
        r, x, solution = before.iteration, update.x, update.solution
        objective = self.problem.objective(x)
        active = solution.active.tolist()
        momentum = update.vectors.get("momentum", update.gradient)
        values = (
            objective, seconds, float(np.linalg.norm(update.gradient)), float(np.linalg.norm(momentum)),
            update.step, float(len(set(active) ^ set(before.active)) if r else 0), solution.margin,
            self.problem.violation(update.evaluated, solution.y),
        )  # fmt: skip
        for name, value in zip(SERIES, values, strict=True):
            history[name][r:] = [value]  # an interrupted iteration may have left an entry
        improved = objective < before.best_objective
        weight = self._weight(r)
        return Snapshot(
            r + 1, x, update.vectors, before.total + weight * x, before.weight + weight,
            x if improved else before.best_x, objective if improved else before.best_objective,
            active, seconds, dict(rng.bit_generator.state),
        )  # fmt: skip

    def _result(self, end: Snapshot, history: dict[str, list[float]], settings: dict[str, Any]) -> BilevelResult:
        arrays = {"last": end.x, "average": end.total / end.weight, "best": end.best_x}
        points = {name: torch.from_numpy(np.array(x)) for name, x in arrays.items()}
        objectives = {name: self.problem.objective(x) for name, x in arrays.items()}
        return BilevelResult(
            points[self.output], objectives[self.output], points["last"], points["average"], points["best"],
            objectives, history, settings,
        )  # fmt: skip
