"""The methods that `magia_study.py` compares, and the runs that it plans."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from breaching_ext.matching.magia_engine import Annealing, OptimizerOptions, Pyramid, Schedule
from breaching_ext.matching.subset_matching import SubsetTerm
from breaching_ext.selection import MODES

#: budgets in outer steps of 20 full-batch gradients: of the runs at full length, and of the comparison of all methods
FULL = 300
SHORT = {4: 60, 8: 60, 16: 60, 32: 40, 64: 30}
INNER = 20


@dataclass(frozen=True)
class Arm:
    """One method. The defaults of the fields are the shipped default of `config/attack/magia.yaml`."""

    text: str
    start: str = "grey"  # grey: uniform in 0.4 … 0.6; randn: DLG's standard normal
    prior: str = "color"  # color | anisotropic
    chroma: float = 5.0
    annealing: Annealing = field(default_factory=lambda: Annealing(0.001, 3.0))
    term: SubsetTerm = field(default_factory=SubsetTerm)
    schedule: Schedule = field(default_factory=Schedule)
    options: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(line_search="strong_wolfe"))
    pyramid: Pyramid = field(default_factory=Pyramid)
    candidates: int = 1  # more: each gets its share of the budget, and their pixel mean is the result


PLAIN = Pyramid((1,), ())
WOLFE = functools.partial(OptimizerOptions, line_search="strong_wolfe")
DEFAULT = Arm("shipped default: grey start, coarse to fine, annealed colour TV, strong-Wolfe L-BFGS, no subset term")
BASELINE = Arm(
    "DLG + annealed TV from grey",
    prior="anisotropic",
    annealing=Annealing(0.002, 0.1),
    options=OptimizerOptions(label_scale=1.0),
    pyramid=PLAIN,
)


def subset(kind: str, mode: str = "constk", alpha: float = 0.999) -> dict[str, Any]:
    return {"term": SubsetTerm(kind, alpha), "schedule": Schedule(mode)}


ARMS: dict[str, Arm] = {
    "default": DEFAULT,
    "baseline": BASELINE,
    "dlg": replace(BASELINE, text="DLG: randn start, no prior", start="randn", annealing=Annealing(0.0)),
    "dlg-tv": replace(BASELINE, text="DLG + constant TV from grey", annealing=Annealing(0.005)),
    "baseline-randn": replace(BASELINE, text="baseline from randn", start="randn"),
    "baseline-adam": replace(
        BASELINE, text="baseline with Adam", options=OptimizerOptions("adam", 0.05, label_scale=1.0)
    ),
    "released": replace(BASELINE, text="baseline + released subset term, S = 2", **subset("released")),
    "mean": replace(BASELINE, text="baseline + subset mean term, S = 2", **subset("mean")),
    "residual": replace(BASELINE, text="baseline + residual subset term, S = 2", **subset("residual")),
    "default-residual": replace(DEFAULT, text="default + residual subset term, S = 2", **subset("residual")),
    "default-released": replace(DEFAULT, text="default + released subset term, S = 2", **subset("released")),
    "default-mean": replace(DEFAULT, text="default + subset mean term, S = 2", **subset("mean")),
    "default-residual-half": replace(DEFAULT, text="same, α = 0.5", **subset("residual", alpha=0.5)),
    "default-randn": replace(DEFAULT, text="default from randn", start="randn"),
    "default-coarse": replace(DEFAULT, text="default, prior down to 0.02 only", annealing=Annealing(0.02, 3.0)),
    "default-one-grid": replace(DEFAULT, text="default on one grid", pyramid=PLAIN),
    "default-label1": replace(DEFAULT, text="default, logits not scaled", options=WOLFE(label_scale=1.0)),
    "default-aniso": replace(
        DEFAULT, text="default, per-channel TV", prior="anisotropic", annealing=BASELINE.annealing
    ),
    "default-constant": replace(DEFAULT, text="default, prior not annealed", annealing=Annealing(0.001)),
    "default-chroma1": replace(DEFAULT, text="default, colours weighted like brightness", chroma=1.0),
    "default-history10": replace(DEFAULT, text="default, history 10", options=WOLFE(history_size=10)),
    "default-fixed-step": replace(DEFAULT, text="default without line search", options=OptimizerOptions()),
    "default-adam": replace(DEFAULT, text="default with Adam", options=OptimizerOptions("adam", 0.05)),
    "default-consensus3": replace(DEFAULT, text="default, mean of 3 candidates at a third of the budget", candidates=3),
    **{
        f"schedule-{mode}": replace(DEFAULT, text=f"default + residual term, {mode}", **subset("residual", mode))
        for mode in MODES
    },
}


@dataclass(frozen=True)
class Run:
    """One entry of the study: an arm at a batch size and a length (outer steps of 20 full gradients)."""

    arm: str
    batch: int
    outer: int
    seeds: tuple[int, ...]

    def path(self, out: Path, seed: int) -> Path:
        return out / "runs" / f"{self.arm}_B{self.batch}_{self.outer}x{INNER}_seed{seed}.json"


def plan() -> list[Run]:
    """All runs, the most telling ones first."""

    def runs(arms: list[str], batches: list[int], length: dict[int, int] | int) -> list[Run]:
        at = length if isinstance(length, dict) else dict.fromkeys(batches, length)
        return [Run(a, b, at[b], tuple(range(3 if b == 64 else 5))) for b in batches for a in arms]

    every = [8, 16, 64, 32, 4]
    schedules = [name for name in ARMS if name.startswith("schedule")]
    methods = ["default", "baseline", "dlg", "dlg-tv", "released", "mean", "residual"]
    ablation = [name for name in ARMS if name.startswith(("default-", "baseline-"))]
    return [
        *runs(["default"], every, FULL),
        *runs(methods, every, SHORT),
        *runs([*schedules, "default-adam", "baseline-adam"], [16], SHORT),
        *runs(["baseline"], every, FULL),
        *runs(ablation, [8], SHORT),
        *runs(methods, [8, 4], FULL),
    ]
