"""What the attack on weights is given, checked: the released network, the candidates' labels, a start of the images."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, SharedDataError
from ..kkt.candidates import candidate_labels, signs
from ..kkt.models import HomogeneousNetwork, SmoothBackwardReLU
from ..kkt.problem import Problem
from ..values import is_whole

log = logging.getLogger(__name__)


def released_network(
    template: HomogeneousNetwork, payload: dict[str, Any], shared: dict[str, Any], setup: dict[str, Any]
) -> HomogeneousNetwork:
    """Return a copy of the network with the released weights, and with the buffers where some were released.

    Args:
        template: the network; it is not changed.
        payload: the server's `parameters` and `buffers`.
        shared: the same of the user's, which take their place where they are there.
        setup: dict(dtype=..., device=...).

    Raises:
        SharedDataError: for weights or buffers that do not fit the network, or are not finite.
        ConfigError: for a network of several outputs.
    """
    model = copy.deepcopy(template).to(**setup)
    _fill("weights", list(model.parameters()), shared.get("parameters") or payload["parameters"])
    buffers = shared.get("buffers") or payload.get("buffers")
    if buffers:
        _fill("buffers", list(model.buffers()), buffers)
    with torch.no_grad():
        shape = tuple(model(torch.zeros(1, *model.shape, **setup)).shape)
    if shape != (1, 1):
        raise ConfigError(f"The network's output for one image has shape {shape}; attack=kkt needs (1, 1).")
    return model.requires_grad_(False)


def _fill(what: str, own: Sequence[Tensor], released: Iterable[Any]) -> None:
    released = list(released)
    kinds = sorted({type(tensor).__name__ for tensor in released if not isinstance(tensor, Tensor)})
    if kinds:
        raise SharedDataError(f"The released {what} hold values of type {', '.join(kinds)}; valid: tensors.")
    shapes, needed = ([tuple(tensor.shape) for tensor in tensors] for tensors in (released, own))
    if shapes != needed:
        raise SharedDataError(f"The released {what} have shapes {shapes}, the network needs {needed}.")
    with torch.no_grad():
        for mine, tensor in zip(own, released, strict=True):
            mine.copy_(tensor)
    if not all(bool(tensor.isfinite().all()) for tensor in own):
        raise SharedDataError(f"The released {what} are not finite; nothing can be reconstructed from them.")


def report_slopes(model: HomogeneousNetwork, steepness: float | None, slack: float) -> None:
    """Say which settings of the slopes are not used: a plain ReLU has no slacks, other activations no steepness."""
    if steepness is None and slack:
        log.info("attack.extraction.slack=%g is not used: the plain ReLU (steepness=null) has slopes 0 and 1.", slack)
    if steepness is not None and not any(isinstance(module, SmoothBackwardReLU) for module in model.modules()):
        log.warning("attack.extraction.steepness=%s has no effect: the network has no SmoothBackwardReLU.", steepness)


def labels_of_candidates(extraction: Any, metadata: Any) -> Tensor:
    """Return ±1 of the k candidates, (k,), by `extraction.candidate_labels`, `candidates` and `multiple`.

    Args:
        extraction: the config's part, checked.
        metadata: `num_data_points`, the suspected number n of images; and `labels`, (n,), where they are known: these
            are repeated where k is a multiple of n, else the candidates have them in that proportion.

    Raises:
        SharedDataError: for no number of images, or labels that are not n times one of two.
        ConfigError: where there is no candidate.
    """
    number, chosen = metadata.get("num_data_points"), extraction.get("candidate_labels", "auto")
    if not is_whole(number) or number < 1:
        raise SharedDataError(f"metadata['num_data_points']={number}: how many images are suspected? Valid: 1, 2, ...")
    if not isinstance(chosen, str):
        labels = signs(list(chosen))
        assert labels is not None
        return labels
    count = extraction.candidates
    if count is None:
        count = round(number * extraction.multiple)
        if count < 1:
            raise ConfigError(
                f"attack.extraction.multiple={extraction.multiple} of {number} images is no candidate; valid: 1, 2."
            )
    known = metadata.get("labels") if chosen == "auto" else None
    if known is None:
        return candidate_labels(count)
    labels = signs(known)
    if labels is None or len(labels) != number:
        shown = known.tolist() if isinstance(known, Tensor) else known  # in one line
        raise SharedDataError(
            f"metadata['labels']={shown} are no labels of {number} images in two classes; valid: {number} times 0 or 1."
        )
    repeats, rest = divmod(count, number)
    return candidate_labels(count, labels) if rest else labels.repeat(repeats)  # in their order: see `start_of`


def start_of(initial: Tensor, problem: Problem, starts: Tensor) -> Tensor:
    """Return the coordinates (R, k, ...) of images from which the user wants to start.

    Args:
        initial: images (m, C, H, W) with m ≤ k for all restarts, or (R, m, C, H, W); where m < k they are taken again
            in turn, so that n of k = 2n start once with each label, and where labels are known each with its own.
        problem: the search's.
        starts: coordinates (R, k, ...) that it would have without.

    Raises:
        SharedDataError: for images of another shape, or more of them than candidates, or such that are not finite.
    """
    restarts, count = starts.shape[:2]
    image = tuple(problem.mean.shape)
    fits = tuple(initial.shape[-3:]) == image and initial.ndim in (4, 5) and 1 <= initial.shape[-4] <= count
    if not fits or (initial.ndim == 5 and len(initial) != restarts):
        few = f"m from 1 to {count} (the candidates)"
        raise SharedDataError(
            f"initial_data has shape {tuple(initial.shape)}; valid: (m, {', '.join(map(str, image))}) or ({restarts}, "
            f"m, {', '.join(map(str, image))}) with {few}."
        )
    if not bool(torch.isfinite(initial).all()):
        raise SharedDataError("initial_data is not finite.")
    given = initial.to(problem.mean).expand(restarts, *initial.shape[-4:])
    rows = torch.arange(count, device=given.device) % given.shape[1]
    return problem.coordinates_of(given[:, rows])
