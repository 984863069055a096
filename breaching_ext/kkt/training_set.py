"""What a homogeneous network can be trained on: images of its shape and labels ±1."""

from __future__ import annotations

import logging

from torch import Tensor

from ..errors import SharedDataError
from .models import HomogeneousNetwork

log = logging.getLogger(__name__)


def check_training_set(model: HomogeneousNetwork, images: Tensor, labels: Tensor) -> None:
    """Check a training set.

    Raises:
        SharedDataError: naming what does not fit.
    """
    if len(images) == 0:
        raise SharedDataError("n=0 images: there is nothing to train on; valid: 1 or more.")
    if tuple(images.shape[1:]) != model.shape or labels.shape != (len(images),):
        raise SharedDataError(
            f"Images {tuple(images.shape)} with labels {tuple(labels.shape)} do not fit the network; valid: "
            f"(n, {', '.join(map(str, model.shape))}) and (n,)."
        )
    if not bool(images.isfinite().all()):
        raise SharedDataError("The images are not finite; nothing can be trained on them.")
    low, high = float(images.min()), float(images.max())
    if low < -1e-6 or high > 1 + 1e-6:
        log.warning(
            "The images lie in %.3g to %.3g: the attack keeps its candidates near pixels of 0 to 1 "
            "(attack.extraction.box_weight=0 does not), and SSIM supposes them.",
            *(low, high),
        )
    wrong = sorted(set(labels.tolist()) - {-1, 1})
    if wrong:
        raise SharedDataError(f"Labels {wrong} are not valid for the logistic loss; valid: -1 and +1.")
