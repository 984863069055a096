"""Distances between gradients: Breaching's formulas, their derivatives, and stacks of candidates."""

from __future__ import annotations

import pytest
import torch
from breaching.attacks.auxiliaries.objectives import objective_lookup
from hypothesis import given
from hypothesis import strategies as st

from breaching_ext.matching import objectives
from breaching_ext.matching.objectives import Observed, gradient_distance

NAMES = [
    *("euclidean", "l1", "cosine-similarity", "fast-cosine-similarity", "masked-cosine-similarity", "angular"),
    "tag-euclidean",
]
SHAPES = st.lists(st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple), min_size=1, max_size=6)


def upstream(name: str):
    return objective_lookup[name](scale=0.7, tag_scale=0.3, scale_scheme="linear")


def gradients(shapes, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", NAMES)
@given(shapes=SHAPES, small=st.sampled_from([0, 1, 8, 1000]), seed=st.integers(0, 99))
def test_value_and_derivative_are_breachings(name, compiled, shapes, small, seed):
    theirs, data = upstream(name), gradients(shapes, seed + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "SMALL", small)  # from every gradient on its own to all of them joined
        ours = gradient_distance(theirs, data, compiled)
    results = []
    for distance in (ours, lambda rec: theirs.gradient_based_loss(rec, data)):
        rec = [g.requires_grad_() for g in gradients(shapes, seed)]
        value = distance(rec).sum()
        results.append([value, *torch.autograd.grad(value, rec)])
    for mine, expected in zip(*results, strict=True):
        assert torch.allclose(mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_is_candidate_after_candidate(name):
    shapes = [(40, 30), (3, 2), (5,), ()]
    distance = gradient_distance(upstream(name), gradients(shapes, 0))
    stacks = [torch.stack(column) for column in zip(*(gradients(shapes, n) for n in range(1, 4)), strict=True)]
    batched = torch.func.vmap(torch.func.grad_and_value(lambda *rec: distance(rec), argnums=(0, 1, 2, 3)))(*stacks)
    for n in range(3):
        rec = [stack[n].clone().requires_grad_() for stack in stacks]
        value = distance(rec)
        assert torch.allclose(batched[1][n], value, rtol=1e-12)
        for stacked, alone in zip(batched[0], torch.autograd.grad(value, rec), strict=True):
            assert torch.allclose(stacked[n], alone, rtol=1e-12)


def test_the_derivative_of_the_squared_norm_can_be_differentiated():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(objectives._SquaredNorm.apply, x)
    assert torch.autograd.gradgradcheck(objectives._SquaredNorm.apply, x)


def test_small_gradients_are_joined_and_large_ones_are_not_copied():
    gradient = gradients([(40, 30), (3, 2), (5,)], 0)
    arranged = Observed(gradient).arrange(gradient)
    assert [tensor.numel() for tensor in arranged] == [1200, 11]
    assert arranged[0] is gradient[0]


def test_large_tensors_are_added_up_row_by_row(monkeypatch):
    data, rec = gradients([(40, 3, 2), (70,)], 0), gradients([(40, 3, 2), (70,)], 1)
    whole = gradient_distance(upstream("cosine-similarity"), data, compiled=True)(rec)
    monkeypatch.setattr(objectives, "LARGE", 60)
    rows = gradient_distance(upstream("cosine-similarity"), data, compiled=True)(rec)
    assert torch.allclose(whole, rows, rtol=1e-13)


def test_an_objective_that_nobody_knows_has_no_distance():
    class Own(objective_lookup["euclidean"]):
        pass

    assert gradient_distance(Own(), gradients([(2,)], 0)) is None
