"""Nothing is lost: failures, Ctrl-C, the user's own tensors; and the engines' fallbacks."""

from __future__ import annotations

import logging
import signal
import threading

import pytest
import torch
from cases import attack_config, build_model, loss, observed, photos

from breaching_ext.attacks import JointCandidateAttacker, observe
from breaching_ext.attacks.inferred_labels import labels_of_steps
from breaching_ext.errors import ConfigError
from breaching_ext.matching import ListEngine

SETUP = {"dtype": torch.float64, "device": torch.device("cpu")}


def attack(model, payload, shared, overrides=(), iterations=8, loss_fn=None, **more):
    cfg = attack_config("joint_candidates", ["restarts.seed=5", "restarts.num_trials=3", *overrides], iterations)
    return JointCandidateAttacker(model, loss_fn or loss(), cfg, SETUP).reconstruct(payload, shared, **more)


class Fragile(torch.nn.Module):
    """A model whose output is NaN for images with a value above a limit."""

    def __init__(self, limit: float = 50.0):
        super().__init__()
        self.inner, self.limit = build_model("own"), limit

    def forward(self, x):
        return self.inner(x) * torch.where(x.amax() > self.limit, torch.nan, 1.0)


@pytest.mark.parametrize("batching", ["list", "vmap", "compile"])
def test_a_failing_candidate_is_frozen_and_named_and_the_others_go_on(batching, caplog, traced_only):
    """Candidate 1 starts where the objective is NaN; the others must not notice."""
    model = Fragile()
    payload, shared, images, _ = observed(model)
    overrides = [
        f"restarts.candidate_batching={batching}",
        "regularization.group_regularization.scale=0.1",
        "regularization.group_regularization.warmup_iters=2",
        "optim.boxed=false",
    ]
    starts = torch.stack([images * 0, images + 60, images * 0.5])
    with caplog.at_level(logging.WARNING):
        result, stats = attack(model, payload, shared, overrides, initial_data=starts)
    assert stats["engine"] == batching
    alone, _ = attack(model, payload, shared, [*overrides, "restarts.num_trials=2"], initial_data=starts[[0, 2]])
    assert stats["candidate_failures"] == {1: 0}
    assert "Candidate 1" in caplog.text
    assert torch.isinf(result["candidate_scores"][1])
    # scores that would be finite for a start, too; what chooses does not know the engine
    for scoring in ("registered-group-regularization", "TV") if batching == "vmap" else ():
        options = [*overrides, f"restarts.scoring={scoring}", "restarts.output=consensus"]
        scored, _ = attack(model, payload, shared, options, initial_data=starts)
        assert scored["candidate_scores"].isfinite().tolist() == [True, False, True]
        torch.testing.assert_close(scored["data"], scored["candidates"][[0, 2]].mean(dim=0))
    assert torch.allclose(result["candidates"][[0, 2]], alone["candidates"], atol=1e-12)
    assert stats["Trial_1_Val"] == []
    assert len(stats["Trial_0_Val"]) == 8
    assert result["data"].isfinite().all()


class Steep(torch.nn.Module):
    """A model whose output is finite and whose gradient is NaN where a pixel is 7."""

    def __init__(self):
        super().__init__()
        self.inner = build_model("own")

    def forward(self, x):
        return self.inner(x) + 0 * (x[:, 0, 0, 0] - 7).abs().sqrt().unsqueeze(1)


@pytest.mark.parametrize("batching", ["list", "vmap"])
def test_a_candidate_that_turns_nan_in_a_step_does_not_take_the_group_along(batching):
    model = Steep()
    payload, shared, images, _ = observed(model)
    starts = torch.stack([images * 0, images * 0.1, images * 0.5])
    starts[1, :, 0, 0, 0] = 7
    options = ["regularization.group_regularization.scale=0.1", "optim.boxed=false", "optim.signed=null"]
    options += ["regularization.group_regularization.warmup_iters=0", f"restarts.candidate_batching={batching}"]
    result, stats = attack(model, payload, shared, options, initial_data=starts)
    assert stats["engine"] == batching
    assert stats["candidate_failures"] == {1: 1}  # named where its next value is asked for
    assert [len(stats[f"Trial_{n}_Val"]) for n in range(3)] == [8, 1, 8]
    assert result["candidates"].isfinite().all()


@pytest.mark.parametrize("batching", ["list", "vmap"])
def test_lbfgs_names_a_candidate_that_fails_within_a_step(batching):
    """Candidate 1 starts beside the region where the model is NaN, and its first step leads there."""
    images, _ = photos(2)
    model = Fragile(limit=0.5 * images.amax().item() + 1e-9)
    payload, shared, *_ = observed(model.inner)
    starts = torch.stack([images * 0, images.clamp_max(0) + 0.5 * images.clamp_min(0), images * 0.3])
    options = ["optim.optimizer=l-bfgs", "optim.signed=null", "objective.type=euclidean", "optim.boxed=false"]
    options.append(f"restarts.candidate_batching={batching}")
    result, stats = attack(model, payload, shared, options, initial_data=starts, iterations=2)
    assert stats["engine"] == batching
    assert stats["candidate_failures"] == {1: 1}
    assert result["candidates"].isfinite().all()


def test_lbfgs_with_noise_goes_one_by_one(caplog):
    """Stacked candidates would draw as often as the one that evaluates most."""
    model = build_model("own")
    payload, shared, *_ = observed(model)
    options = ["optim.optimizer=l-bfgs", "optim.langevin_noise=0.1", "restarts.candidate_batching=vmap"]
    _, stats = attack(model, payload, shared, options, iterations=1)
    assert stats["engine"] == "list"
    assert "L-BFGS draws noise" in caplog.text


@pytest.fixture
def ctrl_c():
    """Ctrl-C raises, as in a terminal: a shell starts what runs in its background with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
def test_ctrl_c_ends_the_sequential_loop(ctrl_c, monkeypatch, caplog):
    """Breaching's trial swallows the interrupt; the next trial must not begin."""
    model = build_model("own")
    payload, shared, *_ = observed(model)
    calls = {"n": 0}
    original = JointCandidateAttacker._compute_objective

    def interrupted(self, *args, **kwargs):
        closure = original(self, *args, **kwargs)

        def counted():
            calls["n"] += 1
            if calls["n"] == 8 + 4:  # in the second of three trials
                signal.raise_signal(signal.SIGINT)
            return closure()

        return counted

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(JointCandidateAttacker, "_compute_objective", interrupted)
    result, stats = attack(model, payload, shared, ["restarts.parallel_candidates=false", "impl.checkpoint_every=2"])
    assert signal.getsignal(signal.SIGINT) is before
    assert stats["interrupted"]
    assert result["candidates"].shape[0] == 2
    assert [len(stats[f"Trial_{n}_Val"]) for n in range(2)] == [8, 3]
    assert "Interrupted in candidate 2 of 3" in caplog.text
    assert "checkpoint_every has no effect" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["regularization.group_regularization.scale=0"], "differentiable_augmentations=true"),
        (["differentiable_augmentations=true"], r"regularization\.group_regularization\.scale=0"),
    ],
)
def test_an_augmentation_whose_images_fit_nothing_is_refused(overrides, words):
    model = build_model("own")
    payload, shared, *_ = observed(model)
    with pytest.raises(ConfigError, match=rf"augmentations make images of \(3, 24, 24\) from \(3, 32, 32\).*{words}"):
        attack(model, payload, shared, ["+augmentations.focus.size=24", *overrides])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["+augmentations.flip.p=0.5", "differentiable_augmentations=true"], True),
        (["+augmentations.flip.p=0.5"], False),  # changes the candidate itself, which is what enters the consensus
        (["differentiable_augmentations=true"], False),
    ],
)
def test_a_group_term_that_sees_other_images_than_its_consensus_is_said(caplog, overrides, said):
    model = build_model("own")
    payload, shared, *_ = observed(model)
    attack(model, payload, shared, overrides)
    assert ("compares augmented images with a consensus" in caplog.text) is said


@pytest.mark.parametrize(("warmup", "said"), [(8, True), (7, False)])
def test_a_group_term_that_never_sets_in_is_said(caplog, warmup, said):
    model = build_model("own")
    payload, shared, *_ = observed(model)
    attack(model, payload, shared, [f"regularization.group_regularization.warmup_iters={warmup}"])
    assert ("The group term never sets in" in caplog.text) is said


def test_ctrl_c_returns_the_best_so_far(monkeypatch):
    model = build_model("own")
    payload, shared, *_ = observed(model)
    calls = {"n": 0}
    original = ListEngine.step

    def interrupted(self, iteration, alive):
        calls["n"] += 1
        if calls["n"] == 5:
            raise KeyboardInterrupt
        return original(self, iteration, alive)

    monkeypatch.setattr(ListEngine, "step", interrupted)
    plain = ["restarts.candidate_batching=list", "optim.signed=null", "optim.step_size_decay=null"]
    plain += ["optim.step_size=5", "optim.boxed=false"]  # too long: the best point is not the last
    result, stats = attack(model, payload, shared, plain)
    assert stats["interrupted"]
    values = stats["Trial_0_Val"]
    assert values.index(min(values)) < 3
    assert len(stats["Trial_0_Val"]) == 4
    calls["n"] = 5  # no more interrupts: with steps that do not know how many there are, four of them are the same
    short, _ = attack(model, payload, shared, plain, iterations=4)
    assert torch.equal(result["candidates"], short["candidates"])


@pytest.mark.parametrize("scoring", ["TV", "registered-group-regularization", "euclidean"])
def test_a_sequential_trial_that_never_was_finite_is_not_chosen(scoring):
    """Its start would have a finite score."""
    model = Fragile()
    payload, shared, images, _ = observed(model)
    starts = torch.stack([images * 0, images * 0 + 60, images * 0.5])
    options = ["restarts.parallel_candidates=false", f"restarts.scoring={scoring}", "optim.boxed=false"]
    result, stats = attack(model, payload, shared, options, initial_data=starts)
    assert stats["candidate_failures"] == {1: 0}
    assert result["candidate_scores"].isfinite().tolist() == [True, False, True]


def test_soft_labels_of_local_steps_stay_whole():
    soft = torch.rand(4, 8, dtype=torch.float64).softmax(dim=1)
    steps = {"labels": list(soft.split(2)), "steps": 2, "data_per_step": 2, "lr": 0.1}
    shared = [{"metadata": {"num_data_points": 4, "local_hyperparams": steps}}]
    assert torch.equal(labels_of_steps(shared, [{"metadata": {"modality": "vision"}}]), soft)


def test_the_users_tensors_are_left_alone():
    model = build_model("own")
    payload, shared, *_ = observed(model)
    before = [g.clone() for g in shared[0]["gradients"]]
    attack(model, payload, shared, ["normalize_gradients=true"], iterations=1)
    assert all(torch.equal(a, b) for a, b in zip(before, shared[0]["gradients"], strict=True))


def test_same_seed_same_result_and_the_global_random_state_is_untouched():
    model = build_model("own")
    payload, shared, *_ = observed(model)
    state = torch.get_rng_state()
    first, _ = attack(model, payload, shared, ["optim.langevin_noise=0.1"])
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(7)
    second, _ = attack(model, payload, shared, ["optim.langevin_noise=0.1"])
    assert torch.equal(first["candidates"], second["candidates"])


@pytest.mark.parametrize("options", [[], ["restarts.parallel_candidates=false"]])
def test_an_attack_that_is_made_again_draws_again(options):
    """ColorJitter keeps what it drew first, which was the attack's before."""
    model = build_model("own")
    payload, shared, *_ = observed(model)
    options = [*options, "+augmentations.colorjitter={mean: 0.2, std: 0.2}", "restarts.num_trials=2", "restarts.seed=5"]
    attacker = JointCandidateAttacker(model, loss(), attack_config("joint_candidates", options, 3), SETUP)
    found = [attacker.reconstruct(payload, shared)[0]["candidates"] for _ in range(2)]
    assert torch.equal(*found)
    two = torch.nn.Sequential(*attacker.augmentations)(torch.ones(2, 3, 4, 4, dtype=torch.float64))
    assert not torch.equal(two, torch.ones_like(two))


class BatchSizeBranch(torch.nn.Module):
    """A model that torch.func cannot transform: it looks at the numbers."""

    def __init__(self):
        super().__init__()
        self.inner = build_model("own")

    def forward(self, x):
        return self.inner(x * 2) if x.mean() > 1e9 else self.inner(x)


def test_fallback_to_list_says_why(caplog):
    model = BatchSizeBranch()
    payload, shared, *_ = observed(model)
    with caplog.at_level(logging.INFO):
        _, stats = attack(model, payload, shared, iterations=1)
    assert stats["engine"] == "list"
    assert "torch.func cannot transform" in caplog.text


def test_a_loss_that_the_batched_form_would_get_wrong_is_noticed(caplog):
    """A loss with state gives another value at every call; the check against Breaching's value sees it."""

    class Drifting(torch.nn.Module):
        calls = 0

        def forward(self, outputs, labels):
            self.calls += 1
            return torch.nn.functional.cross_entropy(outputs, labels) * self.calls

    model = build_model("own")
    payload, shared, *_ = observed(model)
    with caplog.at_level(logging.INFO):
        _, stats = attack(model, payload, shared, ["objective.type=euclidean"], iterations=1, loss_fn=Drifting())
    assert stats["engine"] == "list"
    assert "differs from Breaching's" in caplog.text


def test_lbfgs_counts_every_evaluation():
    model = build_model("own")
    payload, shared, *_ = observed(model)
    _, stats = attack(
        model,
        payload,
        shared,
        ["optim.optimizer=l-bfgs", "optim.signed=null", "objective.type=euclidean"],
        iterations=2,
    )
    assert stats["gradient_evaluations"] > 2 * 3  # several evaluations a step


@pytest.mark.parametrize(
    "scoring", ["euclidean", "cosine-similarity", "total-variation", "TV", "registered-group-regularization"]
)
@pytest.mark.parametrize("output", ["best", "consensus"])
def test_scorings_and_outputs(scoring, output):
    model = build_model("own")
    payload, shared, *_ = observed(model)
    result, stats = attack(model, payload, shared, [f"restarts.scoring={scoring}", f"restarts.output={output}"])
    scores = result["candidate_scores"]
    assert scores.shape == (3,)
    assert scores.isfinite().all()
    assert stats["opt_value"] == pytest.approx(scores.min().item())
    expected = result["candidates"][scores.argmin()] if output == "best" else result["candidates"].mean(dim=0)
    assert torch.allclose(result["data"], expected)


def test_one_channel_images_and_unknown_labels():
    """Fashion-MNIST-like input, and labels inferred from the gradient's bias (Breaching's bias-corrected)."""
    model = build_model("own", channels=1)
    payload, shared, _, labels = observed(model, batch=3, channels=1, labels=None)
    result, _ = attack(model, payload, shared)
    assert result["data"].shape == (3, 1, 32, 32)
    assert result["labels"].tolist() == labels.tolist()


def test_a_dict_instead_of_a_list_is_one_query():
    model = build_model("own")
    payload, shared, *_ = observed(model)
    result, _ = attack(model, payload[0], shared[0], iterations=1)
    assert result["data"].shape == (2, 3, 32, 32)


def test_all_candidates_fail():
    model = Fragile()
    payload, shared, images, _ = observed(model)
    result, stats = attack(model, payload, shared, ["optim.boxed=false"], initial_data=images + 60)
    assert sorted(stats["candidate_failures"]) == [0, 1, 2]
    assert result["candidates"].shape == (3, 2, 3, 32, 32)


def test_observe_without_normalisation():
    model = build_model("own")
    images, labels = photos(2)
    gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(model(images), labels), model.parameters())
    payload, shared = observe(model, gradients, (3, 32, 32), 2, 8, labels)
    result, _ = attack(model, payload, shared)
    assert result["data"].min() >= 0  # boxed to [0, 1] itself
    assert result["data"].max() <= 1


def test_a_case_that_names_a_normalisation_and_does_not_use_it():
    """Breaching would project onto the box of normalised images; with normalize=False that is [0, 1] itself."""
    model = build_model("own")
    payload, shared, *_ = observed(model)
    payload[0]["metadata"].normalize = False
    result, _ = attack(model, payload, shared)
    assert result["data"].min() >= 0
    assert result["data"].max() <= 1


def test_a_checkpoint_without_a_place_is_said_to_have_no_effect(caplog):
    model = build_model("own")
    payload, shared, *_ = observed(model)
    attack(model, payload, shared, ["impl.checkpoint_every=2"])
    assert "no effect without impl.checkpoint_path" in caplog.text
