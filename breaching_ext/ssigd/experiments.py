"""The experiments behind config/ssigd: a convex instance, a brute force, and the DS-BLO paper's example."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from breaching_ext.ssigd.arguments import check_whole
from breaching_ext.ssigd.dsblo import DSBLO
from breaching_ext.ssigd.errors import SSIGDError
from breaching_ext.ssigd.history import BilevelResult, versions
from breaching_ext.ssigd.instances import convex_instance, convex_optimum, dsblo_example, enumerate_optimum
from breaching_ext.ssigd.reference import StronglyConvexBilevelProblem
from breaching_ext.ssigd.ssigd import SSIGD

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What an experiment found.

    Attributes:
        summary: JSON-ready figures, one row a run, with the configuration and versions.
        runs: the runs worth plotting, by label.
        reference: objective to subtract in the plot, by label; empty where none is known.
    """

    summary: dict[str, Any]
    runs: dict[str, BilevelResult]
    reference: dict[str, float]


def convex(dims: list[int], seeds: list[int], iterations: int, finish_gradients: int, q_std: float) -> Report:
    """Run SSIGD and the certified finish on `convex_instance`; report gaps to the independent optimum."""
    rows, runs, reference = [], {}, {}
    for dim, seed in _progress([(dim, seed) for dim in dims for seed in seeds], "convex"):
        problem = convex_instance(dim, seed)
        optimum = convex_optimum(problem)
        algorithm = SSIGD(problem, q_std=q_std, seed=seed)
        result, finish = algorithm.solve_certified(iterations, finish_gradients=finish_gradients)
        row = {"dim": dim, "seed": seed, "kink": problem.certified_solution(optimum.x).margin < 1e-9}
        row |= {f"gap_{name}": value - optimum.objective for name, value in result.objectives.items()}
        row |= {"gap_finish": finish.objective - optimum.objective, "certified_gap": finish.gap}
        row |= {
            "finish_gradients": finish.gradients,
            "final_gradient_norm": result.history["gradient_norm"][-1],
        }
        rows.append(row)
        if seed == seeds[0]:
            runs[f"n = {dim}"], reference[f"n = {dim}"] = result, optimum.objective
    return Report({"rows": rows}, runs, reference)


def nonconvex(
    dim: int, seeds: list[int], starts: int, iterations: int, ssigd: dict[str, Any], dsblo: dict[str, Any]
) -> Report:
    """Run both algorithms from random starts; report each start's gap to the brute force over active sets."""
    check_whole("starts", starts, 1)
    rows, runs, reference = [], {}, {}
    for seed in _progress(seeds, "nonconvex"):
        problem = StronglyConvexBilevelProblem(dim, seed=seed)
        best = enumerate_optimum(problem).objective
        rng = np.random.default_rng(seed)
        for start in range(starts):
            x0 = torch.from_numpy(rng.uniform(problem.x_lower.numpy(), problem.x_upper.numpy()))
            algorithms = {
                "SSIGD": SSIGD(problem, seed=start, **ssigd),
                "DS-BLO": DSBLO(problem, seed=start, **dsblo),
            }
            for name, algorithm in algorithms.items():
                result = algorithm.solve(iterations, x0)
                gaps = {f"gap_{point}": value - best for point, value in result.objectives.items()}
                first = problem.objective(x0) - best
                rows.append({"seed": seed, "start": start, "algorithm": name, "gap_start": first, **gaps})
                if seed == seeds[0] and start < 3:
                    runs[f"{name}, start {start}"] = result
                    reference[f"{name}, start {start}"] = best
    return Report({"rows": rows}, runs, reference)


def dsblo(
    upper: int, lower: int, constraints: int, seeds: list[int], iterations: int, steps: list[float],
    low: float, ssigd: dict[str, Any], dsblo: dict[str, Any],
) -> Report:  # fmt: skip
    """Run the numerical example of the DS-BLO paper with the best step size of each algorithm."""
    rows, runs = [], {}
    for seed in _progress(seeds, "dsblo"):
        problem = dsblo_example(upper, lower, constraints, seed, low)
        constant = {"regime": "weakly_convex", **ssigd}
        candidates: dict[str, list[tuple[float, SSIGD | DSBLO]]] = {
            "SSIGD": [(s, SSIGD(problem, step=s * iterations**0.5, seed=seed, **constant)) for s in steps],
            "DS-BLO": [(s, DSBLO(problem, gamma2=1.0 / s, seed=seed, **dsblo)) for s in steps],
        }
        x0 = torch.from_numpy(np.random.default_rng(seed).uniform(size=upper))
        for name, algorithms in candidates.items():
            step, result = _best_step(algorithms, iterations, x0)
            rows.append({
                "seed": seed, "algorithm": name, "step": step, "objective_start": problem.objective(x0),
                "objective_last": result.objectives["last"], "objective_best": result.objectives["best"],
                "seconds": result.history["seconds"][-1],
                "active_last": len(problem.certified_solution(result.x_last).active),
                "active_changes": sum(result.history["active_changes"]),
                "largest_violation": max(result.history["violation"]),
            })  # fmt: skip
            if seed in seeds[:2]:
                runs[f"{name}, data {seed}"] = result
    return Report({"rows": rows}, runs, {})


def _best_step(
    algorithms: list[tuple[float, SSIGD | DSBLO]], iterations: int, x0: Tensor
) -> tuple[float, BilevelResult]:
    """Return the step with the lowest final objective and its run; a step that diverges is out."""
    best: tuple[float, BilevelResult] | None = None
    for step, algorithm in algorithms:
        try:
            result = algorithm.solve(iterations, x0)
        except SSIGDError as error:
            logger.info("step %g diverged: %s", step, error)
            continue
        if best is None or result.objectives["last"] < best[1].objectives["last"]:
            best = (step, result)
    if best is None:
        raise SSIGDError("every step of steps diverged; expected at least one that is small enough")
    return best


EXPERIMENTS: dict[str, Callable[..., Report]] = {"convex": convex, "nonconvex": nonconvex, "dsblo": dsblo}


def run_experiment(config: dict[str, Any]) -> Report:
    """Run the experiment that `config["experiment"]` names with the other keys as its arguments.

    Raises:
        SSIGDError: the experiment or a key is unknown, or a key is missing.
    """
    arguments = dict(config)
    name = arguments.pop("experiment", None)
    if name not in EXPERIMENTS:
        raise SSIGDError(f"experiment={name!r} is unknown; expected one of {tuple(EXPERIMENTS)}")
    run = EXPERIMENTS[name]
    expected = set(run.__annotations__) - {"return"}
    if set(arguments) != expected:
        wrong = sorted(set(arguments) ^ expected)
        raise SSIGDError(f"keys {wrong} are unknown to or missing for experiment={name!r}; expected {sorted(expected)}")
    for key in sorted(expected):
        if str(run.__annotations__[key]).startswith("list") and not isinstance(arguments[key], list):
            raise SSIGDError(f"{key}={arguments[key]!r} is not a list; expected for example [{arguments[key]}]")
    report = run(**arguments)
    report.summary.update(config=config, versions=versions(), device="cpu")
    return report


def _progress(items: list[Any], label: str) -> Any:
    return tqdm(items, desc=label, leave=False)
