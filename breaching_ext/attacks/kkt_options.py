"""The keys below `extraction` in an attack config of type kkt, checked; and what is said of where is searched."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

from ..errors import ConfigError
from ..kkt.extraction import ExtractionOptions
from ..kkt.problem import Problem
from ..values import check_number, check_whole, is_whole

log = logging.getLogger(__name__)


def extraction_options(cfg: Any) -> ExtractionOptions:
    """Read the options of the search; `optim.max_iterations` and `optim.optimizer` keep Breaching's names."""
    names = {f.name for f in fields(ExtractionOptions)} - {"steps", "optimizer"}
    known = names | {"candidates", "multiple", "steepness", "span"}
    unknown = set(cfg.extraction) - known
    if unknown:
        raise ConfigError(f"Unknown attack.extraction keys {sorted(unknown)}; valid: {', '.join(sorted(known))}.")
    chosen = {name: cfg.extraction[name] for name in names if name in cfg.extraction}
    return ExtractionOptions(steps=cfg.optim.max_iterations, optimizer=str(cfg.optim.optimizer).lower(), **chosen)


def check_search(extraction: Any) -> None:
    """Check what says how many candidates are searched, and where; raises ConfigError."""
    steepness, span = extraction.steepness, extraction.span
    count, multiple = extraction.candidates, extraction.multiple
    check_number("attack.extraction.steepness", steepness, above=0, may_be_empty=True)
    check_whole("attack.extraction.candidates", count, 1, may_be_empty=True)
    if count is None:
        check_number("attack.extraction.multiple", multiple, above=0)
    if span not in ("auto", "full") and (not is_whole(span) or span < 1):
        raise ConfigError(f"attack.extraction.span={span} is not possible; valid: auto, full, or 1, 2, ...")


def report_span(problem: Problem, number: int, chosen: str | int, count: int) -> None:
    """Say where is searched, and what the first layer's singular values allow.

    Args:
        problem: what was built.
        number: of suspected images.
        chosen: `attack.extraction.span`.
        count: of candidates.
    """
    if problem.span is None:
        auto = "the first layer shows no span of the data" if chosen == "auto" else f"span={chosen}"
        log.info("All pixels are searched: %s.", auto if problem.slack_widths else "the network is no MLP")
        if not problem.slack_widths and chosen not in ("auto", "full"):
            log.warning("attack.extraction.span=%s is not used: only fully connected networks show a span.", chosen)
        if not problem.slack_widths:
            log.info("attack.extraction.slack is not used: only fully connected networks have slacks.")
        return
    values, rank = problem.span.singular_values, problem.span.rank
    cut = chosen != "auto" or rank == count  # as many as there may be images: more may stand above the noise
    shown = ", ".join(f"{v:.3g}" for v in values[: rank + 1].tolist())
    log.info("Singular values of the first layer: %s%s.", shown, "" if cut else " (the last is noise)")
    if rank < number:
        what = f"{rank} directions are searched" if cut else f"The data span only {rank} directions of the first layer"
        log.warning("%s for %d suspected images: at best some of them, or blends, can come back.", what, number)
