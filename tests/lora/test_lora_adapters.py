"""peft's adapters obey the formulas, and adapting changes nothing but what is seen."""

from __future__ import annotations

import builtins
import copy
import importlib.util

import pytest
import torch

from breaching_ext.errors import BreachingExtError, ConfigError, SharedDataError
from breaching_ext.lora.adapters import (
    MissingPeftError,
    adapt,
    check_layers,
    factors_of,
    full_ranks,
    layer_shapes,
    random_factors,
    row_counts,
)
from breaching_ext.lora.case import SHAPE, Case, _batches
from breaching_ext.lora.decode import Factors, completed, cosine, factor_gradients, rank
from breaching_ext.lora.models import MODELS, build_model
from breaching_ext.lora.observation import Batch, FactorUpdate, factor_update, full_gradient, local_steps, sent_update
from breaching_ext.matching.client import matched_parameters

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="peft is not installed: pip install 'breaching-ext[lora]'"
)


def case(name: str, batch: int = 2) -> Case:
    return Case(name, (), seed=1, batch=batch, public=16)


@needs_peft
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("start", ["zero", "random"])
def test_the_gradients_of_pefts_adapters_are_the_formulas(name, start):
    """Linear and convolutional layers, against the gradient of the merged weight from autograd."""
    problem = case(name)
    factors = problem.factors(3, start, 0.7)
    sent = factor_update(problem.model, factors, problem.client).matrices(problem.adapted_layers)
    weights = [problem.model.get_parameter(f"{layer}.weight") for layer in problem.adapted_layers]
    loss = torch.nn.functional.cross_entropy(problem.model(problem.client.images), problem.client.labels)
    full = torch.autograd.grad(loss, weights)
    for layer, gradient in zip(problem.adapted_layers, full, strict=True):
        torch.testing.assert_close(gradient.flatten(1), problem.gradient[layer])
        for found, expected in zip(sent[layer], factor_gradients(gradient.flatten(1), factors[layer]), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@needs_peft
@pytest.mark.parametrize("name", MODELS)
def test_adapting_keeps_the_function_and_trains_the_factors_only(name):
    problem = case(name)
    factors = problem.factors("full", "random", 2.0)
    adapted = adapt(problem.model, factors)
    images = problem.client.images
    torch.testing.assert_close(adapted(images), problem.model(images), rtol=1e-9, atol=1e-9)
    assert not any("lora" in key for key, _ in problem.model.named_parameters()), "the model itself was changed"
    trainable = set(matched_parameters(adapted))
    expected = {f"{layer}.lora_{side}.default.weight" for layer in problem.adapted_layers for side in "AB"}
    assert trainable == expected
    for layer, factor in factors.items():
        read = factors_of(adapted, layer)
        assert torch.equal(read.a, factor.a)
        assert torch.equal(read.b, factor.b)
        assert read.scale == factor.scale


@needs_peft
def test_only_the_named_layers_are_adapted():
    """A name that ends like another must not take it in; each layer has its own rank."""
    model = build_model("vit", 0)
    layers = ["blocks.1.fc1", "patch"]
    factors = random_factors(layer_shapes(model, layers), {"blocks.1.fc1": 2, "patch": 5}, 1.0, "zero", 0)
    adapted = adapt(model, factors)
    assert {name.split(".lora_")[0] for name in matched_parameters(adapted)} == set(layers)
    assert factors_of(adapted, "patch").a.shape == (5, 48)


@needs_peft
@pytest.mark.parametrize("start", ["zero", "random"])
def test_a_full_rank_adapter_gives_the_gradient_away(start):
    problem = case("conv")
    factors = problem.factors("full", start, 1.0)
    sent = factor_update(problem.model, factors, problem.client).matrices(problem.adapted_layers)
    for layer in problem.adapted_layers:
        assert cosine([completed(*sent[layer], factors[layer])], [problem.gradient[layer]]) >= 0.999999


@needs_peft
def test_few_rows_bound_the_rank_and_a_small_adapter_gives_them_away():
    """Two photos through fc1: rank 2 at most, and r = 2 with B ≠ 0 decodes it; r = 1 does not."""
    problem = case("conv")
    assert problem.rows == {"conv1": 512, "conv2": 128, "conv3": 32, "fc1": 2, "fc2": 2}
    for r, exact in ((1, False), (2, True)):
        factors = problem.factors(r, "random", 1.0)
        sent = factor_update(problem.model, factors, problem.client).matrices(problem.adapted_layers)
        for layer in ("fc1", "fc2"):
            assert rank(problem.gradient[layer]) <= problem.rows[layer]
            decoded = completed(*sent[layer], factors[layer], problem.rows[layer])
            assert (cosine([decoded], [problem.gradient[layer]]) >= 0.999999) is exact


def test_rows_of_tokens_and_positions():
    model = build_model("vit", 0)
    assert row_counts(model, ["patch", "blocks.0.qkv"], SHAPE, 3) == {"patch": 192, "blocks.0.qkv": 192}
    assert full_ranks(model, ["patch", "blocks.0.qkv"]) == {"patch": 48, "blocks.0.qkv": 144}


class Reusing(torch.nn.Module):
    """Calls `twice` two times, and uses the weight of `apart` without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3)
        self.twice, self.apart = torch.nn.Linear(12, 12), torch.nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x).flatten(1)
        return torch.nn.functional.linear(self.twice(torch.tanh(self.twice(x))), self.apart.weight)


def test_a_layer_that_is_called_twice_has_the_rows_of_both_calls():
    """The rank of its gradient reaches that of all rows, so no smaller number bounds it."""
    torch.manual_seed(0)
    model = Reusing().double()
    before = copy.deepcopy(model.state_dict())
    assert row_counts(model, ["twice"], (3, 2, 2), 4) == {"twice": 8}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "batch norm counted"
    assert not model.twice._forward_hooks
    images = torch.randn(4, 3, 2, 2, dtype=torch.double)
    gradient = full_gradient(model, ["twice"], Batch(images, torch.arange(4)))["twice"]
    assert rank(gradient) > 4
    with pytest.raises(ConfigError, match=r"layers='apart' is not called in a forward pass"):
        row_counts(model, ["twice", "apart"], (3, 2, 2), 4)


@needs_peft
@pytest.mark.parametrize("training", [True, False])
def test_adapting_keeps_training_and_evaluation_mode(training):
    """Of every module: a client that trains with batch norm has other gradients than one that has fixed it."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).double()
    model.train(training)
    model[2].eval()
    adapted = adapt(model, {"1": Factors(torch.rand(2, 4), torch.rand(3, 2), 1.0)})
    assert [adapted[i].training for i in range(3)] == [training, training, False]
    assert all(module.training is training for module in adapted[1].modules())
    images = torch.rand(5, 4, dtype=torch.double)
    torch.testing.assert_close(adapted(images), copy.deepcopy(model)(images))


@needs_peft
def test_local_steps_are_those_of_a_client_that_trains_the_adapter():
    """Against torch.optim.SGD on the adapted model, and the mean gradient that the decoder reads."""
    problem = case("conv")
    factors = problem.factors(2, "random", 1.0)
    steps, rate = 3, 0.05
    update = factor_update(problem.model, factors, problem.client, local_steps(steps, rate, problem.client.labels))
    trained = adapt(problem.model, factors)
    before = [p.detach().clone() for p in matched_parameters(trained).values()]
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(trained(problem.client.images), problem.client.labels).backward()
        optimizer.step()
    changes = [p.detach() - old for p, old in zip(matched_parameters(trained).values(), before, strict=True)]
    for found, expected in zip(update.tensors, changes, strict=True):
        torch.testing.assert_close(found, expected)
    mean = update.matrices(["fc2"])["fc2"][0]
    named = dict(zip(matched_parameters(trained), changes, strict=True))
    torch.testing.assert_close(mean, named["fc2.lora_A.default.weight"] / (-rate * steps))


@needs_peft
def test_local_steps_show_rows_that_one_step_from_b_zero_hides():
    """∂A is zero in the first step; after a second one the change of A has the row space of G."""
    problem = case("conv", batch=1)
    factors = problem.factors(1, "zero", 1.0)
    found = {}
    for steps in (1, 3):
        update = factor_update(problem.model, factors, problem.client, local_steps(steps, 0.01, problem.client.labels))
        decoded = completed(*update.matrices(["fc1"])["fc1"], factors["fc1"], rank_bound=1)
        found[steps] = cosine([decoded], [problem.gradient["fc1"]])
    assert found[1] < 0.5
    assert found[3] > 0.99


@needs_peft
def test_an_update_that_does_not_fit_the_adapters_is_refused():
    problem = case("conv")
    update = factor_update(problem.model, problem.factors(2, "random", 1.0), problem.client)
    with pytest.raises(SharedDataError, match=r"has 9 tensors; valid: one for each of the model's 10 parameters"):
        FactorUpdate(update.model, update.tensors[:-1], None)
    with pytest.raises(
        SharedDataError, match=r"conv1.lora_A.default.weight: shape \[16, 2, 1, 1\]; valid: \[2, 3, 5, 5\]"
    ):
        FactorUpdate(update.model, [update.tensors[1], update.tensors[0], *update.tensors[2:]], None)
    for read in (update.matrices, update.factors):
        with pytest.raises(ConfigError, match=r"layer='fc9' has no adapter; valid: conv1, conv2, conv3, fc1, fc2"):
            read(["fc1", "fc9"])


@needs_peft
def test_one_local_step_is_the_gradient():
    problem = case("conv")
    factors = problem.factors(2, "random", 1.0)
    one = factor_update(problem.model, factors, problem.client, local_steps(1, 0.1, problem.client.labels))
    plain = factor_update(problem.model, factors, problem.client)
    for layer in problem.adapted_layers:
        for found, expected in zip(one.matrices([layer])[layer], plain.matrices([layer])[layer], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_public_gradients_are_gradients_of_photos_that_are_not_the_clients():
    problem = case("conv")
    stacks, held_out = problem.public_gradients
    assert held_out.tolist() == [False] * 8 + [True] * 8
    from breaching_ext.lora.case import _photos

    photos = _photos(range(16), training=True).images
    pair = Batch(torch.stack([photos[3], photos[4]]), problem.client.labels)
    expected = full_gradient(problem.model, problem.adapted_layers, pair)
    for layer in problem.adapted_layers:
        torch.testing.assert_close(stacks[layer][3], expected[layer])
    differences = (photos[:, None] - problem.client.images[None]).flatten(2).norm(dim=2)
    assert float(differences.min()) > 1.0


def test_seeds_differ_in_model_photo_and_factors():
    first, second = (Case("conv", (), seed=seed, batch=2) for seed in (0, 1))
    assert not torch.equal(first.model.conv1.weight, second.model.conv1.weight)
    assert not torch.equal(first.client.images, second.client.images)
    assert not torch.equal(first.factors(2, "zero", 1.0)["fc1"].a, second.factors(2, "zero", 1.0)["fc1"].a)
    assert torch.equal(first.model.conv1.weight, Case("conv", (), seed=0).model.conv1.weight)


@pytest.mark.parametrize("layers", [["conv9"], ["conv1", "norm"], []])
def test_unknown_layers_are_refused(layers):
    with pytest.raises(ConfigError, match=r"layers=.*valid: .*conv1"):
        check_layers(build_model("conv", 0), layers)


def test_grouped_convolutions_are_refused():
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ConfigError, match="groups=2"):
        check_layers(model, ["0"])


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding_mode": "circular", "padding": 1}])
def test_what_pefts_convolutions_leave_out_is_refused(options):
    """Their factors have neither, so the adapted layer would compute something else."""
    with pytest.raises(ConfigError, match=next(iter(options))):
        check_layers(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, **options)), ["0"])


def test_layers_that_share_a_weight_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    for name in ("0", "1"):
        with pytest.raises(ConfigError, match=r"shares its weight \(0.weight, 1.weight\)"):
            check_layers(model, [name])
    check_layers(model, ["2"])


def test_a_name_with_signs_of_patterns_is_a_name():
    model = torch.nn.ModuleDict({"a+b": torch.nn.Linear(4, 3), "aab": torch.nn.Linear(4, 3)})
    factors = Factors(torch.rand(2, 4), torch.rand(3, 2), 1.0)
    adapted = adapt(model, {"a+b": factors})
    assert torch.equal(factors_of(adapted, "a+b").a, factors.a)
    assert type(adapted["aab"]) is torch.nn.Linear


def test_adapters_that_are_more_than_a_product_or_have_another_name_are_refused():
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(12, 10))
    for options, name, words in (({"use_dora": True}, "default", "use_dora=True"), ({}, "client", "'client'")):
        config = peft.LoraConfig(r=3, target_modules=["0"], **options)
        changed = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=name)
        with pytest.raises(ConfigError, match=words):
            factors_of(changed, "base_model.model.0")


def test_rank_zero_is_refused_before_peft_is_asked():
    empty = Factors(torch.zeros(0, 256).double(), torch.zeros(32, 0).double(), 1.0)
    with pytest.raises(ConfigError, match="rank=0"):
        adapt(build_model("conv", 0), {"fc1": empty})


@pytest.mark.parametrize(("a", "b"), [((2, 255), (32, 2)), ((2, 256), (31, 2)), ((2, 256), (32, 3)), ((256,), (32, 1))])
def test_factors_of_other_shapes_are_refused(a, b):
    factors = Factors(torch.rand(a).double(), torch.rand(b).double(), 1.0)
    with pytest.raises(ConfigError, match=r"factors of layer 'fc1'.*valid: A \(r, 256\) and B \(32, r\)"):
        adapt(build_model("conv", 0), {"fc1": factors})


@pytest.mark.parametrize(
    ("steps", "rate", "word"), [(0, 0.1, "local_steps=0"), (-1, 0.1, "local_steps=-1"), (2, 0.0, "local_lr")]
)
def test_impossible_local_steps_are_refused(steps, rate, word):
    with pytest.raises(ConfigError, match=word):
        local_steps(steps, rate, torch.tensor([0]))


def test_without_peft_the_error_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    problem = case("conv")
    with pytest.raises(MissingPeftError, match=r"pip install 'breaching-ext\[lora\]'") as caught:
        adapt(problem.model, problem.factors(1, "zero", 1.0))
    assert isinstance(caught.value, BreachingExtError)


def test_models_are_the_same_from_the_same_seed_and_leave_the_random_state():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two = build_model("vit_tokens", 3), build_model("vit_tokens", 3)
    assert torch.equal(torch.get_rng_state(), state)
    images = torch.rand(2, *SHAPE, dtype=torch.double)
    assert torch.equal(one(images), two(images))
    assert one(images).shape == (2, 8)


def test_sent_update_is_of_trainable_parameters_only():
    model = build_model("conv", 0).requires_grad_(False)
    model.fc2.weight.requires_grad_(True)
    (gradient,) = sent_update(model, case("conv").client)
    assert gradient.shape == model.fc2.weight.shape


@pytest.mark.parametrize("size", [1, 2, 8])
def test_public_batches_do_not_cross_the_split(size):
    held_out = torch.arange(40) // 8 % 2 == 1
    batches = _batches(held_out, size)
    assert batches.shape == (40, size)
    assert torch.equal(batches[:, 0], torch.arange(40))
    assert (held_out[batches] == held_out[:, None]).all()
    assert all(len(set(row)) == size for row in batches.tolist())
