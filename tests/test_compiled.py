"""The compiled engine gives the vmap engine's numbers, compiles once, and gives way where it cannot work."""

from __future__ import annotations

import logging

import pytest
import torch
from cases import attack_config, build_model, loss, observed

from breaching_ext.attacks import JointCandidateAttacker
from breaching_ext.matching import build, compiled_engine

SETUP = {"dtype": torch.float64, "device": torch.device("cpu")}


def reconstruct(batching: str, *overrides: str, iterations: int = 8):
    model = build_model("own")
    payload, shared, *_ = observed(model)
    options = [f"restarts.candidate_batching={batching}", "restarts.seed=2", "restarts.num_trials=2", *overrides]
    cfg = attack_config("joint_candidates", options, iterations)
    return JointCandidateAttacker(model, loss(), cfg, SETUP).reconstruct(payload, shared)


@pytest.fixture
def traced_only(monkeypatch):
    """Trace and differentiate as torch.compile does, but skip its code generator, which takes most of the time."""
    monkeypatch.setattr(
        build, "CompiledEngine", lambda **parts: compiled_engine.CompiledEngine(**parts, backend="aot_eager")
    )


def test_same_numbers_through_the_warm_up_with_one_compilation(traced_only):
    group = ["regularization.group_regularization.scale=0.5", "regularization.group_regularization.warmup_iters=3"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, stats = reconstruct("compile", "optim.signed=soft", *group)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    eager, _ = reconstruct("vmap", "optim.signed=soft", *group)
    assert stats["engine"] == "compile"
    assert graphs == 1
    assert (compiled["candidates"] - eager["candidates"]).norm() / eager["candidates"].norm() < 1e-8


def test_real_compilation():
    torch._dynamo.reset()
    compiled, stats = reconstruct("compile", "optim.signed=soft")
    eager, _ = reconstruct("vmap", "optim.signed=soft")
    assert stats["engine"] == "compile"
    assert (compiled["candidates"] - eager["candidates"]).norm() / eager["candidates"].norm() < 1e-8


def test_a_compiler_that_fails_gives_way_to_vmap(monkeypatch, caplog):
    def refuse(*args, **kwargs):
        def fail(*inner):
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", refuse)
    with caplog.at_level(logging.WARNING):
        _, stats = reconstruct("compile", iterations=1)
    assert stats["engine"] == "vmap"
    assert "no compiler here" in caplog.text


def test_compiled_code_with_other_numbers_gives_way_to_vmap(monkeypatch, caplog):
    def wrong(function, **kwargs):
        def changed(*stacks):
            gradients, values, losses = function(*stacks)
            return [g * 1.01 for g in gradients], values, losses

        return changed

    monkeypatch.setattr(torch, "compile", wrong)
    with caplog.at_level(logging.WARNING):
        _, stats = reconstruct("compile", iterations=1)
    assert stats["engine"] == "vmap"
    assert "differs from the eager one" in caplog.text
