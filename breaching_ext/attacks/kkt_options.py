"""The keys below `extraction` in an attack config of type kkt, checked; and what is said of where is searched."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

from ..errors import ConfigError
from ..kkt.candidates import signs
from ..kkt.extraction import ExtractionOptions
from ..kkt.models import HomogeneousNetwork, is_plain_mlp
from ..kkt.problem import Problem
from ..values import check_number, check_whole, is_whole
from .checks import check_impl

log = logging.getLogger(__name__)

#: what `extraction.candidate_labels` may be, beside a list
LABELLINGS = ("auto", "balanced")
#: floating types in which the steps of a search are not lost to rounding
PRECISIONS = ("float", "float32", "double", "float64")


def extraction_options(cfg: Any) -> ExtractionOptions:
    """Read the options of the search; `optim.max_iterations` and `optim.optimizer` keep Breaching's names."""
    names = {f.name for f in fields(ExtractionOptions)} - {"steps", "optimizer"}
    known = names | {"candidates", "multiple", "candidate_labels", "steepness", "span"}
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
    _check_labels(extraction.get("candidate_labels", "auto"), count)
    if span not in ("auto", "full") and (not is_whole(span) or span < 1):
        raise ConfigError(f"attack.extraction.span={span} is not possible; valid: auto, full, or 1, 2, ...")


def _check_labels(chosen: Any, count: int | None) -> None:
    if isinstance(chosen, str) and chosen in LABELLINGS:
        return
    labels = None if chosen is None or isinstance(chosen, str) else signs(list(chosen))
    if labels is None or not len(labels):
        raise ConfigError(
            f"attack.extraction.candidate_labels={chosen} is not possible; valid: {', '.join(LABELLINGS)}, or a list "
            "of 1 and -1."
        )
    if count not in (None, len(labels)):
        raise ConfigError(
            f"attack.extraction.candidates={count} does not fit the {len(labels)} candidate_labels; valid: empty, or "
            f"{len(labels)}."
        )


def check_precision(impl: Any) -> None:
    """Check `impl`; raises ConfigError, also for a type in which the search cannot go on."""
    check_impl(impl)
    if str(impl.dtype) not in PRECISIONS:
        raise ConfigError(
            f"attack.impl.dtype={impl.dtype} is not possible for kkt, whose steps it would round away; valid: float, "
            "double. The released weights may have any type."
        )


def check_span(span: str | int, model: HomogeneousNetwork) -> None:
    """Raise ConfigError for more singular vectors than the first layer has."""
    if is_whole(span) and is_plain_mlp(model):
        most = min(model.linears[0][0].shape)
        if span > most:
            raise ConfigError(f"attack.extraction.span={span} is not possible; valid: auto, full, or 1 to {most}.")


def report_span(problem: Problem, number: int, chosen: str | int, count: int) -> None:
    """Say where is searched, and what the first layer's singular values allow.

    Args:
        problem: what was built.
        number: of suspected images.
        chosen: `attack.extraction.span`.
        count: of candidates.
    """
    if problem.span is None:
        auto = f"the first layer does not show the span of {number} images" if chosen == "auto" else f"span={chosen}"
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
