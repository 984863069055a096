"""From MAGIA's candidates to one reconstruction. The ground truth plays no part in it.

Labels are optimised beside the images, so every candidate is scored with its own, and candidates agree on images only
up to their order within the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..matching.candidate_order import aligned_to
from .candidate_choice import Target, never_left_their_start


class MagiaChoice:
    """The part of MAGIA that chooses; it expects the joint attack beside it."""

    cfg: Any
    _select_optimal_reconstruction: Callable[..., torch.Tensor]
    _consensus: Callable[[torch.Tensor, dict[str, Any]], torch.Tensor]
    _score_candidates: Callable[..., torch.Tensor]
    _score_trial: Callable[..., torch.Tensor]

    def _finish(
        self, candidates: torch.Tensor, probabilities: torch.Tensor, target: Target, stats: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Score with each candidate's own labels, and choose; the ground truth plays no part in it."""
        scores = self._scores(candidates, probabilities, target, stats)
        best = int(scores.argmin())
        data = self._select_optimal_reconstruction(list(candidates), scores, stats)
        chosen = probabilities[best]
        finite = [n for n in range(len(candidates)) if bool(scores[n].isfinite())]
        if finite and self.cfg.restarts.get("output", "best") == "consensus":
            orders = {n: aligned_to(candidates[best], candidates[n]) for n in finite}
            data = self._consensus(torch.stack([candidates[n][orders[n]] for n in finite]), stats)
            chosen = torch.stack([probabilities[n][orders[n]] for n in finite]).mean(dim=0)
        return {
            "data": data,
            "labels": chosen.argmax(dim=-1),
            "label_probabilities": chosen,
            "candidates": candidates,
            "candidate_labels": probabilities.argmax(dim=-1),
            "candidate_scores": scores,
        }

    def _scores(
        self, candidates: torch.Tensor, probabilities: torch.Tensor, target: Target, stats: dict[str, Any]
    ) -> torch.Tensor:
        if self.cfg.restarts.scoring == "registered-group-regularization":  # in one order: the target's labels are
            return self._score_candidates(candidates, target, stats)  # all the same
        scores = [
            torch.as_tensor(self._score_trial(c, p, target.models, target.shared_data)).float().reshape(())
            for c, p in zip(candidates, probabilities, strict=True)
        ]
        stacked = torch.stack(scores).detach().cpu()
        stacked = torch.where(stacked.isfinite(), stacked, float("inf"))
        stacked[never_left_their_start(stats)] = float("inf")
        return stacked
