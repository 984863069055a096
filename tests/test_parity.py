"""Candidate i of the joint attack follows Breaching's own sequential trial from the same start."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict

import pytest
import torch
from breaching.attacks.optimization_based_attack import OptimizationBasedAttacker
from cases import MEAN, STD, attack_config, build_model, loss, observed, photos
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import open_dict

from breaching_ext.attacks import JointCandidateAttacker, observe
from breaching_ext.matching.candidate_order import interchangeable
from breaching_ext.matching.client import client_update

SETUP = {"dtype": torch.float64, "device": torch.device("cpu")}
CANDIDATES, SEED = 2, 11


def breaching_trials(model, cfg, payload, shared, trials=CANDIDATES, seed=SEED):
    """Breaching's own attacker, trial by trial, trial i after torch.manual_seed(seed + i)."""
    cfg = cfg.copy()
    with open_dict(cfg):
        if cfg.regularization and "group_regularization" in cfg.regularization:
            del cfg.regularization.group_regularization
    attacker = OptimizationBasedAttacker(model, loss(), cfg, SETUP)
    shared = copy.deepcopy(shared)  # normalize_gradients works in place: twice may move a last bit
    rec_models, labels, _ = attacker.prepare_attack(payload, shared)
    stats, points = defaultdict(list), []
    for trial in range(trials):
        torch.manual_seed(seed + trial)
        points.append(attacker._run_trial(rec_models, shared, labels, stats, trial))
    scores = [attacker._score_trial(p, labels, rec_models, shared).item() for p in points]
    return torch.stack(points), stats, scores


def joint(model, cfg, payload, shared, batching, trials=CANDIDATES, seed=SEED, **more):
    with open_dict(cfg):
        cfg.restarts.update(num_trials=trials, candidate_batching=batching, seed=seed)
    attacker = JointCandidateAttacker(model, loss(), cfg, SETUP)
    result, stats = attacker.reconstruct(payload, shared, **more)
    return result, stats


def config(*overrides: str, iterations: int = 30):
    off = ["regularization.group_regularization.scale=0", "regularization.total_variation.scale=0.01"]
    return attack_config("joint_candidates", [*off, *overrides], iterations)


def check(model, cfg, payload, shared):
    expected, expected_stats, expected_scores = breaching_trials(model, cfg, payload, shared)
    result, stats = joint(model, cfg, payload, shared, "list")
    assert stats["engine"] == "list"
    assert torch.equal(result["candidates"], expected)
    for trial in range(CANDIDATES):
        assert stats[f"Trial_{trial}_Val"] == expected_stats[f"Trial_{trial}_Val"]
    assert result["candidate_scores"].tolist() == pytest.approx(expected_scores, rel=1e-12)
    batched, stats = joint(model, cfg, payload, shared, "vmap")
    assert stats["engine"] == "vmap"
    assert (batched["candidates"] - expected).norm() / expected.norm() < 1e-8
    alone, stats = joint(model, cfg, payload, shared, "vmap", trials=1)
    assert stats["engine"] == "vmap"
    assert (alone["candidates"] - expected[:1]).norm() / expected[:1].norm() < 1e-8
    return expected


@pytest.mark.parametrize("model_name", ["lenet_zhu", "cnn6", "ResNet20", "own"])
@pytest.mark.parametrize("optimizer", ["adam", "momgd"])
@pytest.mark.parametrize("objective", ["euclidean", "cosine-similarity"])
def test_models_and_objectives(model_name, optimizer, objective):
    model = build_model(model_name)
    payload, shared, *_ = observed(model)
    iterations = 6 if model_name == "ResNet20" else 30
    cfg = config(
        f"optim.optimizer={optimizer}", f"objective.type={objective}", "optim.signed=soft", iterations=iterations
    )
    check(model, cfg, payload, shared)


#: every model with every sign, optimizer and objective (soft signs are above); of ResNet20, which takes long, each once
SIGNS = [
    *itertools.product(
        ("lenet_zhu", "cnn6", "own"), ("null", "hard"), ("adam", "momgd"), ("euclidean", "cosine-similarity")
    ),
    ("ResNet20", "hard", "adam", "cosine-similarity"),
    ("ResNet20", "null", "momgd", "euclidean"),
]


@pytest.mark.parametrize(("model_name", "signed", "optimizer", "objective"), SIGNS)
def test_signs(model_name, signed, optimizer, objective):
    model = build_model(model_name)
    payload, shared, *_ = observed(model)
    options = [f"optim.signed={signed}", f"optim.optimizer={optimizer}", f"objective.type={objective}"]
    iterations = {"own": 30, "lenet_zhu": 12, "cnn6": 12, "ResNet20": 4}[model_name]
    check(model, config(*options, iterations=iterations), payload, shared)


@pytest.mark.parametrize(
    "objective", ["masked-cosine-similarity", "fast-cosine-similarity", "angular", "l1", "tag-euclidean"]
)
def test_other_objectives(objective):
    model = build_model("own")
    payload, shared, *_ = observed(model)
    check(model, config(f"objective.type={objective}", "objective.task_regularization=0.01"), payload, shared)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.langevin_noise=0.1"],
        ["optim.grad_clip=0.01", "optim.signed=null"],
        ["optim.warmup=5", "optim.step_size_decay=step-lr"],
        ["optim.step_size_decay=linear", "optim.optimizer=gd"],
        ["optim.optimizer=bert-adam"],
        ["optim.optimizer=adam-safe", "init=patterned-4"],
        ["normalize_gradients=true", "objective.type=euclidean"],
        ["+augmentations.discrete_shift.lim=3"],
        ["+augmentations.flip.p=0.5", "differentiable_augmentations=true"],
        ["+augmentations.colorjitter={mean: 0.1, std: 0.1}", "optim.langevin_noise=0.1"],
        ["+regularization.norm.scale=0.1", "+regularization.norm.pnorm=2"],
        ["+regularization.features.scale=0.1"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_option_of_a_step(overrides):
    model = build_model("own")
    payload, shared, *_ = observed(model)
    check(model, config(*overrides, iterations=12), payload, shared)


def test_lbfgs():
    """L-BFGS amplifies rounding from step to step, so fewer of them: 4 steps of up to 20 iterations."""
    model = build_model("own")
    payload, shared, *_ = observed(model)
    overrides = ["optim.optimizer=l-bfgs", "optim.signed=null", "objective.type=euclidean", "optim.step_size=0.5"]
    check(model, config(*overrides, iterations=4), payload, shared)


def test_batch_norm_statistics():
    model = build_model("ResNet20")
    payload, shared, *_ = observed(model, batch=2)
    check(model, config("+regularization.deep_inversion.scale=0.01", iterations=4), payload, shared)


def test_batch_norm_in_training_mode():
    """Neither client nor server shares statistics: Breaching then runs the model in training mode."""
    model = build_model("ResNet20")
    payload, shared, *_ = observed(model, batch=3)
    payload[0]["buffers"] = None
    check(model, config(iterations=4), payload, shared)


def local_update(model, steps=2, lr=0.05):
    """The parameters' change after local steps on two photos each, as Breaching's local_update users share it."""
    images, labels = photos(4)
    torch_model = build_model(model)
    state = [p.detach().clone() for p in torch_model.parameters()]
    optimizer = torch.optim.SGD(torch_model.parameters(), lr=lr)
    for step in range(steps):
        block = slice(2 * step, 2 * step + 2)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(torch_model(images[block]), labels[block]).backward()
        optimizer.step()
    change = [p.detach() - s for p, s in zip(torch_model.parameters(), state, strict=True)]
    hyperparams = {"lr": lr, "steps": steps, "data_per_step": 2, "labels": list(labels.view(steps, 2))}
    return observe(build_model(model), change, (3, 32, 32), 4, 8, labels=labels, local_hyperparams=hyperparams)


def test_several_local_steps():
    payload, shared = local_update("own")
    check(build_model("own"), config(), payload, shared)


def test_labels_of_local_steps_are_those_that_the_images_are_matched_with():
    """Breaching's clients sort each step's labels, and not those beside them."""
    payload, shared = local_update("own")
    told = shared[0]["metadata"]["local_hyperparams"]["labels"]
    told[:] = [labels.sort()[0] for labels in told]
    shared[0]["metadata"]["labels"] = torch.cat([labels.flip(0) for labels in told])
    for known in (True, False):
        if not known:
            shared[0]["metadata"]["labels"] = None
        result, _ = joint(build_model("own"), config(iterations=1), payload, shared, "vmap")
        assert torch.equal(result["labels"], torch.cat(told))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_images_with_one_number_are_interchangeable_and_no_others(data):
    """Exchanging two of them leaves the client's update as it is; exchanging others of one label does not."""
    count = data.draw(st.integers(2, 6))
    labels = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    per_step, steps = data.draw(st.integers(1, count)), data.draw(st.integers(1, 4))
    start, blocks = 0, []
    for _ in range(steps):
        blocks.append(labels[start : start + per_step])
        start = (start + per_step) % count
    hyperparams = {"lr": 0.5, "steps": steps, "data_per_step": per_step, "labels": blocks}
    local = data.draw(st.sampled_from([None, hyperparams]))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    update = client_update(model, torch.nn.functional.cross_entropy, local)
    images = torch.randn(count, 3, generator=torch.Generator().manual_seed(0)).double()
    before, numbers = update(images, labels)[0], interchangeable(labels, local)
    for one, other in itertools.combinations(range(count), 2):
        if labels[one] != labels[other]:
            assert numbers[one] != numbers[other]
            continue
        order = list(range(count))
        order[one], order[other] = other, one
        after = update(images[order], labels)[0]
        same = all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(before, after, strict=True))
        assert same is bool(numbers[one] == numbers[other])


def test_several_queries():
    model = build_model("own")
    payload, shared, *_ = observed(model)
    other = build_model("own")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    more_payload, more_shared, *_ = observed(other)
    check(model, config(), payload + more_payload, shared + more_shared)


def test_sequential_switch_is_the_list_engine():
    model = build_model("own")
    payload, shared, *_ = observed(model)
    cfg = config("restarts.parallel_candidates=false")
    result, stats = joint(model, cfg, payload, shared, "auto")
    expected, *_ = breaching_trials(model, cfg, payload, shared)
    assert stats["engine"] == "sequential"
    assert stats["gradient_evaluations"] == 2 * 30
    assert torch.equal(result["candidates"], expected)


@pytest.mark.parametrize("batching", ["list", "vmap"])
def test_given_starts(batching):
    model = build_model("own")
    payload, shared, images, _ = observed(model)
    starts = torch.stack([images + 0.1, images - 0.1])
    result, _ = joint(model, config(), payload, shared, batching, initial_data=starts, dryrun=True)
    assert torch.allclose(result["candidates"], starts, atol=0.21)  # one signed step of 0.1 away, inside the box
    same, _ = joint(model, config(), payload, shared, batching, initial_data=images, dryrun=True)
    assert torch.equal(same["candidates"][0], same["candidates"][1])


def test_candidates_do_not_depend_on_how_many_there_are():
    model = build_model("own")
    payload, shared, *_ = observed(model)
    few, _ = joint(model, config("optim.langevin_noise=0.1"), payload, shared, "vmap", trials=2)
    many, _ = joint(model, config("optim.langevin_noise=0.1"), payload, shared, "vmap", trials=5)
    assert torch.allclose(few["candidates"], many["candidates"][:2], rtol=0, atol=1e-12)


def test_frozen_parameters_are_not_matched():
    """A frozen backbone: the client shares gradients of the rest only, and both engines agree."""
    model = build_model("own")
    model.conv.requires_grad_(False)
    payload, shared, *_ = observed(model)
    assert len(shared[0]["gradients"]) == 4
    listed, _ = joint(model, config(), payload, shared, "list")
    batched, stats = joint(model, config(), payload, shared, "vmap")
    sequential, _ = joint(model, config("restarts.parallel_candidates=false"), payload, shared, "auto")
    assert stats["engine"] == "vmap"
    assert (listed["candidates"] - batched["candidates"]).norm() / listed["candidates"].norm() < 1e-8
    assert torch.equal(listed["candidates"], sequential["candidates"])


def test_a_parameter_that_is_not_used_has_a_gradient_of_zeros():
    """A head that the loss does not look at: all three loops agree, and with the model that lacks it."""
    model = build_model("own")
    payload, shared, images, labels = observed(model)
    expected, _ = joint(model, config(), payload, shared, "list")
    model.unused = torch.nn.Linear(3, 2).double()
    gradients = [*shared[0]["gradients"], torch.zeros(2, 3).double(), torch.zeros(2).double()]
    payload, shared = observe(model, gradients, (3, 32, 32), len(images), 8, labels=labels, mean=MEAN, std=STD)
    listed, _ = joint(model, config(), payload, shared, "list")
    batched, stats = joint(model, config(), payload, shared, "vmap")
    sequential, _ = joint(model, config("restarts.parallel_candidates=false"), payload, shared, "auto")
    assert stats["engine"] == "vmap"
    for found in (listed, batched, sequential):
        torch.testing.assert_close(found["candidates"], expected["candidates"], rtol=0, atol=1e-8)
        torch.testing.assert_close(found["candidate_scores"], expected["candidate_scores"], rtol=1e-6, atol=0)


def test_float32_paths_differ_only_by_flipped_signs():
    """In float32 a hard sign flips where a gradient is within rounding of 0; one step moves at most twice its size."""
    model = build_model("own", torch.float32)
    payload, shared, *_ = observed(model)
    cfg = config("impl.dtype=float", iterations=1)
    listed, _ = joint(model, cfg, payload, shared, "list")
    batched, _ = joint(model, cfg, payload, shared, "vmap")
    difference = (listed["candidates"] - batched["candidates"]).abs()
    assert difference.max() <= 0.2 + 1e-5
    assert (difference > 1e-4).float().mean() < 0.01
