"""Training to near-stationarity: the loss, the two forms of a step, stopping, resuming, bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from breaching_ext.errors import ConfigError, SharedDataError
from breaching_ext.kkt import (
    MLP,
    Recipe,
    SmallConv,
    build_network,
    descent,
    multipliers,
    singular_values_in_span,
    train,
    training,
)
from breaching_ext.kkt.extraction import Extraction
from breaching_ext.kkt.models import SmoothBackwardReLU
from breaching_ext.kkt.multipliers import kkt_residual
from breaching_ext.kkt.recipe import initialise
from breaching_ext.kkt.span import signal_rank, span_of
from breaching_ext.kkt.training import train_or_load

SHAPE = (1, 6, 6)
RECIPE = Recipe(first_layer_std=1e-3, lr=0.02, target_loss=1e-8, check_every=200, max_steps=4000, seed=0)


def data(n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, *SHAPE, generator=generator), torch.tensor([1.0, -1.0] * n)[:n]


def network(widths=(60,)) -> MLP:
    model = MLP(SHAPE, widths)
    model.mean.fill_(0.5)
    return model


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-50, 25), min_size=1, max_size=6))
def test_log_loss_is_the_log_of_the_loss(margins):
    q = torch.tensor(margins, dtype=torch.double)
    direct = torch.nn.functional.softplus(-q).mean().log()
    torch.testing.assert_close(descent.log_loss(q), direct, rtol=1e-9, atol=1e-9)


def test_log_loss_goes_on_where_the_loss_underflows():
    q = torch.tensor([2000.0, 3000.0], requires_grad=True)
    value = descent.log_loss(q)
    assert float(value.detach()) == pytest.approx(-2000 - math.log(2))
    value.backward()
    torch.testing.assert_close(q.grad, torch.tensor([-1.0, 0.0]))


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_steps_in_the_span_are_steps_on_all_weights(decay):
    images, labels = data()
    recipe = replace(RECIPE, weight_decay=decay, first_layer_std=0.05)
    results = []
    for kind in (descent.Descent, descent.SpanDescent):
        model = network((20, 10)).double()
        initialise(model, recipe)
        steps = kind(model, images.double(), labels.double(), recipe)
        losses = [float(steps.step()) for _ in range(60)]
        steps.write_back()
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-8)
    assert results[0][0][-1] < results[0][0][0] - 0.5
    for plain, span in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(plain, span, rtol=1e-7, atol=1e-9)


def test_training_meets_both_targets_and_the_residual_is_that_of_the_data():
    images, labels = data()
    model = network()
    report = train(model, images, labels, RECIPE, progress=False)
    assert report.converged
    assert report.loss <= RECIPE.target_loss
    assert report.residual <= RECIPE.target_residual
    margins = labels * model(images)[:, 0]
    assert float(descent.log_loss(margins.double()).detach().exp()) == pytest.approx(report.loss, rel=0.05)
    others, _ = data(seed=9)
    assert kkt_residual(model, others, labels) > 20 * kkt_residual(model, images, labels)
    assert kkt_residual(network(), images, labels) > 0.5  # an untrained network satisfies nothing


def test_the_span_of_the_data_shows_in_the_first_layer():
    images, labels = data()
    model = network()
    train(model, images, labels, RECIPE, progress=False)
    weight, centred = model.layers[0].weight.detach(), (images - 0.5).flatten(1)
    span = span_of(weight, "auto", 8)
    assert span.rank <= 4
    inside = span_of(weight, 4).inside(centred)
    assert float(inside.norm() / centred.norm()) > 0.95  # any four directions: 0.33
    values = singular_values_in_span(weight, centred)
    torch.testing.assert_close(values[:2].float(), span.singular_values[:2], rtol=1e-3, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(60, 150), st.integers(60, 150), st.integers(1, 12), st.integers(0, 99))
def test_noise_is_told_from_signal_for_any_aspect(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator)
    aspect = min(rows, columns) / max(rows, columns)
    assert signal_rank(torch.linalg.svdvals(noise), aspect) == 0
    assert span_of(noise, "auto").full
    left, right = (torch.linalg.qr(torch.randn(n, rank, generator=generator))[0] for n in (rows, columns))
    strong = noise + 5 * (rows**0.5 + columns**0.5) * left @ right.T
    assert span_of(strong, "auto").rank == rank
    assert span_of(strong, "auto", candidates=1).rank == 1


@pytest.mark.parametrize(("units", "full"), [(12, True), (18, True), (20, False), (30, False)])
def test_a_part_of_the_data_is_not_taken_for_all(units, full):
    """Ten directions among so few singular values: where their median is data itself, the smaller look like noise."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 10, generator=generator))[0] for n in (units, 200))
    weight = left @ torch.logspace(1, 0, 10).diag() @ right.T + 1e-3 * torch.randn(units, 200, generator=generator)
    found = span_of(weight, "auto", candidates=20, images=10)
    assert found.full is full
    assert found.rank == (200 if full else 10)
    assert span_of(weight, "auto", candidates=20).rank < 10 or not full  # which is why


@pytest.mark.parametrize("rank", ["some", 0, True, 99])
def test_impossible_span(rank):
    with pytest.raises(ConfigError, match="span="):
        span_of(torch.randn(5, 4), rank)


@pytest.mark.parametrize(
    ("changed", "residual", "steps", "converged"),
    [
        ({"target_loss": 10.0}, 0.001, 2, True),  # both targets are met at the first look
        ({"target_loss": 10.0}, 0.5, 5, False),
        ({"target_loss": 1e-30}, 0.001, 5, False),
        ({"target_loss": 1e-30, "weight_decay": 0.01}, 0.001, 2, True),  # it has a finite loss
    ],
)
def test_when_a_training_ends(monkeypatch, changed, residual, steps, converged):
    """A look every second step, and at the fifth, the last."""
    monkeypatch.setattr(training, "kkt_residual", lambda *_: residual)
    recipe = replace(RECIPE, max_steps=5, check_every=2, **changed)
    report = train(network(), *data(), recipe, progress=False)
    assert (report.steps, report.residual, report.converged) == (steps, residual, converged)


@pytest.mark.parametrize(("name", "dtype"), [("auto", 64), ("double", 64), ("float64", 64), ("float32", 32)])
def test_the_precision_of_a_training(monkeypatch, name, dtype):
    seen = []
    monkeypatch.setattr(training, "kkt_residual", lambda model, *_: seen.append(model.mean.dtype) or 1.0)
    model = network()
    train(model, *data(), replace(RECIPE, max_steps=1, dtype=name), progress=False)
    assert seen == [getattr(torch, f"float{dtype}")]
    assert model.mean.dtype == torch.float


def test_a_training_that_diverges_is_named(monkeypatch):
    monkeypatch.setattr(training, "kkt_residual", lambda *_: 1.0)
    with pytest.raises(ConfigError, match=r"Training diverged after 4 steps .*lower case.training.lr=1e\+300"):
        train(network(), *data(), replace(RECIPE, max_steps=4, lr=1e300), progress=False)


def test_an_interrupted_residual_is_none(monkeypatch):
    """The search ends with its best so far on Ctrl-C; that is no residual, and the training stops."""
    images, labels = data()
    model = network()

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Extraction, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kkt_residual(model, images, labels)


def stop_after(steps, monkeypatch, recipe, file):
    """Train, press Ctrl-C after so many steps, and leave the checkpoint."""
    step, count = descent.SpanDescent.step, []

    def interrupted(self):
        count.append(1)
        if len(count) > steps:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patched:
        patched.setattr(descent.SpanDescent, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(network(), *data(), recipe, file, progress=False)
    assert file.exists()


def test_training_goes_on_bit_for_bit(tmp_path, monkeypatch):
    images, labels = data()
    recipe, file = replace(RECIPE, max_steps=800, target_loss=1e-30), tmp_path / "training.pt"
    whole = network()
    first = train(whole, images, labels, recipe, progress=False)
    stop_after(500, monkeypatch, recipe, file)
    resumed = network()
    second = train(resumed, images, labels, recipe, file, progress=False)
    assert (second.steps, second.loss, second.residual) == (first.steps, first.loss, first.residual)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not file.exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    images, labels = data()
    file = tmp_path / "training.pt"
    torch.save({"key": "other", "step": 1, "tensors": []}, file)
    with pytest.raises(ConfigError, match="another training run"):
        train(network(), images, labels, RECIPE, file, progress=False)


def test_another_seed_or_shape_is_another_run(tmp_path, monkeypatch):
    """Without a seed in the recipe the start is torch's, and belongs to the run as well."""
    images, labels = data()
    recipe, file = replace(RECIPE, seed=None, max_steps=20, check_every=10), tmp_path / "network.pt"
    torch.manual_seed(0)
    train_or_load(network(), images, labels, recipe, file)
    torch.manual_seed(0)
    train_or_load(network(), images, labels, recipe, file)
    with pytest.raises(ConfigError, match="other shape"):
        train_or_load(network((30,)), images, labels, recipe, file)
    torch.manual_seed(1)
    with pytest.raises(ConfigError, match="seed"):
        train_or_load(network(), images, labels, recipe, file)

    torch.save({"layers.0.weight": torch.zeros(2)}, tmp_path / "weights.pt")
    (tmp_path / "page.pt").write_text("<html>")
    for other in ("weights.pt", "page.pt"):
        with pytest.raises(ConfigError, match="is not a network that this package trained"):
            train_or_load(network(), images, labels, recipe, tmp_path / other)

    partial = tmp_path / "training.pt"
    stop_after(15, monkeypatch, recipe, partial)
    torch.manual_seed(2)
    with pytest.raises(ConfigError, match="another training run"):
        train(network(), images, labels, recipe, partial, progress=False)


def test_images_in_another_order_or_around_another_mean_are_another_run(tmp_path, monkeypatch):
    """Sums and labels would be the same."""
    images, labels = data()
    recipe, file, partial = replace(RECIPE, max_steps=20, check_every=10), tmp_path / "n.pt", tmp_path / "t.pt"
    other = network()
    other.mean.fill_(0.4)
    train_or_load(network(), images, labels, recipe, file)
    stop_after(15, monkeypatch, recipe, partial)
    for model, shown in ((network(), images[[2, 1, 0, 3]]), (other, images)):
        with pytest.raises(ConfigError, match="images"):
            train_or_load(model, shown, labels, recipe, file)
        with pytest.raises(ConfigError, match="another training run"):
            train(model, shown, labels, recipe, partial, progress=False)


def test_a_trained_network_is_not_lost_before_it_is_kept(tmp_path, monkeypatch):
    images, labels = data()
    recipe, file = replace(RECIPE, max_steps=20, check_every=10, target_loss=1e-30), tmp_path / "network.pt"
    with monkeypatch.context() as patched:
        write = training.write_atomically

        def killed(path, fill):
            if path == file:
                raise KeyboardInterrupt
            return write(path, fill)

        patched.setattr(training, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            train_or_load(network(), images, labels, recipe, file)
    assert (tmp_path / "network.part.pt").exists()
    found = train_or_load(network(), images, labels, recipe, file)
    assert [path.name for path in tmp_path.iterdir()] == ["network.pt"]
    whole = train(network(), images, labels, recipe, progress=False)
    assert found.steps == whole.steps == 20
    assert found.residual == pytest.approx(whole.residual)
    assert 0 < found.loss < whole.loss  # that is of the point before the last step


def test_a_training_that_ends_early_leaves_a_network_that_works(monkeypatch):
    images, labels = data()
    model, step, count = network(), descent.SpanDescent.step, []

    def interrupted(self):
        count.append(1)
        if len(count) > 30:
            raise KeyboardInterrupt
        return step(self)

    expected = network()
    train(expected, images, labels, replace(RECIPE, max_steps=30, check_every=30), progress=False)
    monkeypatch.setattr(descent.SpanDescent, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, images, labels, RECIPE, progress=False)
    torch.testing.assert_close(model(images), expected(images))


def test_a_full_disk_does_not_end_a_training(tmp_path, monkeypatch, caplog):
    def full(path, fill):
        raise OSError("No space left on device")

    monkeypatch.setattr(training, "write_atomically", full)
    recipe = replace(RECIPE, max_steps=30, check_every=10, target_loss=1e-30)
    report = train(network(), *data(), recipe, tmp_path / "training.pt", progress=False)
    assert report.steps == 30
    assert "could not be written (No space left" in caplog.text


def test_a_start_without_a_gradient_is_named():
    """One image that is the mean image: its pre-activations, and all gradients, are zero."""
    model = network()
    image = torch.rand(1, *SHAPE)
    model.mean.copy_(image[0])
    with pytest.raises(ConfigError, match="gradient of the loss is zero at the start"):
        train(model, image, torch.ones(1), RECIPE, progress=False)


def test_weight_decay_ends_at_a_finite_loss_near_a_kkt_point():
    images, labels = data()
    recipe = replace(RECIPE, weight_decay=0.03, max_steps=1500, check_every=1500, target_residual=0.0)
    report = train(network(), images, labels, recipe, progress=False)
    assert 1e-4 < report.loss < 0.3
    assert report.residual < 0.1
    assert not report.converged


def test_a_small_convolution_trains_in_float32(monkeypatch):
    monkeypatch.setattr(multipliers, "_STEPS", 40)  # of the residual, which takes longer than the training
    images, labels = data()
    recipe = replace(
        RECIPE,
        first_layer_std=0.05,
        lr=0.05,
        target_loss=1e-2,
        max_steps=200,
        check_every=100,
        target_residual=1.0,
        dtype="float32",
    )
    report = train(SmallConv(SHAPE, (4, 6)), images, labels, recipe, progress=False)
    assert report.loss < 1e-2
    assert 0 < report.residual < 1


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.rand(2, *SHAPE), torch.tensor([0.0, 1.0]), r"Labels \[0.0\].*-1 and \+1"),
        (torch.rand(0, *SHAPE), torch.zeros(0), "n=0"),
        (torch.rand(2, 3, 6, 6), torch.tensor([1.0, -1.0]), "do not fit"),
        (torch.rand(3, *SHAPE), torch.tensor([1.0, -1.0]), "do not fit"),
        (torch.rand(2, *SHAPE), torch.tensor([[1.0], [-1.0]]), "do not fit"),
        (torch.full((2, *SHAPE), math.nan), torch.tensor([1.0, -1.0]), "not finite"),
    ],
    ids=["labels", "empty", "shape", "count", "column", "finite"],
)
def test_bad_training_sets(images, labels, words):
    with pytest.raises(SharedDataError, match=words):
        train(network(), images, labels, RECIPE, progress=False)


@pytest.mark.parametrize(
    "values",
    [
        {"lr": 0.0},
        {"weight_decay": -1.0},
        {"dtype": "half"},
        {"max_steps": 0},
        {"max_steps": 1e5},
        {"target_residual": None},
        {"lr": None},
    ],
)
def test_impossible_recipes(values):
    with pytest.raises(ConfigError, match=r"training\."):
        Recipe(**values)


def test_networks_by_name():
    assert [tuple(w.shape) for w, _ in build_network("kkt-mlp-5-4", SHAPE).linears] == [(5, 36), (4, 5), (1, 4)]
    assert isinstance(build_network("kkt-conv", (3, 8, 8)), SmallConv)
    assert build_network("kkt-conv-2-3", (3, 7, 9))(torch.rand(2, 3, 7, 9)).shape == (2, 1)
    for name in ("kkt-resnet", "kkt-mlp-", "kkt-conv-3", "kkt-mlp-0"):
        with pytest.raises(ConfigError):
            build_network(name, SHAPE)


@settings(max_examples=30, deadline=None)
@given(st.floats(-3, 3), st.floats(0.5, 50))
def test_modified_relu(z, steepness):
    """Forward it is the ReLU; first and second derivative are those of the softplus."""
    x = torch.tensor(z, dtype=torch.double, requires_grad=True)
    value = SmoothBackwardReLU(steepness)(x)
    assert float(value.detach()) == pytest.approx(max(z, 0.0), abs=1e-12)
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    sigma = torch.sigmoid(steepness * x.detach())
    torch.testing.assert_close(slope.detach(), sigma, rtol=1e-6, atol=1e-8)
    (curvature,) = torch.autograd.grad(slope, x)
    torch.testing.assert_close(curvature, steepness * sigma * (1 - sigma), rtol=1e-6, atol=1e-6)


def test_homogeneity():
    """Twice the parameters of an L-layer network without deeper biases give 2^L times the output."""
    model = network((5, 4))
    with torch.no_grad():
        model.layers[0].bias.normal_()
        images, _ = data()
        before = model(images)
        for parameter in model.parameters():
            parameter.mul_(2)
        torch.testing.assert_close(model(images), 8 * before)
