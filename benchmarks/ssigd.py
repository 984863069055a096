"""Measure the implicit gradient: speed of all backends, accuracy, margins, bad inputs, batches.

    python benchmarks/ssigd.py            # all of it, about ten minutes on one core
    python benchmarks/ssigd.py --quick    # dimensions up to 20, under a minute

Needs the extra [ssigd]. One run times all backends side by side, interleaved, so that the ratios hold
although the times depend on the machine. Writes results.json, table.md and scaling.png to
benchmarks/results/ssigd (--quick: outputs/ssigd_quick).
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from ssigd_bad_inputs import bad_inputs
from ssigd_references import exact_implicit_part, near_degenerate
from tqdm import tqdm

from breaching_ext.files import write_atomically
from breaching_ext.ssigd import (
    BatchedQP,
    StronglyConvexBilevelProblem,
    batched_implicit_gradient,
    coupling_free_gradient,
    implicit_gradient,
)
from breaching_ext.ssigd.history import versions, write_json
from breaching_ext.ssigd.plots import plot_scaling, save_figure

DIMS = (5, 10, 20, 50, 100, 200)
BATCH = 128
CLARABEL = {"solver": "CLARABEL", "tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}
BACKENDS: dict[str, dict[str, Any]] = {
    "kkt": {"backend": "kkt"},
    "cvxpylayers (tight)": {"backend": "cvxpylayers"},
    "cvxpylayers (default)": {"backend": "cvxpylayers", "solver_args": {}},
    "fd (OSQP)": {"backend": "fd"},
    "fd (Clarabel)": {"backend": "fd", **CLARABEL},
}


def points(problem: StronglyConvexBilevelProblem, count: int, seed: int = 0) -> torch.Tensor:
    """Return random points of X, unrelated to each other, so that warm starts help little, (count, n)."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.uniform(problem.x_lower.numpy(), problem.x_upper.numpy(), (count, problem.dim)))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    value = call()
    return time.perf_counter() - begun, value


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def scaling(dims: list[int]) -> list[dict[str, Any]]:
    """Time a gradient with every backend and in a batch; differences are relative to kkt."""
    return [scaling_row(dim) for dim in tqdm(dims, desc="scaling")]


def scaling_row(dim: int) -> dict[str, Any]:
    problem = StronglyConvexBilevelProblem(dim, seed=0)
    rounds = 7 if dim <= 20 else 3 if dim <= 100 else 2
    x = points(problem, BATCH)
    others = {name: options for name, options in BACKENDS.items() if name != "kkt"}
    seconds: dict[str, list[float]] = {name: [] for name in [*BACKENDS, "batch"]}
    differences: dict[str, list[float]] = {name: [] for name in ["batch", *others]}
    implicit_gradient(problem, x[-1], backend="cvxpylayers")  # compile
    batched_implicit_gradient(problem, x)
    for point in x[:rounds]:
        for name, options in others.items():
            spent, gradient = timed(lambda o=options, p=point: implicit_gradient(problem, p, **o))
            seconds[name].append(spent)
            differences[name].append(relative(gradient, implicit_gradient(problem, point)))
        loop, gradients = timed(lambda: torch.stack([implicit_gradient(problem, p) for p in x]))
        batch, together = timed(lambda: batched_implicit_gradient(problem, x))
        seconds["kkt"].append(loop / BATCH)
        seconds["batch"].append(batch / BATCH)
        differences["batch"].append(relative(together, gradients))
    middle = {name: median(values) for name, values in seconds.items()}
    return {
        "dim": dim,
        "milliseconds": {name: 1e3 * value for name, value in middle.items()},
        "kkt_speedup_over": {name: middle[name] / middle["kkt"] for name in others},
        "batch_speedup_over_loop": middle["kkt"] / middle["batch"],
        "relative_difference_to_kkt": {name: max(values) for name, values in differences.items()},
    }


def accuracy(dims: list[int]) -> list[dict[str, Any]]:
    """Compare kkt to 60-digit arithmetic: the whole gradient, and the implicit part alone."""
    rows = []
    cases = [(c, k, d) for c in (10.0, 1e4, 1e8) for k in ("box", "coupled") for d in dims]
    for condition, kind, dim in tqdm(cases, desc="accuracy"):
        of_gradient, of_part, of_batch, sound, free = [], [], [], True, []
        for seed in range(5 if dim <= 20 else 2):
            problem = StronglyConvexBilevelProblem(dim, seed=seed, constraints=kind, condition=condition)
            x = points(problem, 1, seed)[0]
            active = problem.certified_solution(x).active.tolist()
            reference, right_set = exact_implicit_part(problem, x, active)
            gradient, direct = implicit_gradient(problem, x), coupling_free_gradient(problem, x)
            of_gradient.append(relative(gradient, direct + reference))
            of_part.append(relative(gradient - direct, reference))
            many = points(problem, 32, seed + 100)
            each = torch.stack([implicit_gradient(problem, point) for point in many])
            batch = batched_implicit_gradient(problem, many)
            of_batch.append(float(((batch - each).norm(dim=1) / each.norm(dim=1)).max()))
            free.append(1.0 - len(active) / dim)
            sound = sound and right_set
        rows.append({
            "dim": dim, "constraints": kind, "condition": condition,
            "largest_relative_error": max(of_gradient), "of_the_implicit_part": max(of_part),
            "batch_to_kkt": max(of_batch), "free_share": float(np.mean(free)),
            "active_sets_right": sound,
        })  # fmt: skip
    return rows


def margins(dims: list[int], trials: int = 100) -> list[dict[str, Any]]:
    """Count right active sets where a margin ε alone decides one constraint, known by construction."""
    rows = []
    for margin in tqdm((1e-4, 1e-6, 1e-8, 1e-9, 1e-10), desc="margins"):
        right = batched_right = total = 0
        for dim in dims:
            rng = np.random.default_rng(dim)
            problem = StronglyConvexBilevelProblem(dim, seed=dim)
            batched = BatchedQP(problem.solver)
            for trial in range(trials):
                c, h, expected = near_degenerate(problem.solver, rng, margin, active=trial % 2 == 0)
                total += 1
                right += set(problem.solver.solve(c, h).active.tolist()) == expected
                side = batched.solve(torch.from_numpy(c)[None], torch.from_numpy(h)[None]).side[0].numpy()
                index = np.flatnonzero(side)
                batched_right += set(problem.solver.rows.row_of(index, side[index]).tolist()) == expected
        rows.append({"margin": margin, "trials": total, "right": right, "right_batched": batched_right})
    return rows


def coupling_free(dims: list[int], count: int = 50) -> list[dict[str, Any]]:
    """Measure how wrong ∇ₓf alone is: what remains when the lower level is taken not to contain x."""
    rows = []
    for dim in dims:
        errors, angles = [], []
        for seed in range(5):
            problem = StronglyConvexBilevelProblem(dim, seed=seed)
            for x in points(problem, count // 5, seed):
                exact, free = implicit_gradient(problem, x), coupling_free_gradient(problem, x)
                errors.append(relative(free, exact))
                angles.append(float(torch.cosine_similarity(free, exact, dim=0)))
        uncoupled = StronglyConvexBilevelProblem(dim, seed=0, coupling=0.0)
        x = points(uncoupled, 1)[0]
        implicit = implicit_gradient(uncoupled, x) - coupling_free_gradient(uncoupled, x)
        rows.append({
            "dim": dim, "median_relative_error": median(errors),
            "quartiles": np.quantile(errors, [0.25, 0.75]),
            "largest": max(errors), "share_pointing_uphill": float(np.mean(np.array(angles) < 0)),
            "implicit_part_without_coupling": float(implicit.norm()),
        })  # fmt: skip
    return rows


def table(results: dict[str, Any]) -> str:
    """Format all results as Markdown."""
    parts = ["## Time of a gradient (ms, medians) and how many times faster kkt is", ""]
    names = [name for name in BACKENDS if name != "kkt"]
    parts += [
        f"| dim | kkt | batch of {BATCH}, each | " + " | ".join(names) + " |",
        "| --- " * (3 + len(names)) + "|",
    ]
    for row in results["scaling"]:
        ms, faster = row["milliseconds"], row["kkt_speedup_over"]
        cells = [f"{ms[name]:.3g} ({faster[name]:.0f}×)" for name in names]
        batch = f"{ms['batch']:.3g} ({row['batch_speedup_over_loop']:.1f}×)"
        parts.append(f"| {row['dim']} | {ms['kkt']:.3g} | {batch} | " + " | ".join(cells) + " |")
    for key, title in (
        ("differences", "Largest relative difference to kkt"),
        ("accuracy", "Error against 60-digit arithmetic"),
        ("margins", "Right active sets by margin"), ("bad_inputs", "Bad inputs"),
        ("coupling_free", "Error of the coupling-free gradient"),
    ):  # fmt: skip
        rows = results[key]
        parts += ["", f"## {title}", "", "| " + " | ".join(rows[0]) + " |", "| --- " * len(rows[0]) + "|"]
        parts += ["| " + " | ".join(cell(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(parts) + "\n"


def cell(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return " to ".join(cell(float(item)) for item in value)
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="dimensions up to 20")
    parser.add_argument("--output", type=Path, help="default: results/ssigd; with --quick outputs/ssigd_quick")
    arguments = parser.parse_args()
    usual = Path("outputs/ssigd_quick") if arguments.quick else Path(__file__).parent / "results" / "ssigd"
    arguments.output = arguments.output or usual  # a quick run does not take the place of the whole one
    torch.set_num_threads(1)
    dims = [dim for dim in DIMS if dim <= (20 if arguments.quick else 200)]
    small = [dim for dim in dims if dim <= 50]
    results: dict[str, Any] = {
        "scaling": scaling(dims),
        "accuracy": accuracy(small),
        "margins": margins(small),
    }
    results["differences"] = [{"dim": row["dim"], **row["relative_difference_to_kkt"]} for row in results["scaling"]]
    results |= {"bad_inputs": bad_inputs(), "coupling_free": coupling_free(small)}
    results["versions"] = {**versions(), "python": platform.python_version(), **reference_versions()}
    results["machine"] = {
        "processor": platform.machine(), "cores": os.cpu_count(), "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(), "device": "cpu",
    }  # fmt: skip
    results["seed"] = 0
    write_json(arguments.output / "results.json", results)
    text = table(results)
    write_atomically(arguments.output / "table.md", lambda target: target.write_text(text, encoding="utf-8"))
    times = [row["milliseconds"] for row in results["scaling"]]
    lines = {name: [row[name] for row in times] for name in [*BACKENDS, "batch"]}
    save_figure(plot_scaling(dims, lines, title="Implicit gradient, one core"), arguments.output / "scaling.png")
    print(text)


def reference_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("cvxpy", "cvxpylayers", "osqp", "clarabel", "scs")}


if __name__ == "__main__":
    main()
