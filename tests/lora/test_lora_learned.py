"""The learned decoder: public pairs only, always agrees with the observation, and no worse than nothing."""

from __future__ import annotations

import pytest
import torch

from breaching_ext.errors import ConfigError
from breaching_ext.lora import learned
from breaching_ext.lora.decode import Factors, cosine, factor_gradients, minimum_norm
from breaching_ext.lora.learned import RidgeDecoder

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Every test draws the same, whatever ran before it."""
    GENERATOR.manual_seed(1)


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.double)


FACTORS = {
    "one": Factors(gaussian(3, 8), torch.zeros(6, 3).double(), 1.0),
    "two": Factors(gaussian(2, 5), gaussian(4, 2), 2.0),
}
SHAPES = {"one": (6, 8), "two": (4, 5)}


def closed_form(gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The minimum-norm estimate of every layer."""
    return {
        name: minimum_norm(*factor_gradients(gradient[name], factors), factors) for name, factors in FACTORS.items()
    }


def structured(count: int, directions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients in a small subspace that all layers share, of different sizes."""
    weights = gaussian(count, 4) * torch.rand(count, 1, generator=GENERATOR, dtype=torch.double)
    return {name: torch.einsum("nk,koi->noi", weights, basis) for name, basis in directions.items()}


def test_structure_is_learned_and_the_observation_is_kept():
    directions = {name: gaussian(4, *shape) for name, shape in SHAPES.items()}
    public, (client,) = structured(60, directions), [structured(1, directions)]
    decoder = RidgeDecoder.fit(public, FACTORS, torch.arange(60) % 2 == 1)
    gradient = {name: stack[0] for name, stack in client.items()}
    seen = closed_form(gradient)
    decoded = decoder.complete(seen)
    assert cosine(list(decoded.values()), list(gradient.values())) > 0.999
    assert cosine(list(seen.values()), list(gradient.values())) < 0.95
    assert decoder.held_out_cosine > 0.999 > decoder.closed_form_cosine
    for name in FACTORS:
        for sent, again in zip(
            factor_gradients(gradient[name], FACTORS[name]), factor_gradients(decoded[name], FACTORS[name]), strict=True
        ):
            torch.testing.assert_close(sent, again)


def test_without_structure_it_predicts_next_to_nothing():
    public = {name: gaussian(40, *shape) for name, shape in SHAPES.items()}
    decoder = RidgeDecoder.fit(public, FACTORS, torch.arange(40) % 2 == 1)
    assert decoder.held_out_cosine < decoder.closed_form_cosine + 0.02
    fresh = [{name: gaussian(*shape) for name, shape in SHAPES.items()} for _ in range(20)]
    for gradient in fresh:  # chosen by pairs of its own, so on others it may lose a little, but not more
        truth, seen = list(gradient.values()), closed_form(gradient)
        assert cosine(list(decoder.complete(seen).values()), truth) > cosine(list(seen.values()), truth) - 0.05


@pytest.mark.parametrize("kernel", learned.KERNELS)
def test_the_held_out_cosine_is_the_cosine_of_decoding(kernel):
    """The Gram-matrix shortcut against decoding the held-out pairs one by one."""
    public = {name: gaussian(20, *shape) + 1 for name, shape in SHAPES.items()}
    test = torch.arange(20) % 2 == 1
    seen, rest = learned.seen_and_unseen(public, FACTORS)
    scales = {"one": 0.3, "two": 2.0}
    features, norms = learned._features(seen, scales)
    rest = {name: stack / norms[:, None, None] for name, stack in rest.items()}
    found = learned._Validation(features, norms, public, seen, rest, test)(kernel, 0.7, 0.1)

    train = features[~test]
    weights = learned._solve(learned._kernel(kernel, 0.7, train, train), 0.1)
    kept = {name: stack[~test] for name, stack in rest.items()}
    decoder = RidgeDecoder(train, kept, weights, scales, kernel, 0.7, 0.1, 0.0, 0.0)
    cosines = []
    for n in test.nonzero().flatten():
        gradient = {name: stack[n] for name, stack in public.items()}
        cosines.append(cosine(list(decoder.complete(closed_form(gradient)).values()), list(gradient.values())))
    assert found == pytest.approx(sum(cosines) / len(cosines), rel=1e-9)


def test_too_few_pairs_are_refused():
    with pytest.raises(ConfigError, match="public=3"):
        RidgeDecoder.fit({name: gaussian(3, *shape) for name, shape in SHAPES.items()}, FACTORS, torch.arange(3) == 1)
