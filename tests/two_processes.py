"""Run by torchrun from test_distributed.py: attacks whose candidates two processes share; the first saves the results.

python two_processes.py OUT
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
from cases import attack_config, build_model, loss, observed

from breaching_ext.attacks import JointCandidateAttacker
from breaching_ext.attacks.joint_loop import JointLoop
from breaching_ext.ranks import joined

SETUP = {"dtype": torch.float64, "device": torch.device("cpu")}
GROUP = ["regularization.group_regularization.scale=0.3", "regularization.group_regularization.warmup_iters=1"]
CASES = {
    "vmap": ["restarts.candidate_batching=vmap", "optim.langevin_noise=0.1"],
    "list": ["restarts.candidate_batching=list", "restarts.output=consensus"],
    "aligned": [
        "restarts.candidate_batching=vmap",
        "regularization.group_regularization.aligner=phase_correlation",
        "restarts.scoring=euclidean",
    ],
    "alone": ["restarts.candidate_batching=list", "regularization.group_regularization.scale=0"],
    "failing": ["restarts.candidate_batching=vmap", "optim.boxed=false"],
}


class Fragile(torch.nn.Module):
    """NaN for images with a value above 50."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build_model("own")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * torch.where(x.amax() > 50, torch.nan, 1.0)


def attack(name: str, *overrides: str):
    """Three candidates, so that the two shares are not equal."""
    model = Fragile() if name == "failing" else build_model("own")
    payload, shared, images, _ = observed(model)
    starts = torch.stack([images * 0, images * 0.5, images + 60]) if name == "failing" else None
    options = ["restarts.num_trials=3", "restarts.seed=4", "optim.signed=soft", *GROUP, *CASES[name], *overrides]
    cfg = attack_config("joint_candidates", options, 6)
    return JointCandidateAttacker(model, loss(), cfg, SETUP).reconstruct(payload, shared, initial_data=starts)


def killed_and_resumed(folder: Path):
    """The `vmap` case with a checkpoint, killed in iteration 5, then run again."""
    options = [f"impl.checkpoint_path={folder / 'checkpoint.pt'}", "impl.checkpoint_every=2"]
    iterate = JointLoop._iterate

    def killed(self, iteration, bar):
        if iteration == 5:
            raise SystemExit
        return iterate(self, iteration, bar)

    JointLoop._iterate = killed
    with contextlib.suppress(SystemExit):
        attack("vmap", *options)
    JointLoop._iterate = iterate
    return attack("vmap", *options)


def interrupted():
    """Ctrl-C noted by the second process only, in iteration 3."""
    iterate = JointLoop._iterate

    def noting(self, iteration, bar):
        self.ranks.interrupted = self.ranks.rank == 1 and iteration == 2
        return iterate(self, iteration, bar)

    JointLoop._iterate = noting
    try:
        return attack("vmap")
    finally:
        JointLoop._iterate = iterate


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with joined(torch.device("cpu")) as ranks:
        results = {name: attack(name) for name in CASES}
        results["resumed"] = killed_and_resumed(folder)
        results["interrupted"] = interrupted()
        if ranks.first:
            kept = {name: (result, dict(stats)) for name, (result, stats) in results.items()}
            torch.save(kept, folder / "results.pt")


if __name__ == "__main__":
    main()
