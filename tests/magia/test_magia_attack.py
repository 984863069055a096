"""The attack as users call it: results, labels, candidates, bad input."""

from __future__ import annotations

import breaching
import pytest
import torch
from cases import MEAN, STD, attack_config, build_model, loss, observed, photos

from breaching_ext.attacks import MagiaAttacker, magia, observe
from breaching_ext.attacks.joint_loop import JointLoop
from breaching_ext.errors import BreachingExtError, ConfigError, SharedDataError
from breaching_ext.evaluation import evaluate, to_images
from breaching_ext.matching.candidate_order import aligned_to
from breaching_ext.matching.magia_engine import MagiaEngine
from breaching_ext.registration import register
from breaching_ext.regularizers.any_order import GroupAnyOrder
from breaching_ext.regularizers.color_tv import anisotropic_total_variation, color_total_variation


def attacker(*overrides: str, model: torch.nn.Module | None = None, iterations: int = 2) -> MagiaAttacker:
    model = build_model("lenet_zhu") if model is None else model
    return MagiaAttacker(model, loss(), attack_config("magia", list(overrides), iterations))


def reconstruct(*overrides: str, iterations: int = 2, batch: int = 2, start=None, **known):
    model = build_model("lenet_zhu")
    payload, shared, images, labels = observed(model, batch, **known)
    made = attacker(*overrides, model=model, iterations=iterations)
    result, stats = made.reconstruct(payload, shared, {}, initial_data=start)
    return result, stats, images, labels


def test_images_and_labels_of_two_photos_come_back():
    result, stats, images, labels = reconstruct("impl.dtype=float", iterations=25, labels=None)
    true, found = to_images(images, MEAN, STD), to_images(result["data"], MEAN, STD)
    scores = evaluate(found, true, result["labels"], labels)
    assert scores.means["psnr"] > 20
    assert scores.means["label_acc"] == 1
    assert stats["Trial_0_Val"][-1] < 1e-2 * stats["Trial_0_Val"][0]


def test_shapes_and_statistics():
    result, stats, images, _ = reconstruct("restarts.num_trials=3")
    assert result["data"].shape == images.shape
    assert result["candidates"].shape == (3, *images.shape)
    assert result["candidate_labels"].shape == (3, 2)
    assert result["labels"].shape == (2,)
    torch.testing.assert_close(result["label_probabilities"].sum(dim=1), torch.ones(2, dtype=torch.float64))
    assert result["candidate_scores"].shape == (3,)
    assert stats["opt_value"] == pytest.approx(result["candidate_scores"].min().item())
    assert 3 * 2 * 20 <= stats["gradient_evaluations"] == stats["full_gradients"] <= 3 * 2 * 25
    assert [len(stats[f"Trial_{i}_Val"]) for i in range(3)] == [2, 2, 2]
    assert torch.equal(result["data"], result["candidates"][result["candidate_scores"].argmin()])


def test_labels_that_the_client_sent_are_not_looked_at():
    blind, *_ = reconstruct(labels=None)
    seeing, *_ = reconstruct()
    assert torch.equal(blind["data"], seeing["data"])
    assert torch.equal(blind["labels"], seeing["labels"])


def test_candidates_do_not_depend_on_their_company():
    options = ["subset.term=residual", "subset.alpha=0.5", "subset.sel_k=2"]
    seed = "restarts.seed=5"
    together, *_ = reconstruct(seed, "restarts.num_trials=3", *options, batch=4)
    sequential, *_ = reconstruct(seed, "restarts.num_trials=3", *options, "restarts.parallel_candidates=false", batch=4)
    torch.testing.assert_close(together["candidates"], sequential["candidates"], rtol=0, atol=1e-6)
    second, *_ = reconstruct("restarts.seed=6", "restarts.num_trials=1", *options, batch=4)
    torch.testing.assert_close(together["candidates"][1], second["data"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("term", ["none", "released", "mean", "residual"])
@pytest.mark.parametrize("rest", [["optim.optimizer=adam", "optim.step_size=0.05"], ["optim.line_search=strong_wolfe"]])
def test_every_term_and_optimizer_lowers_the_objective(term, rest):
    constant = ["image_prior.weight=0.01", "image_prior.anneal_from=null"]  # a fading prior would lower it by itself
    options = [f"subset.term={term}", "subset.sel_k=2", "subset.rescaling=ratio", *constant, *rest]
    _, stats, *_ = reconstruct(*options, iterations=4, batch=4)
    values = stats["Trial_0_Val"]
    assert values[-1] < 0.9 * values[0]


def test_settings_of_a_subset_term_that_is_off_are_said_to_have_no_effect(caplog):
    reconstruct("subset.rescaling=ratio", "subset.sel_mode=sigmoid", "subset.sel_k=3", iterations=1)
    assert (
        "subset.rescaling=ratio, subset.sel_mode=sigmoid, subset.sel_k=3: no effect with subset.term=none."
        in caplog.text
    )
    caplog.clear()
    reconstruct("subset.rescaling=ratio", "subset.term=residual", iterations=1)
    reconstruct(iterations=1)
    assert "no effect" not in caplog.text


def test_relative_weights_are_in_units_of_the_gradients_squared_norm():
    _, shared, _, _ = observed(build_model("lenet_zhu"), 2)
    norm = sum(g.square().sum().item() for g in shared[0]["gradients"])
    weights = ("image_prior.weight={:.17g}", "image_prior.anneal_from={:.17g}")
    relative, *_ = reconstruct(
        "image_prior.relative=true", *(w.format(x) for w, x in zip(weights, (5e-6, 0.015), strict=True))
    )
    absolute, *_ = reconstruct(*(w.format(x * norm) for w, x in zip(weights, (5e-6, 0.015), strict=True)))
    plain, *_ = reconstruct(*(w.format(x) for w, x in zip(weights, (5e-6, 0.015), strict=True)))
    torch.testing.assert_close(relative["data"], absolute["data"], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(relative["data"], plain["data"], atol=1e-3)


def test_group_consistency_pulls_candidates_together():
    options = ("restarts.num_trials=3", "pyramid.factors=[1]", "pyramid.shares=[]", "restarts.seed=1")
    apart, *_ = reconstruct(*options, iterations=4)
    pulled, stats, *_ = reconstruct(
        *options,
        "regularization.group_regularization.scale=50",
        "regularization.group_regularization.warmup_iters=1",
        iterations=4,
    )
    assert spread(pulled["candidates"]) < spread(apart["candidates"])
    assert stats["alignments"] > 0


def spread(candidates: torch.Tensor) -> float:
    """Mean squared distance of the candidates from their mean, in one order."""
    ordered = torch.stack([c[aligned_to(candidates[0], c)] for c in candidates])
    return (ordered - ordered.mean(dim=0)).square().mean().item()


def test_group_term_sees_through_the_order_of_images():
    images = torch.rand(3, 3, 4, 4, dtype=torch.float64)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(images[order][aligned_to(images, images[order])], images)
    group = GroupAnyOrder({"dtype": torch.float64, "device": torch.device("cpu")}, scale=2.0)
    stack = torch.stack([images, images[order]])
    group.prepare(stack)
    group.update(stack, 0)
    assert group(images[order]).item() == pytest.approx(0)
    moved = (images[order] + 0.01).requires_grad_()
    (gradient,) = torch.autograd.grad(group(moved), moved)
    torch.testing.assert_close(gradient, 2 * 2.0 * (moved.detach() - images[order]) / images.numel())


def test_consensus_output_is_the_mean_in_the_chosen_order():
    result, *_ = reconstruct("restarts.num_trials=3", "restarts.output=consensus")
    candidates, best = result["candidates"], result["candidates"][result["candidate_scores"].argmin()]
    mean = torch.stack([c[aligned_to(best, c)] for c in candidates]).mean(dim=0)
    torch.testing.assert_close(result["data"], mean)


@pytest.mark.parametrize(
    "scoring", ["euclidean", "cosine-similarity", "total-variation", "registered-group-regularization"]
)
def test_every_scoring(scoring):
    result, *_ = reconstruct("restarts.num_trials=2", f"restarts.scoring={scoring}")
    assert result["candidate_scores"].isfinite().all()


def test_the_euclidean_score_is_the_full_term():
    """Breaching's euclidean objective is half the squared distance of the gradients; labels are the optimised ones."""
    result, *_ = reconstruct()
    model = build_model("lenet_zhu")
    _, shared, _, _ = observed(model)
    outputs = torch.nn.functional.cross_entropy(model(result["data"]), result["label_probabilities"])
    found = torch.autograd.grad(outputs, list(model.parameters()))
    distance = sum((a - b).square().sum() for a, b in zip(found, shared[0]["gradients"], strict=True))
    assert result["candidate_scores"][0].item() == pytest.approx(0.5 * distance.item(), rel=1e-5)


def test_breachings_entry_point_knows_the_attack():
    register()
    made = breaching.attacks.prepare_attack(build_model("lenet_zhu"), loss(), attack_config("magia"))
    assert isinstance(made, MagiaAttacker)
    assert "magia" in repr(made)


def test_one_channel_images_and_a_users_own_model():
    model = build_model("own", channels=1)
    payload, shared, images, _ = observed(model, 2, channels=1)
    result, _ = attacker(model=model).reconstruct(payload, shared)
    assert result["data"].shape == images.shape


class WithDropout(torch.nn.Sequential):
    """A network whose dropout is on whenever it is trained."""

    def __init__(self) -> None:
        layers = [torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 20), torch.nn.Sigmoid()]
        super().__init__(*layers, torch.nn.Dropout(0.5), torch.nn.Linear(20, 5))


def with_dropout(*overrides: str):
    torch.manual_seed(0)
    model = WithDropout().double().train()
    payload, shared = observe(model, [torch.randn_like(p) for p in model.parameters()], (3, 16, 16), 2, 5)
    payload[0]["buffers"] = None  # the server sends none, so Breaching keeps the model in training mode
    options = ["optim.optimizer=adam", "optim.inner_iterations=2", "restarts.seed=3", *overrides]
    made = attacker(*options, model=model, iterations=3)
    torch.seed()  # wherever the global generator stands
    before = torch.get_rng_state()
    result = made.reconstruct(payload, shared)
    assert torch.equal(torch.get_rng_state(), before)
    return result


@pytest.mark.parametrize("method", ["auto", "vmap", "compile"])
def test_dropout_draws_from_each_candidates_own_stream(method, caplog):
    batching = f"restarts.candidate_batching={method}"
    first, stats = with_dropout("restarts.num_trials=2", batching)
    assert stats["engine"] == "list"
    assert ("the model's dropout is on" in caplog.text) == (method != "auto")
    again, _ = with_dropout("restarts.num_trials=2", batching)
    assert torch.equal(first["candidates"], again["candidates"])
    alone, _ = with_dropout("restarts.num_trials=1", batching)
    assert torch.equal(first["candidates"][:1], alone["candidates"])


@pytest.mark.parametrize("optimizer", ["l-bfgs", "adam"])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-6])
def test_a_small_gradient_is_matched_as_well_as_a_large_one(scale, optimizer):
    """A trained model's gradient is small: absolute tolerances (L-BFGS's curvature, Adam's ε) would hold a run up."""
    model = build_model("lenet_zhu")
    payload, shared, *_ = observed(model, 2, labels=None)
    shared[0]["gradients"] = [scale * g for g in shared[0]["gradients"]]
    small = lambda output, labels: scale * torch.nn.functional.cross_entropy(output, labels)  # noqa: E731
    options = ["image_prior.relative=true", "image_prior.weight=1e-7", "image_prior.anneal_from=1e-4"]
    options += [f"optim.optimizer={optimizer}", "optim.line_search=null", "pyramid.factors=[1]", "pyramid.shares=[]"]
    cfg = attack_config("magia", options, 6)
    _, stats = MagiaAttacker(model, small, cfg).reconstruct(payload, shared)
    values = stats["Trial_0_Val"]
    assert values[-1] < 0.5 * values[0]


def test_a_loss_that_takes_no_probabilities_is_refused_before_the_loop():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5), torch.nn.LogSoftmax(dim=1)).double()
    payload, shared = observe(model, [torch.randn_like(p) for p in model.parameters()], (3, 4, 4), 2, 5)
    attack = MagiaAttacker(model, torch.nn.functional.nll_loss, attack_config("magia", [], 2))
    with pytest.raises(ConfigError, match=r"The loss nll_loss does not take label probabilities .*CrossEntropyLoss"):
        attack.reconstruct(payload, shared)


def test_weights_in_units_of_a_gradient_whose_squares_are_below_single_precision():
    model = build_model("lenet_zhu", torch.float32)
    payload, shared, *_ = observed(model)
    shared[0]["gradients"] = [g * 1e-24 for g in shared[0]["gradients"]]
    result, _ = attacker("image_prior.relative=true", "impl.dtype=float", model=model).reconstruct(payload, shared)
    assert result["data"].isfinite().all()


def test_weights_in_units_of_a_gradient_of_zeros_are_refused():
    model = build_model("lenet_zhu")
    payload, shared, *_ = observed(model, 2)
    shared[0]["gradients"] = [torch.zeros_like(g) for g in shared[0]["gradients"]]
    with pytest.raises(SharedDataError, match=r"is zero: image_prior\.relative=true"):
        attacker("image_prior.relative=true", model=model).reconstruct(payload, shared)


def test_a_scoring_that_says_nothing_about_two_candidates_is_said(caplog):
    reconstruct("restarts.num_trials=2", "restarts.scoring=registered-group-regularization", iterations=1)
    assert "says nothing about 2 candidates" in caplog.text


class Killed(BaseException):
    """Stands for a kill: nothing in the package handles it."""


@pytest.mark.parametrize("moment", ["in step 4", "while settling"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, moment):
    options = ["restarts.num_trials=2", "restarts.seed=1", "subset.term=residual", "pyramid.factors=[2,1]"]
    options += ["pyramid.shares=[0.5]", "optim.inner_iterations=3", "subset.sel_k=2", "subset.alpha=0.5"]
    keep = [f"impl.checkpoint_path={tmp_path / 'c.pt'}", "impl.checkpoint_every=1"]
    whole, whole_stats, *_ = reconstruct(*options, iterations=5, batch=4)
    original, done = JointLoop._iterate, []

    def killed(self, iteration, bar):
        if moment == "in step 4" and iteration == 4:
            raise Killed
        return original(self, iteration, bar)

    def counted(self, iteration, bar):
        done.append(iteration)
        return original(self, iteration, bar)

    def settling(*args):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(JointLoop, "_iterate", killed)
        if moment == "while settling":
            patched.setattr("breaching_ext.attacks.joint_loop.settle", settling)
        with pytest.raises(Killed):
            reconstruct(*options, *keep, iterations=5, batch=4)
    monkeypatch.setattr(JointLoop, "_iterate", counted)
    resumed, stats, *_ = reconstruct(*options, *keep, iterations=5, batch=4)
    assert done == [4]
    for key in ("candidates", "candidate_labels", "candidate_scores", "data"):
        assert torch.equal(resumed[key], whole[key])
    assert stats["Trial_1_Val"] == whole_stats["Trial_1_Val"]
    assert not list(tmp_path.iterdir())


def test_interrupting_returns_the_best_so_far(monkeypatch):
    from breaching_ext.matching.magia_engine import MagiaEngine

    step = MagiaEngine.step

    def interrupted(self, iteration, alive, progress=None):
        if iteration == 2:
            raise KeyboardInterrupt
        return step(self, iteration, alive, progress)

    monkeypatch.setattr(MagiaEngine, "step", interrupted)
    result, stats, *_ = reconstruct(iterations=5)
    assert stats["interrupted"]
    assert len(stats["Trial_0_Val"]) == 2
    assert result["data"].isfinite().all()


@pytest.mark.parametrize("scoring", ["euclidean", "registered-group-regularization"])
@pytest.mark.parametrize("output", ["best", "consensus"])
def test_a_candidate_that_never_left_its_start_is_not_chosen(monkeypatch, scoring, output):
    """The first fails in its first step; grey, it is the nearest to the mean of the others."""
    from breaching_ext.matching.magia_engine import MagiaEngine

    step = MagiaEngine.step

    def failing(self, iteration, alive, progress=None):
        found = step(self, iteration, alive, progress)
        found.values[0] = float("nan")
        return found

    monkeypatch.setattr(MagiaEngine, "step", failing)
    options = ("restarts.num_trials=3", f"restarts.scoring={scoring}", f"restarts.output={output}")
    result, stats, *_ = reconstruct(*options, iterations=2)
    assert stats["candidate_failures"] == {0: 0}
    assert result["candidate_scores"].isfinite().tolist() == [False, True, True]
    assert not torch.equal(result["data"], result["candidates"][0])


def test_a_subset_larger_than_the_batch_is_clamped_and_said(caplog):
    reconstruct("subset.term=mean", "subset.sel_k=99")
    assert "sel_k=99" in caplog.text
    assert "taking 2" in caplog.text


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "subset.sel_mode=cubic",
            "const1, constk, linear_inc_l, linear_inc_total, linear_dec_l, linear_dec_total, sigmoid",
        ),
        ("subset.sel_l_iter=0", "l_iter=0"),
        ("subset.alpha=1.2", "alpha=1.2"),
        ("subset.term=best", "released, mean, residual"),
        ("subset.rescaling=binomial", "none, ratio, variance"),
        ("subset.redraw=often", "step, closure"),
        ("image_prior.kind=sobolev", "color, anisotropic"),
        ("pyramid.factors=1", r"pyramid\.factors=1 is not possible; valid: a list"),
        ("pyramid.shares=null", r"pyramid\.shares=None is not possible; valid: a list"),
        ("image_prior.weight=-1", r"image_prior\.weight=-1"),
        ("image_prior.eps=0", "image_prior.eps=0"),
        ("image_prior.chroma=-1", "image_prior.chroma=-1"),
        ("image_prior.chroma=null", r"image_prior\.chroma=None is not possible; valid: a number"),
        ("image_prior.eps=little", r"image_prior\.eps=little is not possible; valid: a number"),
        ("image_prior.weight=nan", r"image_prior\.weight=nan"),
        ("image_prior.anneal_from=inf", r"image_prior\.anneal_from=inf"),
        ("image_prior.relative=off", r"image_prior\.relative=off is not possible; valid: true, false"),
        ("image_prior.eps=inf", r"image_prior\.eps=inf is not possible"),
        ("image_prior.chroma=inf", r"image_prior\.chroma=inf is not possible"),
        ("optim.label_scale=inf", r"optim\.label_scale=inf is not possible"),
        ("optim.inner_iterations=2.5", r"optim.inner_iterations=2.5 is not possible; valid: a whole number"),
        ("subset.sel_k=2.7", "subset.sel_k=2.7"),
        ("subset.sig_a=steep", "subset.sig_a=steep"),
        ("pyramid.factors=[2.5,2,1]", "whole numbers"),
        ("+impl.memory_budget=4GiB", "memory_budget=4GiB has no effect on magia"),
        ("label_strategy=yin", "label_strategy=yin has no effect"),
        ("differentiable_augmentations=true", "differentiable_augmentations=True has no effect"),
        ("optim.inner_iterations=0", "optim.inner_iterations=0"),
        ("optim.history_size=0", "optim.history_size=0"),
        ("optim.step_size=0", "optim.step_size=0"),
        ("optim.optimizer=momgd", "l-bfgs, adam"),
        ("optim.line_search=armijo", "strong_wolfe"),
        ("pyramid.factors=[4,2]", "end with 1"),
        ("+regularization.total_variation={scale: 0.1}", "image_prior"),
        ("objective.type=cosine-similarity", "cosine-similarity has no effect on magia; valid: euclidean"),
        ("normalize_gradients=true", r"attack\.normalize_gradients=True does not work with magia; valid: False"),
        ("optim.signed=hard", r"attack\.optim\.signed=hard has no effect"),
        ("optim.grad_clip=1.0", "valid: empty"),
        ("optim.warmup=5", "warmup=5"),
        ("+augmentations.discrete_shift.lim=2", "augmentations"),
    ],
)
def test_bad_options_are_named_before_anything_is_computed(override, text):
    with pytest.raises(ConfigError, match=text):
        attacker(override)


@pytest.fixture
def built(monkeypatch):
    """The engine that the attack builds and would run for some overrides."""

    def engine(*overrides: str):
        engines = []

        def remember(*args, **options):
            engines.append(MagiaEngine(*args, **options))
            raise Killed

        monkeypatch.setattr(magia, "MagiaEngine", remember)
        with pytest.raises(Killed):
            reconstruct(*overrides, iterations=1)
        (found,) = engines
        return found

    return engine


@pytest.mark.parametrize(
    ("overrides", "part", "expected"),
    [
        ([], "schedule", {"mode": "constk", "k": 2, "l_iter": 100, "a": -0.1, "b": 200.0, "redraw": "step"}),
        (["subset.sel_mode=linear_dec_l", "subset.sel_l_iter=7"], "schedule", {"mode": "linear_dec_l", "l_iter": 7}),
        (["subset.sel_k=1", "subset.redraw=closure"], "schedule", {"k": 1, "redraw": "closure"}),
        (
            ["subset.sel_mode=sigmoid", "subset.sig_a=0.5", "subset.sig_b=3"],
            "schedule",
            {"mode": "sigmoid", "a": 0.5, "b": 3.0},
        ),
        ([], "term", {"kind": "none"}),
        (
            ["subset.term=mean", "subset.alpha=0.5", "subset.rescaling=ratio"],
            "term",
            {"kind": "mean", "alpha": 0.5, "rescaling": "ratio"},
        ),
        (["subset.term=released", "subset.rescaling=2"], "term", {"kind": "released", "rescaling": 2.0}),
        ([], "annealing", {"last": 0.001, "first": 3.0}),
        (["image_prior.weight=0.02", "image_prior.anneal_from=null"], "annealing", {"last": 0.02, "first": None}),
        ([], "options", {"name": "l-bfgs", "step_size": 1.0, "inner_iterations": 20, "history_size": 100}),
        ([], "options", {"line_search": "strong_wolfe", "label_scale": 5.0}),
        (["optim.line_search=null", "optim.history_size=7"], "options", {"line_search": None, "history_size": 7}),
        (["optim.inner_iterations=3", "optim.label_scale=2"], "options", {"inner_iterations": 3, "label_scale": 2.0}),
        (["optim.optimizer=adam", "optim.step_size=0.2"], "options", {"name": "adam", "step_size": 0.2}),
        (["pyramid.factors=[2,1]", "pyramid.shares=[0.5]"], "pyramid", {"factors": (2, 1), "shares": (0.5,)}),
    ],
)
def test_every_key_reaches_the_engine(overrides, part, expected, built):
    engine = built(*overrides)
    found = engine.matching.term if part == "term" else getattr(engine, part)
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], lambda x: color_total_variation(x, 5.0, 0.01)),
        (["image_prior.chroma=2"], lambda x: color_total_variation(x, 2.0, 0.01)),
        (["image_prior.eps=0.2"], lambda x: color_total_variation(x, 5.0, 0.2)),
        (["image_prior.kind=anisotropic"], anisotropic_total_variation),
    ],
)
def test_the_prior_that_is_asked_for_is_part_of_the_objective(overrides, expected, built):
    """Values with and without the prior differ by its weight times the prior."""
    engine = built(*overrides)
    pixels, logits = engine.starts
    with_prior, without = (engine.matching(pixels, logits, None, weight)[0] for weight in (2.0, 0.0))
    torch.testing.assert_close(with_prior - without, torch.stack([2 * expected(x) for x in pixels]))


def test_each_optimizer_has_its_own_step_size():
    assert attacker().options.optimizer.step_size == 1.0
    assert attacker("optim.optimizer=adam").options.optimizer.step_size == 0.05
    assert attacker("optim.optimizer=adam", "optim.step_size=0.2").options.optimizer.step_size == 0.2


@pytest.mark.parametrize("options", [["restarts.num_trials=1"], ["restarts.num_trials=2"]])
def test_a_parameter_that_the_loss_does_not_use(options):
    """Its gradient is zeros; candidates are stepped one by one or stacked, and scored by Breaching's objective."""
    model = build_model("own")
    model.unused = torch.nn.Linear(3, 2).double()
    images, labels = photos(2)
    gradients = torch.autograd.grad(
        torch.nn.functional.cross_entropy(model(images), labels), list(model.parameters()), allow_unused=True
    )
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), gradients, strict=True)]
    payload, shared = observe(model, gradients, (3, 32, 32), 2, 8, mean=MEAN, std=STD)
    result, _ = attacker(*options, model=model).reconstruct(payload, shared)
    assert result["data"].isfinite().all()
    assert result["candidate_scores"].isfinite().all()


def test_a_start_is_said_to_lose_its_detail_on_a_coarse_grid(caplog):
    *_, images, _ = reconstruct(iterations=1)
    reconstruct("pyramid.factors=[1]", "pyramid.shares=[]", iterations=1, start=images)
    assert "detail" not in caplog.text
    reconstruct(iterations=1, start=images)
    assert "averaged to a grid coarser by 4" in caplog.text


def test_what_is_off_is_not_refused():
    attacker("optim.signed=none", "optim.step_size_decay=none", "augmentations={}")


def test_data_that_do_not_fit_are_refused():
    model = build_model("lenet_zhu")
    payload, shared, images, _ = observed(model)
    made = attacker(model=model)
    with pytest.raises(SharedDataError, match="initial_data is not finite"):
        made.reconstruct(payload, shared, initial_data=torch.full_like(images, float("nan")))
    with pytest.raises(SharedDataError, match="query"):
        made.reconstruct(payload * 2, shared * 2)
    for shape in ((7,), (8, 8), (3, 4, 8, 8)):
        other = [{**payload[0], "metadata": {**payload[0]["metadata"], "shape": shape}}]
        with pytest.raises(SharedDataError, match=r"not data of shape .*; valid: \(C, H, W\)"):
            made.reconstruct(other, shared)
    for change, text in (
        ({"num_data_points": 0}, "number of data points is 0"),
        ({"local_hyperparams": {"steps": 2}}, "local steps"),
    ):
        changed = [{**shared[0], "metadata": {**shared[0]["metadata"], **change}}]
        with pytest.raises(SharedDataError, match=text):
            made.reconstruct(payload, changed)
    for gradients in (shared[0]["gradients"][1:], [g * float("nan") for g in shared[0]["gradients"]]):
        with pytest.raises(BreachingExtError, match=r"gradient"):
            made.reconstruct(payload, [{**shared[0], "gradients": gradients}])


def test_ctrl_c_ends_the_loop_over_candidates(monkeypatch):
    from breaching_ext.matching.magia_engine import MagiaEngine

    original, calls = MagiaEngine.step, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 3 + 2:  # in the second of three candidates
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(MagiaEngine, "step", interrupted)
    options = ["restarts.num_trials=3", "restarts.parallel_candidates=false"]
    result, stats, *_ = reconstruct(*options, iterations=3)
    assert stats["interrupted"]
    assert len(calls) == 5
    assert result["candidates"].shape[0] == 2
    assert [len(stats[f"Trial_{n}_Val"]) for n in range(2)] == [3, 1]
