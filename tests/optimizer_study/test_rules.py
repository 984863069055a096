"""The rules against torch's and transformers' optimizers, in float64, and their own algebra."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from breaching_ext.optimizer_study.config import AdafactorConfig, AdamWConfig, Budget, OptimizerConfig
from breaching_ext.optimizer_study.optimizer import BaseOptimizer
from breaching_ext.optimizer_study.rules import UpdateRule, factored_dims, rms, step_scalars
from breaching_ext.optimizer_study.schedules import Cosine, WarmRestarts, create_schedule
from breaching_ext.optimizer_study.variants import VARIANTS, create_optimizer

STEPS, TOLERANCE = 60, 1e-12


def make_model():
    """Weights of one, two and four dimensions, in float64."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 3, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, 5),
        nn.Tanh(),
        nn.Linear(5, 4),
    ]
    return nn.Sequential(*layers).double()


def train(model, optimizer, before_step=None):
    """Sixty steps of a small regression; returns the parameters."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 1, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    for step in range(STEPS):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        if before_step is not None:
            before_step(optimizer, step)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def assert_same_path(config, build_reference, ours_before=None, reference_before=None, **kwargs):
    ours = make_model()
    got = train(ours, BaseOptimizer(ours.parameters(), config, **kwargs), ours_before)
    reference = make_model()
    want = train(reference, build_reference(reference.parameters()), reference_before)
    start = [p.detach() for p in make_model().parameters()]
    moved = max((a - b).abs().max().item() for a, b in zip(want, start, strict=True))
    assert moved > 1e-3  # the comparison is about a path, not about standing still
    assert max((a - b).abs().max().item() for a, b in zip(got, want, strict=True)) <= TOLERANCE


def test_adam_with_l2_is_torch_adam():
    assert_same_path(
        AdamWConfig(lr=0.01, weight_decay=0.03, decay="l2"),
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.03),
    )


def test_lr_coupled_decay_is_torch_adamw():
    assert_same_path(
        AdamWConfig(lr=0.01, weight_decay=0.3, decay="lr"),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    )


def test_paper_decay_is_torch_adamw_with_the_rate_divided_out():
    assert_same_path(
        AdamWConfig(lr=0.01, weight_decay=0.003, decay="schedule"),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.003 / 0.01),
    )


def test_sgd_with_l2_is_torch_sgd():
    assert_same_path(
        OptimizerConfig(lr=0.05, weight_decay=0.02),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.02),
    )


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_adafactor_is_that_of_transformers(beta1, weight_decay):
    transformers = pytest.importorskip("transformers.optimization", reason="needs transformers")
    assert_same_path(
        AdafactorConfig(beta1=beta1, weight_decay=weight_decay, decay="lr", factored_dims="last"),
        lambda p: transformers.Adafactor(
            p, beta1=beta1 or None, weight_decay=weight_decay, relative_step=True, scale_parameter=True
        ),
    )


def test_adafactor_without_decay_is_torchs():
    assert_same_path(
        AdafactorConfig(weight_decay=0.0, factored_dims="last"),
        lambda p: torch.optim.Adafactor(p, lr=0.01, eps=(1e-30, 1e-3), weight_decay=0.0),
    )


def test_a_schedule_acts_like_torchs_scheduler():
    schedule = Cosine(6)
    config = AdamWConfig(lr=0.01, weight_decay=0.3, decay="lr")

    def set_lr(optimizer, step):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * step / STEPS)) / 2

    assert_same_path(
        config,
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
        ours_before=lambda optimizer, step: optimizer.set_epoch(step / 10),
        reference_before=set_lr,
        schedule=schedule,
        budget=Budget(160, 16, 6),
    )


def scalars_for(config, lr, wd, t, eta=1.0, dtype=torch.float64):
    lr, wd = (torch.as_tensor(value, dtype=dtype) for value in (lr, wd))
    return step_scalars(config, lr, wd, t, eta, 1.0)


@settings(max_examples=40, deadline=None)
@given(
    variant=st.sampled_from(sorted(VARIANTS)),
    shape=st.lists(st.integers(1, 5), max_size=4).map(tuple),
    members=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_a_stack_is_its_members(variant, shape, members, seed):
    """Stacked members follow the path that each follows alone, whatever the shape."""
    config = VARIANTS[variant].config
    rule, generator = UpdateRule(config), torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    lr, wd = draw(members).exp() * 0.01, draw(members).exp() * 0.01
    stack = draw(members, *shape)
    alone = [stack[i : i + 1] for i in range(members)]
    state, states = rule.init_state(stack), [rule.init_state(p) for p in alone]
    for t in range(1, 5):
        grad = draw(members, *shape)
        stack, state = rule.apply(stack, grad, state, scalars_for(config, lr, wd, t))
        for i in range(members):
            one = scalars_for(config, lr[i : i + 1], wd[i : i + 1], t)
            alone[i], states[i] = rule.apply(alone[i], grad[i : i + 1], states[i], one)
    assert stack.shape == (members, *shape)
    torch.testing.assert_close(stack, torch.cat(alone), rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 6), cols=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_factored_moment_is_the_rank_one_estimate_of_the_paper(rows, cols, seed):
    """One step from zero gives g / √(R Cᵀ / 1ᵀR) with the sums R and C of Algorithm 4 (before clipping)."""
    config = AdafactorConfig(weight_decay=0.0, clip_threshold=1e9)
    generator = torch.Generator().manual_seed(seed)
    param, grad = torch.randn(2, 1, rows, cols, generator=generator, dtype=torch.float64)
    rule = UpdateRule(config)
    new, _ = rule.apply(param, grad, rule.init_state(param), scalars_for(config, [0.01], [0.0], 1))
    squared = grad[0] ** 2 + 1e-30
    estimate = squared.sum(1, keepdim=True) * squared.sum(0, keepdim=True) / squared.sum()
    expected = 0.01 * max(1e-3, param.square().mean().sqrt().item()) * grad[0] / estimate.sqrt()
    torch.testing.assert_close(param[0] - new[0], expected, rtol=1e-10, atol=1e-14)


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(1e-3, 1e3), d=st.floats(0.1, 3.0), seed=st.integers(0, 10**6))
def test_updates_are_clipped_to_their_threshold(scale, d, seed):
    """RMS(update / α) <= d after a jump of the gradient's size."""
    config = AdafactorConfig(weight_decay=0.0, clip_threshold=d)
    generator = torch.Generator().manual_seed(seed)
    param, first, second = torch.randn(3, 1, 4, 5, generator=generator, dtype=torch.float64)
    rule = UpdateRule(config)
    state = rule.init_state(param)
    for t, grad in ((1, first), (2, scale * second)):
        scalars = scalars_for(config, [0.01], [0.0], t)
        alpha = rule.step_size(param, scalars)
        before = param
        param, state = rule.apply(param, grad, state, scalars)
        assert (rms(before - param) / alpha).item() <= d * (1 + 1e-9)


@pytest.mark.parametrize("variant", ["C1", "C2", "D1", "D3"])
@pytest.mark.parametrize("large", [1.0, 1e5, 1e9])
def test_a_row_without_gradient_beside_large_ones_stays_finite_in_float32(variant, large):
    """The factor of that row is of order ε₁, those of the others of order g²; denormals are flushed, as in training."""
    rule = UpdateRule(VARIANTS[variant].config)
    param = torch.ones(1, 4, 3)
    grad = torch.zeros(1, 4, 3)
    grad[0, 0] = large
    torch.set_flush_denormal(True)
    try:
        new, _ = rule.apply(
            param, grad, rule.init_state(param), scalars_for(rule.config, [0.01], [0.0], 1, dtype=param.dtype)
        )
    finally:
        torch.set_flush_denormal(False)
    assert new.isfinite().all()
    assert (new[0, 0] < 1).all()


def test_adamw_learns_in_bfloat16():
    """β₂ = 0.999 is 1 there; its difference to 1 is not 0."""
    parameter, theirs = (torch.nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16)) for _ in range(2))
    ours = create_optimizer("B1", [parameter], wd_multiplier=0)
    group = ours.param_groups[0]
    torchs = torch.optim.AdamW([theirs], lr=group["lr"], weight_decay=0.0)
    for _ in range(20):
        for one in (parameter, theirs):
            one.grad = one.detach() - 0.5
        ours.step()
        torchs.step()
    torch.testing.assert_close(parameter, theirs, rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 3, 3, 3)])
def test_zero_gradients_stay_finite_in_float32(shape):
    """ε₁ = 1e-30 is never squared: torch's Adafactor turns to NaN here."""
    for variant in ("C1", "C2", "D1", "D3"):
        config = VARIANTS[variant].config
        rule, param = UpdateRule(config), torch.ones(2, *shape)
        state = rule.init_state(param)
        for t in range(1, 4):
            scalars = step_scalars(config, torch.full((2,), 0.01), torch.zeros(2), t, 1.0, 1.0)
            param, state = rule.apply(param, torch.zeros_like(param), state, scalars)
        torch.testing.assert_close(param, torch.ones(2, *shape))


def test_the_multiplier_stands_outside_the_minimum():
    """ρ_t = multiplier·min(0.01, 1/√t), so multipliers keep their ratio at every step."""
    config = AdafactorConfig()
    for t in (1, 10_000, 40_000):
        lr = scalars_for(config, [0.01, 0.02], [0.0, 0.0], t).lr
        expected = min(0.01, 1 / math.sqrt(t))
        torch.testing.assert_close(lr.tolist(), [expected, 2 * expected], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("shape", "choice", "expected"),
    [
        ((5,), "largest", None),
        ((), "last", None),
        ((6, 4), "largest", (0, 1)),
        ((64, 32, 3, 3), "largest", (0, 1)),
        ((64, 32, 3, 3), "last", (2, 3)),
        ((2, 8, 3, 4), "largest", (1, 3)),
    ],
)
def test_factored_dimensions(shape, choice, expected):
    assert factored_dims(shape, choice) == expected


def test_normalized_decay_follows_points_and_current_period():
    """λ = λ_norm·√(b/(B·T)), T being the period: 10 epochs first, 20 after the restart."""
    model = make_model()
    budget = Budget(points=640, batch_size=16, epochs=30)
    optimizer = create_optimizer("B8", model.parameters(), budget=budget)
    assert isinstance(optimizer.schedule, WarmRestarts)
    for epoch, period in ((0, 10), (9.99, 10), (10, 20), (29, 20)):
        optimizer.set_epoch(epoch)
        assert optimizer.decay_scale == pytest.approx(math.sqrt(16 / (640 * period)), rel=1e-14)


def test_decoupled_decay_ignores_the_learning_rate_and_coupled_does_not():
    """With no gradient, paper decay shrinks by η·λ; torch's by lr·λ."""
    for decay, expected in (("schedule", 1 - 0.5 * 0.1), ("lr", 1 - 0.5 * 0.01 * 0.1)):
        config = AdamWConfig(decay=decay)
        rule, param = UpdateRule(config), torch.ones(1, 3).double()
        new, _ = rule.apply(param, 0 * param, rule.init_state(param), scalars_for(config, [0.01], [0.1], 1, eta=0.5))
        torch.testing.assert_close(new, expected * param, rtol=1e-12, atol=0)


def test_state_survives_a_save():
    """state_dict and load_state_dict continue the same path."""
    model = make_model()
    optimizer = create_optimizer("D3", model.parameters())
    train(model, optimizer)
    clone = make_model()
    clone.load_state_dict(model.state_dict())
    other = create_optimizer("D3", clone.parameters())
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(train(model, optimizer), train(clone, other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_copies_and_pickles_step_like_the_original():
    model = make_model()
    optimizer = create_optimizer("D3", model.parameters())
    train(model, optimizer)
    copied_model, copied = copy.deepcopy((model, optimizer))
    pickled_model, pickled = pickle.loads(pickle.dumps((model, optimizer)))
    ours = train(model, optimizer)
    for other in (train(copied_model, copied), train(pickled_model, pickled)):
        for a, b in zip(ours, other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(("variant", "moved", "told"), [("B3", False, True), ("B3", True, False), ("C1", False, False)])
def test_a_schedule_that_is_never_moved_is_told_once(caplog, variant, moved, told):
    model = make_model()
    optimizer = create_optimizer(variant, model.parameters())
    if moved:
        optimizer.set_epoch(0.0)
    for _ in range(2):
        optimizer.step()
    assert caplog.text.count("stays at epoch 0") == told


@pytest.mark.parametrize("variant", ["A2", "B3", "D3"])
def test_groups_have_the_rates_that_torchs_optimizers_would_give_them(variant):
    """Those that are added later have the multipliers, too; what a group names itself is taken as it is."""
    config = VARIANTS[variant].config
    groups = [{"params": [nn.Parameter(torch.ones(2))], **own} for own in ({}, {"lr": 0.3}, {"weight_decay": 0.7})]
    ours = create_optimizer(variant, [groups[0]], lr_multiplier=0.5, wd_multiplier=8)
    theirs = torch.optim.AdamW([groups[0]], lr=config.lr * 0.5, weight_decay=config.weight_decay * 8)
    for group in groups[1:]:
        ours.add_param_group(dict(group))
        theirs.add_param_group(dict(group))
    at_once = create_optimizer(variant, groups, lr_multiplier=0.5, wd_multiplier=8)
    rates = [[(group["lr"], group["weight_decay"]) for group in one.param_groups] for one in (ours, theirs, at_once)]
    assert rates[0] == rates[1] == rates[2]


def test_create_optimizer_without_parameters_is_a_factory():
    optimizer = create_optimizer("A2", lr_multiplier=0.5)(make_model().parameters())
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_optimizer("Z9"), "variant_id='Z9'.*A1"),
        (lambda: create_optimizer("B1", decay="both"), "decay='both'.*l2, schedule, lr"),
        (lambda: create_optimizer("B1", speed=3), "'speed'.*weight_decay"),
        (lambda: create_optimizer("B1", schedule="linear"), "schedule='linear'.*cosine"),
        (lambda: AdamWConfig(beta1=1.0), "beta1=1.0"),
        (lambda: AdafactorConfig(factored_dims="all"), "factored_dims='all'"),
        (lambda: Budget(points=0), "points=0"),
    ],
)
def test_wrong_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_multipliers_and_factors_that_would_turn_descent_round():
    parameters = [torch.nn.Parameter(torch.ones(2))]
    for wrong in ({"lr_multiplier": -1.0}, {"lr_multiplier": 0.0}, {"wd_multiplier": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            create_optimizer("B3", parameters, **wrong)
    with pytest.raises(ValueError, match="gamma=-1"):
        create_schedule("step_drop", 10, gamma=-1.0)
    with pytest.raises(ValueError, match="normalized_decay='off'"):
        AdamWConfig(normalized_decay="off")
