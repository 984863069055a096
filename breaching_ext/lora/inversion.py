"""Invert a gradient with the joint-candidate attack, and measure how far it came."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import open_dict
from torch import nn

from ..attacks import JointCandidateAttacker, observe
from ..data.sample_photos import PHOTOS
from ..errors import BreachingExtError
from ..evaluation import evaluate, to_images
from .case import MEAN, SHAPE, STD, Case
from .decode import cosine
from .observation import Batch, full_gradient, sent_update

__all__ = ["Inversion", "invert"]


@dataclass(frozen=True)
class Inversion:
    """What an attack reached.

    Attributes:
        images: reconstruction (B, C, H, W) in [0, 1], in the client's order.
        psnr, ssim: means over the batch, after one-to-one assignment.
        cosine_matched: cosine of the reconstruction's update to the one that the attack was given.
        cosine_full: cosine of the reconstruction's full gradient to the client's.
        score, seconds, gradient_evaluations: of the attack.
    """

    images: torch.Tensor
    psnr: float
    ssim: float
    cosine_matched: float
    cosine_full: float
    score: float
    seconds: float
    gradient_evaluations: int


def invert(
    case: Case,
    model: nn.Module,
    target: Sequence[torch.Tensor],
    cfg_attack: Any,
    local: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> Inversion:
    """Attack an update of a model; labels are known.

    Args:
        case: the client, for the labels and the evaluation.
        model: the model as the client received it; only parameters that require a gradient are matched.
        target: one tensor for each of them, what the attack matches.
        cfg_attack: an attack config of type joint-candidates; to its seed (0 where it has none) 10,000 times that of
            the case is added, so that all cells of a case start alike.
        local: Breaching's `local_hyperparams` when the target is the change over several steps.
        device: where to run; None is the CPU.

    Raises:
        KeyboardInterrupt: when the attack was interrupted.
        BreachingExtError: when memory ran out.
    """
    setup = {"dtype": getattr(torch, cfg_attack.impl.dtype), "device": device or torch.device("cpu")}
    labels = case.client.labels
    own = copy.deepcopy(model).to(**setup)
    cfg = copy.deepcopy(cfg_attack)
    with open_dict(cfg):
        cfg.restarts.seed = 10_000 * case.seed + (cfg.restarts.get("seed") or 0)
    payload, shared = observe(
        own,
        [tensor.to(**setup) for tensor in target],
        SHAPE,
        len(labels),
        len(PHOTOS),
        labels=labels,
        mean=MEAN,
        std=STD,
        local_hyperparams=None if local is None else dict(local),
    )
    clock = time.perf_counter()
    attacker = JointCandidateAttacker(own, torch.nn.CrossEntropyLoss(), cfg, setup)
    reconstruction, stats = attacker.reconstruct(payload, shared)
    seconds = time.perf_counter() - clock
    if stats.get("out_of_memory"):
        raise BreachingExtError("Memory ran out; valid: a smaller batch, fewer attack.restarts.num_trials.")
    if stats.get("interrupted"):  # the attack hands back its best so far; as a finished cell it would be a wrong number
        raise KeyboardInterrupt

    found = reconstruction["data"].detach().cpu().double()
    images, true = to_images(found, MEAN, STD), to_images(case.client.images, MEAN, STD)
    scores = evaluate(images, true)
    batch = Batch(found, labels)
    there = full_gradient(case.model, case.adapted_layers, batch)
    update = sent_update(model, batch, None if local is None else dict(local))
    return Inversion(
        images=images[scores.order],
        psnr=float(scores.means["psnr"] or 0.0),
        ssim=float(scores.means["ssim"] or 0.0),
        cosine_matched=cosine(update, list(target)),
        cosine_full=cosine(list(there.values()), list(case.gradient.values())),
        score=float(stats["opt_value"]),
        seconds=seconds,
        gradient_evaluations=int(stats["gradient_evaluations"]),
    )
