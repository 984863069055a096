"""The picture of all candidates of a run, and what was chosen of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from .evaluation import assign, to_images
from .evaluation.figures import save_candidates
from .regularizers import registered_consensus

#: Candidates that the picture shows; of more, those with the best scores.
MOST_CANDIDATES = 24


def save_candidate_sheet(
    path: Path,
    true: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    mean: Any = None,
    std: Any = None,
    title: str = "",
    of_consensus: bool = False,
) -> None:
    """Draw the candidates, at most :data:`MOST_CANDIDATES`, and the mean of all.

    Args:
        path: where to.
        true: images (B, C, H, W) in [0, 1].
        tensors: what candidates.pt holds: `candidates` (N, B, C, H, W), `candidate_scores` (N,), lower is better, and
            `data` (B, C, H, W), in the network's normalisation.
        mean, std: that normalisation; None where there is none.
        title: one line above the picture.
        of_consensus: what was chosen is their consensus, which may be a registered one.
    """
    candidates = to_images(tensors["candidates"], mean, std)
    scores = tensors["candidate_scores"].nan_to_num(nan=math.inf, posinf=math.inf)
    best = int(scores.argmin())
    # attacks that do not know labels put each candidate's images in an order of its own
    candidates = torch.stack([c[assign(c, candidates[best])] for c in candidates])
    if of_consensus:
        data = to_images(tensors["data"], mean, std)
        last, last_name = data[assign(data, candidates[best])], "consensus\n(chosen)"
    else:
        last, last_name = registered_consensus(candidates)[0], "mean of all"
    shown = sorted(scores.argsort(stable=True)[:MOST_CANDIDATES].tolist())
    if len(shown) < len(candidates):
        title = f"{title}; the best {len(shown)} of {len(candidates)} candidates"
    chosen = best if not of_consensus and bool(scores[best].isfinite()) else None  # else nothing was: it is zeros
    names = [f"candidate {i}{' (chosen)' if i == chosen else ''}\nscore {scores[i].item():.3g}" for i in shown]
    order = assign(candidates[best], true)  # one order for all rows, so that a column shows one image
    save_candidates(path, true, candidates[shown][:, order], last[order], names, title, last_name)
