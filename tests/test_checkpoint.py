"""A killed run goes on bit for bit."""

from __future__ import annotations

import pytest
import torch
from cases import attack_config, build_model, loss, observed

from breaching_ext.attacks import JointCandidateAttacker
from breaching_ext.attacks.joint_loop import JointLoop
from breaching_ext.errors import ConfigError

SETUP = {"dtype": torch.float64, "device": torch.device("cpu")}

#: options that each bring state of their own: moments, momentum, curvature, noise, augmentation, warm-up, consensus
CASES = {
    "adam": ["optim.warmup=3", "optim.step_size_decay=linear", "optim.langevin_noise=0.1"],
    "momgd": ["optim.optimizer=momgd", "+augmentations.discrete_shift.lim=2", "optim.step_size_decay=step-lr"],
    "signed": ["optim.signed=hard", "optim.warmup=3", "optim.step_size_decay=cosine-decay"],
    "nesterov": ["optim.optimizer=momgd", "optim.signed=soft"],
    "l-bfgs": ["optim.optimizer=l-bfgs", "optim.signed=null", "objective.type=euclidean"],
}


def attack(path, every, batching, overrides):
    model = build_model("own")
    payload, shared, *_ = observed(model)
    options = [
        f"impl.checkpoint_every={every or 'null'}",
        f"impl.checkpoint_path={path}",
        f"restarts.candidate_batching={batching}",
        "restarts.num_trials=2",
        "restarts.seed=1",
        "regularization.group_regularization.scale=0.2",
        "regularization.group_regularization.warmup_iters=2",
        "regularization.group_regularization.update_every=4",
        *overrides,
    ]
    cfg = attack_config("joint_candidates", options, 11)
    return JointCandidateAttacker(model, loss(), cfg, SETUP).reconstruct(payload, shared)


class Killed(BaseException):
    """Stands for a kill: nothing in the package handles it."""


@pytest.mark.parametrize("batching", ["list", "vmap", "compile"])
@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, traced_only, case, batching):
    path = tmp_path / "checkpoint.pt"
    whole, whole_stats = attack(path, None, batching, CASES[case])
    original = JointLoop._iterate

    def killed(self, iteration, bar):
        if iteration == 8:
            raise Killed
        return original(self, iteration, bar)

    monkeypatch.setattr(JointLoop, "_iterate", killed)
    with pytest.raises(Killed):
        attack(path, 3, batching, CASES[case])
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]

    done = []

    def counted(self, iteration, bar):
        done.append(iteration)
        return original(self, iteration, bar)

    monkeypatch.setattr(JointLoop, "_iterate", counted)
    resumed, resumed_stats = attack(path, 3, batching, CASES[case])
    assert done == list(range(6, 11))
    assert resumed_stats["engine"] == batching
    assert torch.equal(resumed["candidates"], whole["candidates"])
    for key in ("Trial_0_Val", "Trial_1_Val", "gradient_evaluations", "alignments"):
        assert resumed_stats[key] == whole_stats[key]
    assert not path.exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    monkeypatch.setattr("breaching_ext.attacks.checkpoint.Checkpoint.remove", lambda self: None)
    attack(path, 3, "vmap", CASES["adam"])
    with pytest.raises(ConfigError, match="another config"):
        attack(path, 3, "vmap", ["optim.step_size=0.2"])


def test_bad_interval(tmp_path):
    with pytest.raises(ConfigError, match="checkpoint_every=0"):
        attack(tmp_path / "c.pt", "0", "vmap", [])
