"""Models and data that users bring: attention, dropout, frozen and unused parts, outputs of two tensors, vectors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cases import attack_config, build_model, loss, observed
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from breaching_ext.attacks import JointCandidateAttacker, MagiaAttacker, observe
from breaching_ext.errors import ConfigError, SharedDataError

SETUP = {"dtype": torch.float64, "device": torch.device("cpu")}


def attack(model, payload, shared, *overrides, iterations=4, loss_fn=None):
    options = ["restarts.seed=5", "restarts.num_trials=2", *overrides]
    cfg = attack_config("joint_candidates", options, iterations)
    return JointCandidateAttacker(model, loss_fn or loss(), cfg, SETUP).reconstruct(payload, shared)


def compared(model, payload, shared, *overrides, iterations=4):
    """Return the statistics of the stack, which takes the sequential trials' way."""
    found, stats = attack(model, payload, shared, *overrides, iterations=iterations)
    slow, _ = attack(model, payload, shared, "restarts.parallel_candidates=false", *overrides, iterations=iterations)
    assert torch.allclose(found["candidates"], slow["candidates"], rtol=0, atol=1e-8)
    return stats


class Attention(torch.nn.Module):
    """Patches that attend to each other through torch's fused kernel, which has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 16, 8, stride=8)
        self.qkv, self.head = torch.nn.Linear(16, 48), torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)  # (B, 16, 16)
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, dim=-1))
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((tokens + mixed).mean(dim=1))


def own(kind: type[torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(3)
    return kind().double().eval()


@pytest.mark.parametrize("batching", ["list", "vmap"])
def test_attention_is_differentiated_twice(batching):
    model = own(Attention)
    payload, shared, *_ = observed(model)
    assert compared(model, payload, shared, f"restarts.candidate_batching={batching}")["engine"] == batching


def test_magia_differentiates_attention_twice():
    model = own(Attention)
    payload, shared, *_ = observed(model, labels=None)
    cfg = attack_config("magia", ["restarts.num_trials=2", "pyramid.factors=[1]", "pyramid.shares=[]"], 2)
    found, _ = MagiaAttacker(model, torch.nn.CrossEntropyLoss(), cfg, SETUP).reconstruct(payload, shared)
    assert found["candidates"].isfinite().all()


class Twice(torch.autograd.Function):
    """An operation in the old style, which torch.func does not take."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class OldStyle(torch.nn.Module):
    """Frozen in part, with a head that the loss does not look at, and an operation that torch.func does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build_model("own")
        self.unused = torch.nn.Linear(3, 2)
        self.inner.conv.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(Twice.apply(x))


def test_frozen_and_unused_parts_do_not_need_torch_func(caplog):
    model = own(OldStyle)
    images, labels = torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 5])
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(
        cross_entropy(model(images), labels), trainable, allow_unused=True, materialize_grads=True
    )
    noised = [g + 1e-3 * torch.randn_like(g) for g in gradients]  # an unused head's is not zero then
    payload, shared = observe(model, noised, (3, 32, 32), 2, 8, labels)
    caplog.set_level("INFO")
    assert compared(model, payload, shared)["engine"] == "list"
    assert "torch.func cannot transform" in caplog.text


class Dropping(torch.nn.Module):
    """Dropout that is on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = build_model("own"), torch.nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.drop(x))


def test_dropout_draws_from_the_candidates_own_stream(caplog):
    """Candidate i does not depend on how many there are, nor a run on the global random state."""
    model = Dropping().double()
    payload, shared, *_ = observed(model)
    caplog.set_level("INFO")
    payload[0]["buffers"] = shared[0]["buffers"] = None  # nobody knows them: the model stays in training mode
    state = torch.get_rng_state()
    stats = compared(model.train(), payload, shared)
    assert torch.equal(state, torch.get_rng_state())
    assert stats["engine"] == "list"
    assert "dropout is on" in caplog.text
    two, _ = attack(model, payload, shared)
    one, _ = attack(model, payload, shared, "restarts.num_trials=1")
    assert torch.equal(two["candidates"][:1], one["candidates"])


def test_a_model_whose_output_is_no_tensor():
    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_model("own")

        def forward(self, x):
            return self.inner(x), x

    model, inner = Pair(), build_model("own")
    payload, shared, *_ = observed(inner)
    attack(model, payload, shared, loss_fn=lambda output, labels: cross_entropy(output[0], labels))
    blind = MagiaAttacker(model, torch.nn.CrossEntropyLoss(), attack_config("magia", [], 2), SETUP)
    with pytest.raises(SharedDataError, match="output is tuple"):
        blind.reconstruct(payload, shared)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "regularization.total_variation.scale=0"),
        (["regularization.total_variation.scale=0", "restarts.scoring=TV"], "restarts.scoring=TV"),
    ],
)
def test_total_variation_of_vectors_is_refused(overrides, words):
    torch.manual_seed(3)
    model = torch.nn.Linear(10, 4).double()
    images, labels = torch.rand(2, 10, dtype=torch.float64), torch.tensor([1, 3])
    gradients = torch.autograd.grad(cross_entropy(model(images), labels), list(model.parameters()))
    payload, shared = observe(model, gradients, (10,), 2, 4, labels)
    with pytest.raises(ConfigError, match=words):
        attack(model, payload, shared, *overrides)
    attack(model, payload, shared, "regularization.total_variation.scale=0")


class Tied(torch.nn.Module):
    """Two layers that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)
        self.head = torch.nn.Linear(12, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("batching", ["list", "vmap"])
def test_local_steps_move_a_shared_weight_in_both_places(batching):
    """The distance at the client's own data is zero only where they do."""
    model = own(Tied)
    images, labels = torch.rand(2, 12, dtype=torch.float64), torch.tensor([1, 3])
    moved = copy.deepcopy(model)
    optimizer = torch.optim.SGD(moved.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(moved(images), labels).backward()
        optimizer.step()
    pairs = zip(moved.parameters(), model.parameters(), strict=True)
    update = [after.detach() - before.detach() for after, before in pairs]
    local = {"steps": 2, "data_per_step": 2, "lr": 0.1, "labels": [labels, labels]}
    payload, shared = observe(model, update, (12,), 2, 4, labels, local_hyperparams=local)
    options = ["objective.type=euclidean", "regularization.total_variation.scale=0", "optim.boxed=false"]
    options += ["restarts.seed=5", "restarts.num_trials=1", f"restarts.candidate_batching={batching}"]
    made = JointCandidateAttacker(model, loss(), attack_config("joint_candidates", options, 1), SETUP)
    _, stats = made.reconstruct(payload, shared, initial_data=images)
    assert stats["engine"] == batching
    assert stats["Trial_0_Val"][0] < 1e-20


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_a_start_at_the_solution_is_not_taken_for_a_wrong_engine(noise, caplog):
    """There the gradient is rounding errors alone, of which no two engines have the same."""
    model = build_model("own")
    payload, shared, images, _ = observed(model)
    options = ["regularization.total_variation.scale=0", "restarts.candidate_batching=vmap", "restarts.num_trials=2"]
    cfg = attack_config("joint_candidates", options, 2)
    start = images + noise * torch.randn_like(images)
    _, stats = JointCandidateAttacker(model, loss(), cfg, SETUP).reconstruct(payload, shared, initial_data=start)
    assert stats["engine"] == "vmap"
    assert "differs from Breaching" not in caplog.text


def test_numbers_and_labels_from_numpy():
    model = build_model("own")
    payload, shared, _, labels = observed(model)
    expected, _ = attack(model, payload, shared)
    shared[0]["metadata"].update(num_data_points=np.int64(2), labels=labels.to(torch.int32))
    found, _ = attack(model, payload, shared)
    assert torch.equal(found["candidates"], expected["candidates"])


def test_vectors_with_a_mean_and_deviation():
    torch.manual_seed(3)
    model = torch.nn.Linear(10, 4).double()
    images, labels = torch.rand(2, 10, dtype=torch.float64), torch.tensor([1, 3])
    mean, std = torch.linspace(0.3, 0.6, 10), torch.linspace(0.1, 0.2, 10)
    gradients = torch.autograd.grad(cross_entropy(model((images - mean) / std), labels), list(model.parameters()))
    payload, shared = observe(model, gradients, (10,), 2, 4, labels, mean.tolist(), std.tolist())
    found, _ = attack(model, payload, shared, "regularization.total_variation.scale=0", "optim.step_size=100")
    pixels = found["candidates"] * std + mean
    assert found["candidates"].shape == (2, 2, 10)
    assert pixels.min() > -1e-6
    assert pixels.max() < 1 + 1e-6
