"""Single steps of the extraction and of the training, against the same formulas written out in plain Python."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from breaching_ext.kkt import MLP, ExtractionOptions, Recipe, descent
from breaching_ext.kkt.candidates import draw_starts
from breaching_ext.kkt.extraction import Extraction
from breaching_ext.kkt.objective import GramResidual
from breaching_ext.kkt.problem import Problem
from breaching_ext.kkt.recipe import initialise

NORM, PIXELS, UNITS, K = 2.0, 3, 2, 4
#: every number differs from every other, so that none can stand in another's place
OPTIONS = ExtractionOptions(
    steps=4, lr=0.3, lr_lambda=0.05, lr_slack=0.9, lambda_min=0.2, lambda_weight=3.0, lambda_init=0.15, init_scale=1.5,
    slack=0.4, box_weight=0.7, optimizer="sgd",
)  # fmt: skip


def bowl(x, c, slack=()):
    """‖x‖² + Σ c² + Σ (u₀ − u₁), whose gradients are known."""
    total = x.square().flatten(1).sum(dim=1) + c.square().sum(dim=1)
    return total + sum((u[..., 0] - u[..., 1]).sum(dim=1) for u in slack)


def search(options, seeds=(5, 6), fixed=False):
    """A search of 1 x 3 pixels, on both sides of the pixel range, with one layer of slacks."""
    mean = torch.full((1, 1, PIXELS), 0.25, dtype=torch.double)
    problem = Problem(bowl, NORM, mean, (1, 1, PIXELS), None, [UNITS])
    starts, generators = draw_starts(problem, K, list(seeds), options.init_scale)
    labels = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.double)
    return Extraction(problem, labels, starts, options, generators, fixed)


def by_hand(x, lam, steps, options):
    """The same steps of one restart, number by number: lists x (K · PIXELS), λ (K), slacks (K · UNITS)."""
    slack, speeds = [0.0] * (K * UNITS), [[0.0] * (K * PIXELS), [0.0] * K, [0.0] * (K * UNITS)]
    for step in range(steps):
        share = (1 + math.cos(math.pi * step / options.steps)) / 2
        beyond = [v + 0.25 - min(max(v + 0.25, 0.0), 1.0) for v in x]
        of_x = [2 * v / NORM + options.box_weight * 2 * b / K for v, b in zip(x, beyond, strict=True)]
        of_lam = [2 * v / NORM - options.lambda_weight * 2 * max(options.lambda_min - v, 0.0) for v in lam]
        for values, gradient, speed, rate in (
            (x, of_x, speeds[0], options.lr),
            (lam, of_lam, speeds[1], options.lr_lambda),
            (slack, [1 / NORM, -1 / NORM] * K, speeds[2], options.lr_slack),
        ):
            for i, g in enumerate(gradient):
                speed[i] = 0.9 * speed[i] + g
                values[i] -= rate * share * speed[i]
        slack = [min(max(u, -options.slack), options.slack) for u in slack]
    return x, lam, slack


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_are_gradient_descent_with_momentum_and_priors(steps):
    run = search(OPTIONS)
    assert (run.x.min() < -0.25) & (run.x.max() > 0.75), "the pixel range matters"
    assert (run.lam.min() < OPTIONS.lambda_min) & (run.lam.max() > OPTIONS.lambda_min), "the penalty matters"
    starts = [(x.flatten().tolist(), lam.tolist()) for x, lam in zip(run.x, run.lam, strict=True)]
    for _ in range(steps):
        run.step()
    for restart, (x, lam) in enumerate(starts):
        expected = by_hand(x, lam, steps, OPTIONS)
        for found, wanted in zip((run.x, run.lam, *run.slack), expected, strict=True):
            assert found[restart].flatten().tolist() == pytest.approx(wanted, abs=1e-12)
    assert run.slack[0][0, 0].tolist() == [-0.4, 0.4]  # at their bounds


def test_adam_moves_each_by_its_own_rate():
    """Adam's first step is its rate against the gradient's sign, at the full rate of the cosine."""
    run = search(replace(OPTIONS, optimizer="adam", slack=5.0))
    before = [t.detach().clone() for t in (run.x, run.lam, *run.slack)]
    run.step()
    for was, now, rate in zip(before, (run.x, run.lam, *run.slack), (0.3, 0.05, 0.9), strict=True):
        torch.testing.assert_close((now.detach() - was).abs(), torch.full_like(was, rate), rtol=1e-5, atol=1e-6)


def test_the_objective_is_the_loss_with_its_priors():
    """And the point is kept by the objective, whose loss may be larger than another's."""
    run = search(OPTIONS)
    x, lam = run.x.detach()[0], run.lam.detach()[0]
    pixels = x + 0.25
    box = sum(float((p - min(max(float(p), 0.0), 1.0)) ** 2) for p in pixels.flatten()) / K
    penalty = sum(max(0.2 - float(v), 0.0) ** 2 for v in lam)
    loss = (float(x.square().sum()) + float(lam.square().sum())) / NORM
    assert float(run.step()[0]) == pytest.approx(loss)
    assert float(run.best.losses[0]) == pytest.approx(loss)
    assert float(run.best.objective[0]) == pytest.approx(loss + 0.7 * box + 3.0 * penalty)
    kept = run.best.losses.clone()
    run._keep(kept - 1, run.best.objective + 1)  # a smaller loss, but the priors are worse
    assert torch.equal(run.best.losses, kept)


def test_the_best_point_stays_when_the_search_leaves_it():
    run = search(OPTIONS)
    run.step()
    point, multipliers, best = run.best.coordinates.clone(), run.best.multipliers.clone(), run.best.objective.clone()
    with torch.no_grad():
        run.x[0] += 10
        run.lam[0] += 10
        run.x[1] *= 0.5  # nearer
    better = run.x.detach()[1].clone()
    run.step()
    assert torch.equal(run.best.coordinates[0], point[0])
    assert torch.equal(run.best.multipliers[0], multipliers[0])
    assert torch.equal(run.best.coordinates[1], better)
    assert run.best.objective[0] == best[0]
    assert run.best.objective[1] < best[1]
    assert run.best.best_steps.tolist() == [0, 1]


def test_starts_are_drawn_from_the_seeds():
    run = search(OPTIONS)
    for restart, seed in enumerate((5, 6)):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(K, 1, 1, PIXELS, generator=generator)
        torch.testing.assert_close(run.x.detach()[restart], 1.5 * images.double())
        draws = torch.rand(K, generator=generator, dtype=torch.double)
        torch.testing.assert_close(run.lam.detach()[restart], 0.15 * (0.5 + draws))
    assert not any(u.any() for u in run.slack)


def test_images_can_be_held_fixed():
    run = search(OPTIONS, fixed=True)
    x, lam = run.x.clone(), run.lam.detach().clone()
    run.step()
    assert torch.equal(run.x, x)
    assert not torch.equal(run.lam.detach(), lam)


def test_without_slacks_there_are_none():
    run = search(replace(OPTIONS, slack=0.0))
    assert run.slack == []
    run.step()


def test_a_slack_shifts_the_slope_of_its_unit():
    """One unit, Φ = v · relu(w x + b): the gradient is (relu(z), v s x, v s) with s = σ(steepness z + u)."""
    w, b, v, x, c, u, steepness = 0.7, -0.1, 1.3, 0.4, 0.9, 0.6, 5.0
    z = w * x + b
    slope = 1 / (1 + math.exp(-(steepness * z + u)))
    wanted = (v - c * z) ** 2 + (w - c * v * slope * x) ** 2 + (b - c * v * slope) ** 2
    one = [torch.tensor([[value]], dtype=torch.double) for value in (w, v)]
    residual = GramResidual([(one[0], torch.tensor([b], dtype=torch.double)), (one[1], None)], steepness, outside=0.25)
    point = torch.tensor([[[x]]], dtype=torch.double)
    slack = [torch.tensor([[[u]]], dtype=torch.double)]
    found = residual(point, torch.tensor([[c]], dtype=torch.double), slack)
    assert float(found) == pytest.approx(wanted + 0.25)
    assert residual.norm == pytest.approx(w**2 + b**2 + v**2 + 0.25)


def test_a_plain_relu_has_slope_zero_on_its_kink():
    """As torch's has: Φ = v · relu(w x + b) at z = 0 has no gradient."""
    one = [torch.tensor([[value]], dtype=torch.double) for value in (0.5, 1.5)]
    residual = GramResidual([(one[0], torch.tensor([-0.25], dtype=torch.double)), (one[1], None)], float("inf"))
    found = residual(torch.tensor([[[0.5]]], dtype=torch.double), torch.tensor([[2.0]], dtype=torch.double))
    assert float(found) == residual.norm


@pytest.mark.parametrize("decay", [0.0, 0.02, 1e9])
def test_a_step_of_the_training(decay):
    """θ − lr ∇L / (L ‖∇ log L‖²), after θ has shrunk by decay · lr / (L ‖∇ log L‖²), by at most half."""
    torch.manual_seed(0)
    model = MLP((1, 2, 3), (5, 4)).double()
    images, labels = torch.rand(3, 1, 2, 3, dtype=torch.double), torch.tensor([1.0, -1.0, 1.0], dtype=torch.double)
    parameters = list(model.parameters())
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(images)[:, 0], (labels + 1) / 2)
    gradients = torch.autograd.grad(loss, parameters)
    rate = 0.03 * loss.item() / float(sum(g.square().sum() for g in gradients))  # of L: ∇ log L = ∇L / L
    shrink = max(0.5, 1 - decay * rate)
    wanted = [shrink * p.detach() - rate * g for p, g in zip(parameters, gradients, strict=True)]
    step = descent.Descent(model, images, labels, Recipe(lr=0.03, weight_decay=decay))
    assert float(step.step()) == pytest.approx(math.log(loss.item()))
    for found, expected in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(found.detach(), expected)


def test_a_small_step_lowers_the_log_loss_by_the_rate():
    torch.manual_seed(0)
    model = MLP((1, 2, 3), (5,)).double()
    images, labels = torch.rand(3, 1, 2, 3, dtype=torch.double), torch.tensor([1.0, -1.0, 1.0], dtype=torch.double)
    step = descent.Descent(model, images, labels, Recipe(lr=1e-4))
    assert float(step.step() - step.step()) == pytest.approx(1e-4, rel=1e-2)


def test_the_start_of_a_training():
    """The first layer has the recipe's deviation and no bias, the others torch's 1 / √(3 fan-in) times the head's."""
    recipe = Recipe(first_layer_std=0.02, head_scale=1.0, seed=3)
    models = [MLP((1, 20, 20), (300, 200)) for _ in range(4)]
    variants = (recipe, replace(recipe, head_scale=0.5), replace(recipe, first_layer_std=0.01), replace(recipe, seed=4))
    for model, variant in zip(models, variants, strict=True):
        with torch.no_grad():
            model.layers[0].bias.fill_(1.0)
        initialise(model, variant)
    plain, head, first, other = ([w.detach() for w, _ in model.linears] for model in models)
    assert not any(model.layers[0].bias.any() for model in models)
    assert float(plain[0].std()) == pytest.approx(0.02, rel=0.02)
    assert float(plain[1].std()) == pytest.approx(1 / math.sqrt(3 * 300), rel=0.02)
    assert float(plain[2].std()) == pytest.approx(1 / math.sqrt(3 * 200), rel=0.2)
    torch.testing.assert_close(head, [plain[0], 0.5 * plain[1], 0.5 * plain[2]])
    torch.testing.assert_close(first, [0.5 * plain[0], plain[1], plain[2]])
    assert not torch.allclose(other[0], plain[0])
