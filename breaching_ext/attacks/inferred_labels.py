"""Labels that the client did not send: told with its local steps, or inferred by Breaching's strategies and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import SharedDataError, first_line


def labels_of_steps(
    shared_data: Sequence[dict[str, Any]], server_payload: Sequence[dict[str, Any]]
) -> torch.Tensor | None:
    """Return labels (B,), or soft ones (B, K), of images as the client's local steps have them.

    None for a single gradient, and for text.

    Each step's labels are sorted, those beside them are not: image p is matched with the p-th of these.
    """
    about = shared_data[0]["metadata"]
    if not about.get("local_hyperparams") or server_payload[0]["metadata"].get("modality", "vision") != "vision":
        return None
    steps = about["local_hyperparams"]["labels"]  # (b,) each, or (b, K) where they are soft
    told = torch.cat(list(steps))[: about["num_data_points"]]
    return told if len(told) == about["num_data_points"] else None  # a step's data follow those of the step before


def infer_labels(
    infer: Callable[[], torch.Tensor | None],
    shared_data: Sequence[dict[str, Any]],
    server_payload: Sequence[dict[str, Any]],
    strategy: str | None,
) -> torch.Tensor | None:
    """Return labels (B,) for images; text and None come back as they are.

    Several local steps are matched with the labels of every step, so that these are known where the steps are.
    Inferring them from parameters after minus before would be wrong, too: its sign is that of the negative gradient.

    Args:
        infer: Breaching's own recovery.
        shared_data, server_payload: one dict a query.
        strategy: `label_strategy` of the config.

    Raises:
        SharedDataError: where the strategy cannot work with these gradients (most need a last layer with a bias), or
            finds another number of labels than images: bias-corrected takes every class whose bias gradient is below
            zero, which noise on the gradient makes too many.
    """
    images = server_payload[0]["metadata"].get("modality", "vision") == "vision"
    number = shared_data[0]["metadata"]["num_data_points"]
    told = labels_of_steps(shared_data, server_payload)
    if told is not None:
        return told
    if images and strategy == "bias-text":
        raise SharedDataError("label_strategy=bias-text infers the tokens of text; valid for images: yin, random, ...")
    try:
        labels = infer()
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise SharedDataError(
            f"label_strategy={strategy} cannot infer labels here ({first_line(error)}); it needs a last layer "
            "with a bias. Give the labels, or take another strategy."
        ) from error
    classes = server_payload[0]["metadata"].get("classes")
    if images and labels is not None and classes and len(labels) and int(labels.max()) >= classes:
        raise SharedDataError(
            f"label_strategy={strategy} found label {int(labels.max())} of {classes} classes: the last gradients are "
            "not those of the classifying layer. Give the labels, or let that layer come last."
        )
    if images and labels is not None and labels.shape != (number,):
        raise SharedDataError(
            f"label_strategy={strategy} found {labels.shape[0]} labels for {number} images; valid: another one (yin "
            "and random find as many as there are images), or case.user.provide_labels=true."
        )
    return labels
