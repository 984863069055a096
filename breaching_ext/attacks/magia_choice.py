"""From MAGIA's candidates to one reconstruction. The ground truth plays no part in it.

Labels are optimised beside the images, so every candidate is scored with its own, and candidates agree on images only
up to their order within the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..matching.candidate_order import aligned_to
from .candidate_choice import Target


class MagiaChoice:
    """The part of MAGIA that chooses; it expects the joint attack beside it."""

    cfg: Any
    _select_optimal_reconstruction: Callable[..., torch.Tensor]
    _consensus: Callable[[torch.Tensor], torch.Tensor]
    _score_candidates: Callable[..., torch.Tensor]
    _score_trial: Callable[..., torch.Tensor]
    _count_alignments: Callable[[dict[str, Any]], None]
    _alignments: list[int]

    def _finish(
        self, candidates: torch.Tensor, probabilities: torch.Tensor, target: Target, stats: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Score with each candidate's own labels, and choose; the ground truth plays no part in it."""
        never = [n for n, step in stats.get("candidate_failures", {}).items() if step == 0]  # still at their start
        self._alignments = [0, 0]
        scores = self._scores(candidates, probabilities, target, never)
        best = int(scores.argmin())
        data = self._select_optimal_reconstruction(list(candidates), scores, stats)
        chosen = probabilities[best]
        finite = [n for n in range(len(candidates)) if bool(scores[n].isfinite())]
        if finite and self.cfg.restarts.get("output", "best") == "consensus":
            orders = {n: aligned_to(candidates[best], candidates[n]) for n in finite}
            data = self._consensus(torch.stack([candidates[n][orders[n]] for n in finite]))
            chosen = torch.stack([probabilities[n][orders[n]] for n in finite]).mean(dim=0)
        self._count_alignments(stats)
        return {
            "data": data,
            "labels": chosen.argmax(dim=-1),
            "label_probabilities": chosen,
            "candidates": candidates,
            "candidate_labels": probabilities.argmax(dim=-1),
            "candidate_scores": scores,
        }

    def _scores(
        self, candidates: torch.Tensor, probabilities: torch.Tensor, target: Target, never: Sequence[int]
    ) -> torch.Tensor:
        if self.cfg.restarts.scoring == "registered-group-regularization":  # in one order: the target's labels are
            return self._score_candidates(candidates, target, never)  # all the same
        scores = [
            torch.as_tensor(self._score_trial(c, p, target.models, target.shared_data)).float().reshape(())
            for c, p in zip(candidates, probabilities, strict=True)
        ]
        stacked = torch.stack(scores).detach().cpu()
        stacked = torch.where(stacked.isfinite(), stacked, float("inf"))
        stacked[list(never)] = float("inf")
        return stacked
