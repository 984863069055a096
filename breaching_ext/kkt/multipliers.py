"""How nearly a trained network satisfies the KKT conditions on its own training data."""

from __future__ import annotations

import torch
from torch import Tensor

from .extraction import Extraction, ExtractionOptions
from .models import HomogeneousNetwork
from .problem import build_problem
from .span import span_of_images

#: steepness and number of steps at which the residual of known data is measured
STEEPNESS = 50.0
_STEPS = 400


def kkt_residual(model: HomogeneousNetwork, images: Tensor, labels: Tensor, steepness: float = STEEPNESS) -> float:
    """Return min over λ and slopes of ‖θ − Σ λ_i y_i ∇Φ(x_i)‖² / ‖θ‖² for known images: the attack with x held fixed.

    Args:
        model: the network.
        images: its training images, (n, C, H, W).
        labels: ±1, (n,).
        steepness: of the slopes; units on the kink of the ReLU may have any slope (see the extraction).
    """
    centred = (images - model.mean).flatten(1)
    problem = build_problem(model, steepness, span_of_images(centred) if len(centred) < centred.shape[1] else "full")
    options = ExtractionOptions(steps=_STEPS, lr_lambda=0.02, lr_slack=0.2, lambda_min=0.0, box_weight=0.0)
    starts = problem.coordinates_of(images).unsqueeze(0)  # (1, n, C, H, W)
    search = Extraction(problem, labels.to(starts), starts, options, [torch.Generator().manual_seed(0)], fixed=True)
    found = search.run(progress=False)
    if found.interrupted:  # it ends with the best so far, which is not the residual
        raise KeyboardInterrupt
    return float(found.losses[0])
