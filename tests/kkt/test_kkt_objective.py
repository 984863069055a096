"""The KKT residual: zero where theory says so, and the same in all its forms."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from breaching_ext.kkt import MLP, ExtractionOptions, SmallConv, build_problem
from breaching_ext.kkt.candidates import candidate_labels, draw_starts
from breaching_ext.kkt.extraction import Extraction
from breaching_ext.kkt.objective import GramResidual, autograd_residual
from breaching_ext.kkt.problem import smooth_function

SHAPE = (1, 4, 3)


def network(widths=(7,), biases="first", seed=0) -> MLP:
    torch.manual_seed(seed)
    model = MLP(SHAPE, widths, biases).double()
    model.mean.copy_(torch.rand(SHAPE))
    return model


def points(restarts=2, k=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(restarts, k, *SHAPE, generator=generator, dtype=torch.double)
    return x, torch.randn(restarts, k, generator=generator, dtype=torch.double)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 5), seed=st.integers(0, 1000))
def test_residual_is_zero_at_the_max_margin_solution_of_a_linear_model(count, seed):
    """Orthogonal points: w = Σ y_i x_i / ‖x_i‖² has margin 1 on all of them, hence λ_i = 1 / ‖x_i‖²."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(6, count, generator=generator, dtype=torch.double))
    x = basis.T * (0.5 + torch.rand(count, 1, generator=generator, dtype=torch.double))
    y = torch.randint(0, 2, (count,), generator=generator).double() * 2 - 1
    lam = 1 / x.square().sum(dim=1)
    w = (lam * y) @ x
    torch.testing.assert_close(y * (x @ w), torch.ones(count, dtype=torch.double))  # all are support vectors
    residual = GramResidual([(w[None], None)], steepness=10.0)
    assert float(residual(x[None], (lam * y)[None])) == pytest.approx(0, abs=1e-12)
    assert float(residual(1.1 * x[None], (lam * y)[None])) > 1e-3 * residual.norm


def test_a_point_beyond_the_margin_has_multiplier_zero():
    """Support vectors at ±1 on the first axis; (5, 3) is farther out, so w = (1, 0) and λ = (½, ½, 0)."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [5.0, 3.0]], dtype=torch.double)
    residual = GramResidual([(torch.tensor([[1.0, 0.0]], dtype=torch.double), None)], steepness=10.0)
    signed = torch.tensor([[0.5, -0.5, 0.0]], dtype=torch.double)
    assert float(residual(x[None], signed)) == pytest.approx(0, abs=1e-15)
    assert float(residual(x[None], signed + torch.tensor([0.0, 0.0, 0.1]))) > 0.1


def test_residual_is_zero_for_a_relu_network_that_its_data_explain():
    """One unit active on x = e₁, one on x = −e₁ with label −1: balanced layers and λ = 1 satisfy θ = Σ λ y ∇Φ."""
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.double)
    head = torch.tensor([[1.0, -1.0]], dtype=torch.double)
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], dtype=torch.double)
    residual = GramResidual([(weight, None), (head, None)], steepness=float("inf"))
    assert float(residual(x, torch.tensor([[1.0, -1.0]], dtype=torch.double))) == pytest.approx(0, abs=1e-15)


@settings(max_examples=20, deadline=None)
@example(widths=[5], biases="first", restarts=2, k=2, steepness=20.0)  # failed with torch's threshold of the softplus
@given(
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    biases=st.sampled_from(["first", "none", "all"]),
    restarts=st.integers(1, 3),
    k=st.integers(1, 4),
    steepness=st.sampled_from([1.0, 20.0, float("inf")]),
)
def test_gram_form_equals_explicit_form(widths, biases, restarts, k, steepness):
    """Values, and gradients in images and multipliers, for any depth; the explicit form is autograd throughout."""
    model = network(widths, biases)
    x, c = points(restarts, k)
    function, parameters = smooth_function(model, steepness)
    results = []
    for residual in (
        lambda a, b: GramResidual(
            [(w.detach(), None if v is None else v.detach()) for w, v in model.linears], steepness
        )(a.flatten(2), b),
        lambda a, b: autograd_residual(function, parameters, a + model.mean, b),
    ):
        a, b = x.clone().requires_grad_(), c.clone().requires_grad_()
        value = residual(a, b)
        results.append((value, *torch.autograd.grad(value.sum(), [a, b], allow_unused=True, materialize_grads=True)))
    for gram, explicit in zip(*results, strict=True):
        torch.testing.assert_close(gram, explicit, rtol=1e-8, atol=1e-8)


def test_explicit_form_is_the_distance_of_the_parameters_from_the_sum_of_gradients():
    model = SmallConv((1, 8, 8), (2, 3)).double()
    x, c = torch.randn(2, 3, 1, 8, 8, dtype=torch.double), torch.randn(2, 3, dtype=torch.double)
    function, parameters = smooth_function(model, float("inf"))
    found = autograd_residual(function, parameters, x, c)
    for restart in range(2):
        gradients = torch.autograd.grad((c[restart] * model(x[restart])[:, 0]).sum(), list(model.parameters()))
        distance = sum((p - g).square().sum() for p, g in zip(model.parameters(), gradients, strict=True))
        assert float(found[restart]) == pytest.approx(float(distance.detach()))


def test_a_convolution_sees_images_with_the_mean_that_it_subtracts():
    torch.manual_seed(0)
    model = SmallConv((1, 8, 8), (2, 3)).double()
    model.mean.copy_(torch.rand(1, 8, 8))
    images, c = torch.rand(1, 3, 1, 8, 8, dtype=torch.double), torch.randn(1, 3, dtype=torch.double)
    problem = build_problem(model, float("inf"))
    found = problem.residual(problem.coordinates_of(images), c, ())
    gradients = torch.autograd.grad((c[0] * model(images[0])[:, 0]).sum(), list(model.parameters()))
    distance = sum((p - g).square().sum() for p, g in zip(model.parameters(), gradients, strict=True))
    assert float(found) == pytest.approx(float(distance.detach()))
    torch.testing.assert_close(problem.pixels(problem.coordinates_of(images)), images)


def test_gradients_against_finite_differences():
    """Multipliers and slacks with smooth slopes; images with the plain ReLU, where ours is the derivative."""
    model = network((5, 4))
    layers = [(w.detach(), None if v is None else v.detach()) for w, v in model.linears]
    x, c = points(1, 3)
    flat, slack = x.flatten(2), [torch.randn(1, 3, 5, dtype=torch.double), torch.randn(1, 3, 4, dtype=torch.double)]
    smooth, plain = GramResidual(layers, 3.0), GramResidual(layers, float("inf"))
    leaves = [t.clone().requires_grad_() for t in (c, *slack)]
    assert torch.autograd.gradcheck(lambda b, *u: smooth(flat, b, u), leaves)
    leaves = [t.clone().requires_grad_() for t in (flat, c)]
    assert torch.autograd.gradcheck(lambda a, b: plain(a, b), leaves)


def test_span_loses_nothing_when_it_holds_the_first_layer():
    """Images of the span have the same residual in coordinates as in pixels, with the rest of the norm kept."""
    model = network((40,)).float()
    basis = torch.linalg.qr(torch.randn(12, 3))[0].T
    with torch.no_grad():
        model.layers[0].weight.copy_(torch.randn(40, 3) @ basis + 1e-3 * torch.randn(40, 12))
    inside, full = build_problem(model, 20.0, "auto", 6), build_problem(model, 20.0, "full", 6)
    assert inside.span is not None
    assert inside.span.rank == 3
    coordinates, c = torch.randn(2, 6, 3), torch.randn(2, 6)
    pixels = inside.pixels(coordinates)
    torch.testing.assert_close(inside.coordinates_of(pixels), coordinates, rtol=1e-4, atol=1e-4)
    assert inside.norm == pytest.approx(full.norm, rel=1e-5)
    torch.testing.assert_close(
        inside.residual(coordinates, c, []), full.residual(full.coordinates_of(pixels), c, []), rtol=1e-3, atol=1e-2
    )


def search(seeds, options, model, steps=None):
    problem = build_problem(model, 10.0, "full")
    starts, generators = draw_starts(problem, 4, seeds, 0.1)
    run = Extraction(problem, candidate_labels(4).to(starts), starts, options, generators)
    return run, run.run(progress=False, until=steps)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_batched_restarts_are_looped_restarts(optimizer):
    model, options = network((8,)), ExtractionOptions(steps=40, optimizer=optimizer, lr=0.01)
    _, together = search([5, 6, 7], options, model)
    for index, seed in enumerate([5, 6, 7]):
        _, alone = search([seed], options, model)
        torch.testing.assert_close(together.coordinates[index], alone.coordinates[0])
        torch.testing.assert_close(together.multipliers[index], alone.multipliers[0])
        torch.testing.assert_close(together.losses[index], alone.losses[0])
        assert together.histories[index] == pytest.approx(alone.histories[0])


def test_extraction_goes_on_bit_for_bit():
    model, options = network((8,)), ExtractionOptions(steps=30)
    _, whole = search([1, 2], options, model)
    first, _ = search([1, 2], options, model, steps=11)
    state = copy.deepcopy(first.state_dict())
    second, _ = search([1, 2], options, model, steps=0)
    second.load_state_dict(state)
    resumed = second.run(progress=False)
    assert torch.equal(whole.coordinates, resumed.coordinates)
    assert torch.equal(whole.losses, resumed.losses)
    assert torch.equal(whole.multipliers, resumed.multipliers)


def test_the_best_point_is_kept_and_its_loss_is_its_residual():
    run, found = search([1, 2], ExtractionOptions(steps=100, slack=0.0), network((8,)))
    assert all(history[-1] < history[0] for history in found.histories)
    now = run.problem.residual(found.coordinates, found.multipliers * run.labels, []) / run.problem.norm
    torch.testing.assert_close(now.detach(), found.losses)
    assert (found.losses <= found.objective).all()  # priors are not negative


def test_a_restart_that_diverges_does_not_touch_the_others():
    model, options = network((8,)), ExtractionOptions(steps=30)
    _, whole = search([1, 2], options, model)
    run, _ = search([1, 2], options, model, steps=0)
    with torch.no_grad():
        run.x[1] = float("nan")
    found = run.run(progress=False)
    torch.testing.assert_close(found.coordinates[0], whole.coordinates[0])
    assert found.losses[0].isfinite()
    assert found.losses[1] == float("inf")
    assert found.failures == [1]
    assert not found.nowhere


def test_a_step_that_is_too_large_leads_nowhere():
    """The start was finite, so its loss is; what a step made of it is not."""
    run, found = search([1, 2], ExtractionOptions(steps=5, lr=1e200), network((8,)))
    assert found.losses.isfinite().all()
    assert found.failures == [0, 1]
    assert found.nowhere
    resumed, _ = search([1, 2], ExtractionOptions(steps=5, lr=1e200), network((8,)), steps=0)
    resumed.load_state_dict(run.state_dict())
    assert resumed.run(progress=False).nowhere
    _, good = search([1, 2], ExtractionOptions(steps=30), network((8,)))
    assert good.best_steps.min() > 0
    assert good.failures == []


def test_ctrl_c_keeps_what_there_is():
    run, _ = search([1], ExtractionOptions(steps=30), network((8,)), steps=0)

    def stop(done: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    found = run.run(progress=False, on_step=stop)
    assert found.interrupted
    assert run.step_count == 5
    assert found.losses.isfinite().all()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer": "lion"}, "optim.optimizer"),
        ({"steps": 0}, "optim.max_iterations=0"),
        *(({name: 0.0}, f"extraction.{name}=0.0") for name in ("lr", "lr_lambda", "init_scale", "lambda_init")),
        *(
            ({name: -1.0}, f"extraction.{name}=-1.0")
            for name in ("lr_slack", "slack", "box_weight", "lambda_weight", "lambda_min")
        ),
    ],
)
def test_impossible_options(values, words):
    with pytest.raises(ValueError, match=words):
        ExtractionOptions(**values)
