"""Which engine is fastest here: measured before the loop, compile time against the steps still to do.

Timing is not reproducible, and engines agree to rounding only. So a run of fewer than `SHORT` evaluations does not
measure and follows a fixed rule, and what a longer run decides is kept (:mod:`.choices`).
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .graph_costs import Costs

log = logging.getLogger(__name__)

#: Runs of fewer evaluations than this are over before measuring or recording a graph has paid.
SHORT = 200
#: The same for one candidate, which gains a fifth to a third, where recording and measuring take up to 60 evaluations.
SHORT_ALONE = 300
#: Measuring ends after OF_THE_RUN of it, but not before LEAST_CALLS of each engine, unless they take LEAST_SECONDS.
OF_THE_RUN, LEAST_CALLS, LEAST_SECONDS = 0.003, 3, 2.0
#: Where two engines are so alike that each wins a round, it goes on to this share: a slow minute must not decide.
OF_THE_RUN_IF_ALIKE = 0.01
#: Operations are timed for as much of the run, and for so many seconds at least.
LEAST_OF_OPERATIONS = 0.5
#: `list` is taken where it is faster than the replay by more than what the clock leaves open.
CLEARLY = 0.97
#: What compiling takes from scratch on a machine that traces an operation in TRACING seconds: so many seconds, and
#: so many for each operation of the recorded graph (docs/speed.md).
COMPILING, COMPILING_PER_OPERATION = 12.0, 0.05
TRACING = 0.0013
#: Evaluations that checking a compiled form takes: two, and six more where the start lies beside a kink of the model.
CHECKING = 5
#: A machine is taken as so many times as fast or slow at most.
MOST_DIFFERENT = 4.0
#: What of the shares in `Costs` compiling is expected to save (weights take time to be laid out): with AVX-512, and
#: elsewhere. Fitted on 35 and 33 rows of docs/speed.md; at most MOST_SAVED of an iteration.
SAVED_AVX512: Mapping[str, float] = {"light": 1.0, "large": 0.2, "layout": 0.65, "model": -2.0}
SAVED: Mapping[str, float] = {"light": 0.9, "layout": 1.1, "weights": -1.9}
MOST_SAVED = 0.6
#: Estimates are rough, so compiling is tried where it takes no more than this share of the run.
WORTH_A_TRY = 0.02


@dataclass
class Calibration:
    """How the engine was chosen; becomes `stats["calibration"]` and a part of metrics.json.

    Attributes:
        engine: the engine taken.
        reason: why, in words.
        iterations: how many were still to do.
        step_seconds: engine -> measured seconds for one iteration of all candidates.
        compile_seconds: measured, if the evaluation was compiled.
        expected_compile_seconds: the estimate that the decision went by.
        tracing_seconds: measured, for one operation: how fast this machine is at what compiling mostly is.
        recording_seconds, operations: what recording the graph took, and how many operations it has.
        costs: where the time of a replayed evaluation goes (:class:`.graph_costs.Costs`), by share.
        expected_step_seconds: what a compiled iteration was expected to take, from these.
    """

    engine: str
    reason: str
    iterations: int
    step_seconds: dict[str, float] = field(default_factory=dict)
    compile_seconds: float | None = None
    expected_compile_seconds: float | None = None
    tracing_seconds: float | None = None
    recording_seconds: float | None = None
    operations: int | None = None
    costs: dict[str, float] | None = None
    expected_step_seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for statistics and files."""
        return asdict(self)

    def log(self) -> None:
        """Say the decision in one line."""
        times = ", ".join(f"{name} {1000 * value:.3g} ms" for name, value in self.step_seconds.items())
        detail = f" ({times} a step, {self.iterations} to do)" if times else ""
        log.info("candidate_batching=auto takes %s: %s%s.", self.engine, self.reason, detail)


def seconds(
    functions: Mapping[str, Callable[[], Any]],
    device: torch.device,
    iterations: int,
    aside: Mapping[str, Callable[[], Any]] | None = None,
    repeats: int = 11,
    until_decided: bool = False,
) -> dict[str, float]:
    """Return each function's seconds, from several calls after one to warm up; random numbers are given back.

    They are called in turn, forwards and backwards, because a machine's speed changes while one waits: of the first
    engine the median counts, of the others the median of their ratio to it, round by round. The median, because speed
    changes from call to call, too: the least is that of a lucky moment, which not every function has.

    Args:
        functions: iterations, by engine. The first is what others are compared with.
        device: where they run.
        iterations: how many the run will make, which says how long it may be measured.
        aside: what else is timed in every round; its median counts.
        repeats: most calls of each that count.
        until_decided: whether to go on for longer where neither of two functions wins every round.
    """
    devices = [device] if device.type == "cuda" else []
    everything = {**functions, **(aside or {})}
    times: dict[str, list[float]] = {name: [] for name in everything}
    with torch.random.fork_rng(devices=devices):
        for repeat in range(repeats + 1):
            names = list(everything) if repeat % 2 else list(reversed(everything))
            for name in names:
                start = time.perf_counter()
                everything[name]()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times[name].append(time.perf_counter() - start)
            counted = {name: spent[1:] for name, spent in times.items()}
            first, *others = (counted[name] for name in functions)
            alike = until_decided and not _one_wins(first, *others)
            run = iterations * max(times[name][-1] for name in functions)
            if repeat > 0 and _enough(repeat, sum(sum(spent) for spent in counted.values()), run, alike):
                break
    medians = {name: statistics.median(spent) for name, spent in counted.items()}
    return {**medians, **{name: statistics.median(first) * _ratio(counted[name], first) for name in functions}}


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median over the rounds of one function's time in units of another's."""
    return statistics.median(one / other for one, other in zip(times, others, strict=True))


def _one_wins(times: Sequence[float], others: Sequence[float]) -> bool:
    """Whether the same one of two functions was faster in every round."""
    return len({one < other for one, other in zip(times, others, strict=True)}) < 2


def worth_measuring(iterations: int, step: float) -> float:
    """Return for how many seconds the operations of a run of so many steps, each of `step` seconds, are timed."""
    return max(LEAST_OF_OPERATIONS, OF_THE_RUN * iterations * step)


def _enough(calls: int, spent: float, run: float, alike: bool) -> bool:
    """Whether to stop measuring a run of that many seconds after so many calls of each that took `spent` seconds."""
    share = OF_THE_RUN_IF_ALIKE if alike else OF_THE_RUN
    return spent > share * run and (calls >= LEAST_CALLS or spent > LEAST_SECONDS)


def expected_compile_seconds(operations: int, tracing: float, replayed: float = 0.0) -> float:
    """Return what compiling a graph, and checking it, will take.

    Args:
        operations: of the recorded graph.
        tracing: seconds that tracing an operation takes here, now. A slower machine is slower at both, and so is a
            moment at which other guests of a machine are busy, in which iterations are timed longer, too.
        replayed: seconds of an iteration.
    """
    slowness = min(max(tracing / TRACING, 1 / MOST_DIFFERENT), MOST_DIFFERENT)
    return (COMPILING + COMPILING_PER_OPERATION * operations) * slowness + CHECKING * replayed


def expected_step(replayed: float, costs: Costs, saved: Mapping[str, float]) -> float:
    """Return the seconds that a compiled iteration will take.

    Args:
        replayed: seconds of a replayed one.
        costs: the shares of it that compiling makes smaller, and what it takes in return.
        saved: what of each share is saved (:func:`saved_shares`).
    """
    share = sum(factor * getattr(costs, name) for name, factor in saved.items())
    return replayed * (1 - min(max(share, 0.0), MOST_SAVED))


def saved_shares(device: torch.device) -> Mapping[str, float]:
    """Return what of each share in `Costs` compiling is expected to save on this machine."""
    wide = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return SAVED_AVX512 if wide else SAVED


def compiling_may_pay(steps: Mapping[str, float], iterations: int, expected_compile: float) -> bool:
    """Whether compiling pays if it saves as much as it ever does; arguments as in :func:`compiling_pays`."""
    return compiling_pays(steps, (1 - MOST_SAVED) * min(steps.values()), iterations, expected_compile)


def compiling_pays(steps: Mapping[str, float], compiled: float, iterations: int, expected_compile: float) -> bool:
    """Whether compiling is expected to save more than it takes, or takes so little of the run that it is tried.

    Args:
        steps: engine -> seconds an iteration.
        compiled: seconds that a compiled iteration is expected to take.
        iterations: how many there are to do.
        expected_compile: seconds that compiling is expected to take.
    """
    best = min(steps.values())
    return max(best - compiled, WORTH_A_TRY * best) * iterations > expected_compile
