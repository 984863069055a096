"""From candidates to one reconstruction: scores, selection, consensus. The ground truth plays no part in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from breaching.attacks.auxiliaries.objectives import CosineSimilarity, Euclidean

from ..matching.candidate_order import aligned_within, interchangeable
from ..matching.randomness import CandidateStreams
from ..ranks import current as ranks_of_run
from ..regularizers import AnyChannelTotalVariation, GroupRegularization, registered_consensus
from .candidate_objective import match_only_trainable


class Target(NamedTuple):
    """What is attacked: one model and one set of shared data a query, the labels, and the shape (B, C, H, W)."""

    models: list[torch.nn.Module]
    shared_data: list[dict]
    labels: torch.Tensor
    shape: list[int]

    @property
    def local_hyperparams(self) -> Any:
        """Breaching's description of a client's local steps, None for a single gradient."""
        return self.shared_data[0]["metadata"]["local_hyperparams"]


def never_left_their_start(stats: dict) -> list[int]:
    """Return the candidates that never were evaluated to a finite number."""
    return [n for n, step in stats.get("candidate_failures", {}).items() if step == 0]


class CandidateChoice:
    """The part of the joint attack that chooses; it expects Breaching's attacker beside it."""

    cfg: Any
    setup: dict[str, Any]
    loss_fn: Callable[..., torch.Tensor]
    dm: torch.Tensor
    ds: torch.Tensor
    regularizers: list[Any]
    _select_optimal_reconstruction: Callable[..., torch.Tensor]
    _seed: Callable[[], int]

    @property
    def group(self) -> GroupRegularization | None:
        """The group term, if the config has one."""
        return next((r for r in self.regularizers if isinstance(r, GroupRegularization)), None)

    def _box(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return (-self.dm / self.ds, (1 - self.dm) / self.ds) if self.cfg.optim.boxed else None

    def _conclude(self, candidates: torch.Tensor, target: Target, stats: dict) -> dict[str, torch.Tensor]:
        """Score the candidates and choose the output; the ground truth plays no part in either."""
        scores = self._score_candidates(candidates, target, stats)
        best = self._select_optimal_reconstruction(list(candidates), scores, stats)
        if self.cfg.restarts.get("output", "best") == "consensus" and scores.isfinite().any():  # else it is zeros
            best = self._consensus(self._in_one_order(candidates, target)[scores.isfinite()], stats)
        return {"data": best, "labels": target.labels, "candidates": candidates, "candidate_scores": scores}

    def _consensus(self, candidates: torch.Tensor, stats: dict) -> torch.Tensor:
        """Return the registered mean (B, C, H, W); what is aligned for it counts beside what the loop aligned."""
        options = (self.cfg.regularization or {}).get("group_regularization") or {}  # also where its scale is 0
        consensus, failures = registered_consensus(candidates, options.get("aligner", "none"))
        for key, count in (("alignment_failures", failures), ("alignments", len(candidates) * candidates.shape[1])):
            stats[key] = stats.get(key, 0) + count
        box = self._box()
        return consensus if box is None else torch.max(torch.min(consensus, box[1]), box[0])

    def _in_one_order(self, candidates: torch.Tensor, target: Target) -> torch.Tensor:
        """Return candidates (N, B, C, H, W), interchangeable images in the order of the first finite candidate."""
        if target.labels is None or target.labels.dim() != 1:
            return candidates
        groups = interchangeable(target.labels, target.local_hyperparams)
        reference = next((c for c in candidates if bool(c.isfinite().all())), candidates[0])
        return torch.stack([c[aligned_within(reference, c, groups)] for c in candidates])

    def _score_candidates(self, candidates: torch.Tensor, target: Target, stats: dict) -> torch.Tensor:
        """Return a score for every candidate, (N,) on the CPU, lower is better.

        It is infinite where it is not finite, and for candidates that were never evaluated to a finite number.
        """
        if self.cfg.restarts.scoring == "registered-group-regularization":
            candidates = self._in_one_order(candidates, target)
            sound = candidates.flatten(1).isfinite().all(dim=1)
            sound[never_left_their_start(stats)] = False
            finite = candidates[sound]
            centre = self._consensus(finite, stats) if len(finite) else candidates[0]
            scores = (candidates - centre).pow(2).flatten(1).mean(dim=1)
        else:
            ranks = ranks_of_run()
            own = [self._score_trial(candidates[n], target.labels, *target[:2]) for n in ranks.share(len(candidates))]
            scores = ranks.collect(torch.stack(own).detach(), len(candidates))
        scores = torch.where(scores.isfinite(), scores, float("inf")).detach().cpu()
        scores[never_left_their_start(stats)] = float("inf")
        return scores

    def _score_trial(
        self,
        candidate: torch.Tensor,
        labels: torch.Tensor,
        rec_model: list[torch.nn.Module],
        shared_data: list[dict],
    ) -> torch.Tensor:
        """Score one candidate. Breaching's total-variation score lacks an argument, and its others frozen models."""
        if self.cfg.restarts.scoring in ("TV", "total-variation"):
            with torch.no_grad():
                return AnyChannelTotalVariation(self.setup, scale=1.0)(candidate)
        objective = Euclidean() if self.cfg.restarts.scoring == "euclidean" else CosineSimilarity()
        objective.initialize(self.loss_fn, self.cfg.impl, shared_data[0]["metadata"]["local_hyperparams"])
        match_only_trainable(objective, rec_model, self.loss_fn, shared_data)
        queries = zip(rec_model, shared_data, strict=True)
        with CandidateStreams([self._seed()], candidate.device).use(0):  # dropout that is on: the same for all
            values = [objective(model, data["gradients"], candidate, labels)[0] for model, data in queries]
        return torch.stack(values).sum().detach()
