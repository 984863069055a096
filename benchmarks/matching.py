"""Breaching's sequential loop against our engines on the same gradients, interleaved in one process.

    python benchmarks/matching.py                                                    # every row that is not there yet
    python benchmarks/matching.py --models lenet_zhu --batch-sizes 1 4 --candidates 8 --again
    python benchmarks/matching.py --models lenet_zhu --batch-sizes 1 --candidates 8 --total 2000   # run to the end
    python benchmarks/matching.py --models lenet_zhu --growth                        # time and memory against N

A row is a model, a batch size B and a number of candidates N. All engines get the same gradient, config and starts and
are timed in turn, round after round; ratios are of medians, Breaching's `_run_trial` being 1. Compilation starts with
an empty cache. Rows are added to results.json, so that a long table can be measured in pieces; table.md and the plots
are drawn from it every time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import breaching
import torch
from breaching.attacks.optimization_based_attack import OptimizationBasedAttacker
from machine import describe_machine, flops, matmul_rate, operation_shares, peak_rss
from matching_report import KEYS, load_rows, save_report
from omegaconf import open_dict

from breaching_ext.attacks import JointCandidateAttacker
from breaching_ext.attacks.joint_candidates import Target
from breaching_ext.attacks.joint_loop import JointLoop
from breaching_ext.matching.build import BuiltEngine, EngineParts, choose_engine
from breaching_ext.registration import register
from breaching_ext.run import seed_everything

ENGINES = ("list", "vmap", "compile")
RUN = 2000  # iterations of the run whose total time is stated


class Case:
    """One gradient, Breaching's attacker and ours.

    Args:
        model, batch, candidates: the row.
        iterations: iterations of one timed round.
        device: where it runs.
    """

    def __init__(self, model: str, batch: int, candidates: int, iterations: int, device: torch.device) -> None:
        overrides = [
            "case=sample_photos",
            "attack=joint_candidates",
            f"case.model={model}",
            f"case.user.num_data_points={batch}",
            f"attack.restarts.num_trials={candidates}",
            f"attack.optim.max_iterations={iterations}",
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
        self.iterations, self.candidates, self.device = iterations, candidates, device
        self.ours = JointCandidateAttacker(net, loss_fn, cfg.attack, setup)
        with open_dict(cfg.attack):
            plain = cfg.attack.copy()
            del plain.regularization.group_regularization
        self.theirs = OptimizationBasedAttacker(net, loss_fn, plain, setup)
        self._their_target = self.theirs.prepare_attack(self.payload, self.shared)[:2]
        models, labels, _ = self.ours.prepare_attack(self.payload, self.shared)
        self.target = Target(models, self.shared, labels, [batch, *self.ours.data_shape])
        self.ours.objective.initialize(self.ours.loss_fn, self.ours.cfg.impl, None)

    def breaching_trial(self) -> int:
        """Run one of Breaching's trials; returns its candidate-iterations."""
        models, labels = self._their_target
        self.theirs._run_trial(models, self.shared, labels, defaultdict(list), 0)
        return self.iterations

    def parts(self, evaluations: int = RUN) -> EngineParts:
        """Return what an engine is built from, for a run of that many evaluations."""
        streams = self.ours._streams()
        parts = self.ours._engine_parts(self.target, self.ours._starts(self.target, streams, None), streams)
        parts.evaluations, parts.identity = evaluations, None  # nothing is remembered between rows
        return parts

    def build(self, mode: str) -> tuple[BuiltEngine, float]:
        """Return an engine, ready to step, and the seconds that choosing, recording and compiling took."""
        start = time.perf_counter()
        built = choose_engine(mode, self.parts())
        if hasattr(built.engine, "evaluation"):
            built.engine.evaluation(*built.engine.parameters)
        return built, time.perf_counter() - start

    def joint_run(self, built: BuiltEngine) -> Callable[[], int]:
        """Return a function that runs some iterations and returns their candidate-iterations."""

        def run() -> int:
            JointLoop(built.engine, self.ours.cfg, self.ours._box()).run()
            return self.iterations * self.candidates

        return run

    def agreement(self, built: BuiltEngine) -> float | None:
        """Return the largest relative difference of a candidate's gradient from Breaching's."""
        if not hasattr(built.engine, "evaluation"):
            return None  # Breaching's own closure
        parts = self.parts()
        (gradients, *_), _, _ = built.engine.evaluation(*parts.starts)
        worst = 0.0
        for start, gradient in zip(parts.starts[0], gradients, strict=True):
            _, (expected,) = parts.reference([start])
            worst = max(worst, ((gradient - expected).norm() / expected.norm()).item())
        return worst

    def sensitivity(self, draws: int = 3) -> float:
        """Return how much Breaching's own gradient moves at most when every pixel moves by one rounding.

        Beside a kink of the model (ReLU) no two orders of summation agree; this says how far they may differ.
        """
        parts, worst = self.parts(), 0.0
        for start in parts.starts[0]:
            _, (expected,) = parts.reference([start])
            for draw in range(draws):
                generator = torch.Generator().manual_seed(draw)
                signs = torch.randint(0, 2, start.shape, generator=generator).to(start) * 2 - 1
                _, (moved,) = parts.reference([start * (1 + torch.finfo(start.dtype).eps * signs)])
                worst = max(worst, ((moved - expected).norm() / expected.norm()).item())
        return worst


def timed(runner: Callable[[], int]) -> float:
    """Return the seconds a candidate-iteration of one call."""
    start = time.perf_counter()
    steps = runner()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def measure_row(model: str, batch: int, candidates: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return one row: times, memory, agreement and what `auto` does."""
    with fresh_caches():
        case = Case(model, batch, candidates, args.iterations, args.device)
        built, setup, runners = {}, {}, {"breaching": case.breaching_trial}
        auto, auto_seconds = case.build("auto")
        for name in args.engines:
            built[name], setup[name] = case.build(name)
            if built[name].engine.name != name:
                del built[name]
                continue
            runners[name] = case.joint_run(built[name])
        if "compile" in built:
            cold = auto.calibration.compile_seconds if auto.calibration else None
            if cold is None:
                cold = setup["compile"]
                torch._dynamo.reset()
                _, setup["compile_again"] = case.build("compile")
            else:  # auto compiled first, so the second was from the cache on disk
                setup["compile"], setup["compile_again"] = cold, setup["compile"]
        times, memory = defaultdict(list), {}
        for name, runner in runners.items():
            memory[name] = peak_rss(runner, args.device)  # the first call, which also warms up
        for _ in range(args.rounds):
            for name, runner in runners.items():
                times[name].append(timed(runner))
        row: dict[str, Any] = dict(zip(KEYS, (model, batch, candidates, str(args.device), args.threads), strict=True))
        row["ms"] = {name: 1000 * statistics.median(values) for name, values in times.items()}
        row["ms_all"] = {name: [round(1000 * v, 4) for v in values] for name, values in times.items()}
        row["setup_seconds"], row["peak_rss_bytes"] = setup, memory
        row["bytes_per_candidate"] = auto.memory.per_candidate
        row["gradient_difference"] = {name: case.agreement(engine) for name, engine in built.items()}
        row["breaching_rounding"] = case.sensitivity()
        row["auto"] = {"engine": auto.engine.name, "seconds": auto_seconds}
        row["auto"]["calibration"] = auto.calibration.as_dict() if auto.calibration else None
        if "vmap" in built:
            row["profile"] = profile(case, built, row["ms"], args.device)
        row["load"] = os.getloadavg()[0]
        return row


def profile(case: Case, built: dict[str, BuiltEngine], ms: dict[str, float], device: torch.device) -> dict[str, Any]:
    """Say where a step's time goes: arithmetic at the machine's rate, the evaluation, and the rest of the step."""
    stacks = case.parts().starts
    found: dict[str, Any] = {"matmul_gflops": matmul_rate(device)}
    found["gflop_per_step"] = flops(lambda: built["vmap"].engine.evaluation(*stacks)) / 1e9
    found["ms_at_matmul_rate"] = 1000 * found["gflop_per_step"] / found["matmul_gflops"]
    for name in ("vmap", "compile"):
        if name in built:
            evaluation = built[name].engine.evaluation
            spent = [timed(lambda evaluation=evaluation: len(evaluation(*stacks)[1])) for _ in range(7)]
            found[f"evaluation_share_{name}"] = 1000 * statistics.median(spent) / ms[name]
    found["operations"] = built["vmap"].engine.evaluation.operations
    found["operation_shares"] = operation_shares(lambda: built["vmap"].engine.evaluation(*stacks))
    return found


def measure_total(model: str, batch: int, candidates: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run everything to the end, compilation included, and return the seconds."""
    seconds: dict[str, Any] = {"iterations": args.total, "candidates": candidates}
    with fresh_caches():
        case = Case(model, batch, candidates, args.total, args.device)
        for name in ("compile", "auto", "vmap"):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=os.environ["BREACHING_EXT_CACHE"])
            torch._dynamo.reset()
            start = time.perf_counter()
            built, _ = case.build(name)
            case.joint_run(built)()
            seconds[name] = time.perf_counter() - start
            seconds[f"{name}_engine"] = built.engine.name
        start = time.perf_counter()
        for _ in range(candidates):
            case.breaching_trial()
        seconds["breaching"] = time.perf_counter() - start
    return seconds


def measure_growth(model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return time and memory of the vmap engine against N, in one stack and in chunks of 8 candidates."""
    points = []
    for candidates in (1, 2, 4, 8, 16, 32, 64):
        for chunk in (None, 8):
            case = Case(model, 1, candidates, args.iterations, args.device)
            built, _ = case.build("vmap")
            built.engine.evaluation.chunk = chunk
            runner = case.joint_run(built)
            runner()  # records the graph of a chunk
            memory = peak_rss(runner, args.device)
            spent = statistics.median(timed(runner) for _ in range(3))
            points.append({"model": model, "candidates": candidates, "chunk": chunk, "peak_rss_bytes": memory})
            points[-1]["ms"] = 1000 * spent
    return points


@contextlib.contextmanager
def fresh_caches() -> Any:
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


def main() -> None:
    """Measure the rows that are asked for and not there, and draw the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lenet_zhu", "cnn6", "ConvNet", "ResNet20", "ResNet18"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--iterations", type=int, default=10, help="iterations of one timed round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--total", type=int, help="instead: run to the end with that many iterations")
    parser.add_argument("--growth", action="store_true", help="instead: time and memory against N")
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "matching")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    register()
    content = load_rows(args.out)
    content["machine"] = describe_machine(args.device, args.threads)
    for model in args.models:
        if args.growth:
            others = [p for p in content["growth"] if p["model"] != model]
            content["growth"] = others + measure_growth(model, args)
            save_report(content, args.out)
            continue
        for batch in args.batch_sizes:
            for candidates in args.candidates:
                key = dict(zip(KEYS, (model, batch, candidates, str(args.device), args.threads), strict=True))
                known = [row for row in content["rows"] if {k: row[k] for k in KEYS} == key]
                if args.total:
                    total = measure_total(model, batch, candidates, args)
                    content["totals"] = [t for t in content["totals"] if {k: t[k] for k in KEYS} != key]
                    content["totals"].append({**key, **total})
                elif args.again or not known:
                    content["rows"] = [row for row in content["rows"] if row not in known]
                    content["rows"].append(measure_row(model, batch, candidates, args))
                print(save_report(content, args.out), flush=True)


if __name__ == "__main__":
    main()
