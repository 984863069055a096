"""Every attack config that we ship runs on every small model for a few iterations."""

from __future__ import annotations

import contextlib
import io
import json
import warnings

import breaching
import pytest
import torch
from cases import build_model, loss, observed

from breaching_ext.registration import register

MODELS = ("lenet_zhu", "cnn6", "ResNet20", "own")

#: what a config needs to be small; everything else is as shipped
SMALL = {
    "joint_candidates": ["restarts.num_trials=2"],
    "magia": ["restarts.num_trials=2", "optim.inner_iterations=3"],
    "seethroughgradients_group": ["restarts.num_trials=2"],
}


#: attacks and cases of another threat model: weights of a network with one output, no gradient (tests/kkt)
FROM_WEIGHTS = {"kkt", "kkt_fashion_mnist"}


def attack_names(root) -> list[str]:
    return sorted({path.stem for path in (root / "config" / "attack").glob("*.yaml")} - FROM_WEIGHTS)


def compose(name: str, overrides: list[str]):
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return breaching.get_attack_config(name, overrides=["optim.max_iterations=3", "optim.callback=1", *overrides])


def pytest_generate_tests(metafunc):
    if "attack_name" in metafunc.fixturenames:
        from conftest import ROOT

        metafunc.parametrize("attack_name", attack_names(ROOT))


@pytest.mark.parametrize("model_name", MODELS)
def test_every_attack_on_every_model(attack_name, model_name):
    register()
    cfg = compose(attack_name, SMALL.get(attack_name, []))
    model = build_model(model_name, torch.float32)
    payload, shared, images, _ = observed(model)
    attacker = breaching.attacks.prepare_attack(model, loss(), cfg)
    result, stats = attacker.reconstruct(payload, shared, {})
    assert result["data"].shape == images.shape
    assert result["data"].isfinite().all()
    assert result["candidates"].shape == (2, *images.shape)
    assert result["candidate_scores"].shape == (2,)
    assert stats["opt_value"] == pytest.approx(result["candidate_scores"].min().item())
    assert len(stats["Trial_0_Val"]) == 3
    assert cfg.type in repr(attacker)


def test_the_users_keys_work_as_written():
    """The YAML that users pass around: eight candidates in parallel, group scale 0.1 after 500 iterations."""
    written = {
        "restarts": {"num_trials": 8, "parallel_candidates": True},
        "regularization": {"group_regularization": {"scale": 0.1, "warmup_iters": 500}},
    }
    overrides = [
        f"{key}={json.dumps(value)}"
        for key, value in {
            "restarts.num_trials": written["restarts"]["num_trials"],
            "restarts.parallel_candidates": written["restarts"]["parallel_candidates"],
            "regularization.group_regularization.scale": 0.1,
            "regularization.group_regularization.warmup_iters": 500,
        }.items()
    ]
    cfg = compose("joint_candidates", overrides)
    attacker = breaching.attacks.prepare_attack(build_model("own", torch.float32), loss(), cfg)
    assert attacker.group.scale == 0.1
    assert attacker.group.warmup_iters == 500


@pytest.mark.parametrize("shape", [[3, 32, 32], [3, 48, 48]])
def test_every_case_composes_and_gives_a_gradient(root, shape):
    register()
    for path in (root / "config" / "case").glob("*.yaml"):
        if path.stem in FROM_WEIGHTS:
            continue
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cfg = breaching.get_case_config(path.stem, overrides=[f"data.shape={shape}", "model=ResNet20"])
            user, server, *_ = breaching.cases.construct_case(cfg)
            shared, _, true = server.run_protocol(user)
        assert true["data"].shape == (cfg.user.num_data_points, *shape)
        assert all(g.isfinite().all() for g in shared[0]["gradients"])
