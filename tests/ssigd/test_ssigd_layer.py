"""QPLayer: gradcheck in all four inputs, batches against loops, caching."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from breaching_ext.ssigd import (
    BatchedQP,
    DegenerateError,
    InfeasibleError,
    LICQError,
    NonFiniteError,
    ParametricQP,
    QPLayer,
    SSIGDError,
    StronglyConvexBilevelProblem,
)

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def data(dim, seed, count=0, kind="coupled"):
    """Return Q, G and a (c, h) away from kinks, or a batch of them."""
    problem = StronglyConvexBilevelProblem(dim, seed=seed, constraints=kind)
    generator = torch.Generator().manual_seed(seed)
    x = 4 * torch.rand(max(count, 1), dim, generator=generator, dtype=torch.float64) - 2
    x = x if count else x[0]
    return problem.Q_lower, problem.B, problem.linear_term(x), problem.right_hand_side(x).clone()


@pytest.mark.parametrize("kind", ["box", "coupled"])
@pytest.mark.parametrize("count", [0, 4])
@pytest.mark.parametrize("seed", [1, 2])
def test_gradcheck_in_all_four(kind, count, seed):
    inputs = tuple(value.clone().requires_grad_() for value in data(4, seed, count, kind))
    assert torch.autograd.gradcheck(lambda Q, G, c, h: QPLayer(Q, G)(c, h), inputs, eps=1e-6, atol=1e-8, rtol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    dim=st.integers(1, 8),
    count=st.integers(1, 12),
    kind=st.sampled_from(["box", "coupled"]),
)
def test_batch_is_the_loop(seed, dim, count, kind):
    Q, G, c, h = data(dim, seed, count, kind)
    layer = QPLayer(Q, G)
    c, h = c.requires_grad_(), h.requires_grad_()
    weights = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = layer(c, h)
    together = torch.autograd.grad((weights * y).sum(), (c, h))
    for i in range(count):
        ci, hi = c[i].detach().requires_grad_(), h[i].detach().requires_grad_()
        yi = layer(ci, hi)
        torch.testing.assert_close(y[i], yi, rtol=0, atol=1e-11)
        alone = torch.autograd.grad((weights[i] * yi).sum(), (ci, hi))
        for batch, single in zip(together, alone, strict=True):
            torch.testing.assert_close(batch[i], single, rtol=0, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
def test_batch_on_the_device_is_the_batch_on_the_cpu(device):
    Q, G, c, h = data(6, 3, 16)
    expected = QPLayer(Q, G)(c, h)
    y = QPLayer(Q, G)(c.to(device), h.to(device))
    assert y.device.type == device
    torch.testing.assert_close(y.cpu(), expected, rtol=0, atol=1e-11)


def test_members_that_the_batch_cannot_certify_are_solved_alone():
    Q, G, c, h = data(6, 3, 8)
    single = ParametricQP(Q.numpy(), G.numpy())
    expected = BatchedQP(single).solve(c, h)
    assert expected.fallbacks == 0
    hasty = BatchedQP(single, admm_steps=1, polish_steps=1).solve(c, h)
    assert hasty.fallbacks > 0
    torch.testing.assert_close(hasty.y, expected.y, rtol=0, atol=1e-11)
    torch.testing.assert_close(hasty.side, expected.side)


def test_ill_conditioned_batch_is_refined():
    problem = StronglyConvexBilevelProblem(6, seed=0, condition=1e8)
    x = torch.rand(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    c, h = 0.01 * problem.linear_term(x), problem.right_hand_side(x)
    batch = BatchedQP(problem.solver).solve(c, h)
    for i in range(10):
        y = torch.from_numpy(problem.solver.solve(c[i].numpy(), h[i].numpy()).y)
        torch.testing.assert_close(batch.y[i], y, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c, h: c[1].fill_(torch.nan), NonFiniteError),
        (lambda c, h: h[1].fill_(-1.0), InfeasibleError),
        (lambda c, h: h[1].copy_(torch.tensor([0.5, 1.0, -0.5, 1.0])), LICQError),
    ],
)
def test_batch_names_the_member_at_fault(change, error):
    layer = QPLayer(torch.eye(2), torch.cat([torch.eye(2), -torch.eye(2)]))
    c, h = torch.zeros(3, 2, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
    change(c, h)
    with pytest.raises(error, match="member 1"):
        layer(c, h)


def test_batch_reports_duplicates_and_weak_activity(caplog):
    box = torch.cat([torch.eye(2), -torch.eye(2)])
    c = torch.tensor([[0.1, 0.2], [-3.0, 0.2]], requires_grad=True)
    with pytest.raises(LICQError, match="member 1"):
        QPLayer(torch.eye(2), torch.cat([box, box[:1]]))(c, torch.ones(5))
    weak = torch.tensor([[-1.0, 0.2], [0.3, 0.2]], requires_grad=True)
    QPLayer(torch.eye(2), box)(weak, torch.ones(4)).sum().backward()
    assert "weakly active" in caplog.text
    with pytest.raises(DegenerateError, match="member 0"):
        QPLayer(torch.eye(2), box, min_margin=1e-6)(weak, torch.ones(4))


def test_factors_follow_in_place_changes():
    Q, G, c, h = data(4, 1)
    layer = QPLayer(nn.Parameter(Q.clone()), G)
    before = layer(c, h)
    solver = layer.single()
    assert layer.single() is solver
    with torch.no_grad():
        layer.Q.mul_(3.0)
    torch.testing.assert_close(layer(c, h), QPLayer(3.0 * Q, G)(c, h))
    assert not torch.allclose(layer(c, h), before)


@pytest.mark.parametrize("how", ["data", "functional", "fused", "flat"])
def test_factors_follow_changes_that_leave_no_trace(how):
    """`.data`, functional_call, fused optimizers and vector_to_parameters raise no version, or bring an id back."""
    Q, G, c, h = data(4, 1)
    layer = QPLayer(nn.Parameter(Q.clone()), G)
    layer(c, h)
    if how == "functional":
        for factor in (2.0, 3.0):
            found = torch.func.functional_call(layer, {"Q": factor * Q}, (c, h))
            torch.testing.assert_close(found, QPLayer(factor * Q, G)(c, h))
        return
    if how == "data":
        layer.Q.data.mul_(3.0)
    elif how == "flat":
        nn.utils.vector_to_parameters(3.0 * Q.flatten(), [layer.Q])
    else:
        optimizer = torch.optim.Adam([layer.Q], lr=0.1, fused=True)
        layer(c, h).sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer(c, h), QPLayer(layer.Q.detach().clone(), G)(c, h))


def test_learning_recovers_a_right_hand_side():
    Q, G, c, h = data(4, 1, 32, "box")
    layer, target = QPLayer(Q, G), QPLayer(Q, G)(c, h * 0.6)
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([scale], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        ((layer(c, scale * h) - target) ** 2).sum(dim=1).mean().backward()
        optimizer.step()
    assert float(scale.detach()) == pytest.approx(0.6, abs=1e-3)


def test_float32_inputs_give_float64():
    layer = QPLayer(torch.eye(2), torch.cat([torch.eye(2), -torch.eye(2)]))
    c = torch.tensor([-3.0, 0.5], requires_grad=True)
    y = layer(c, torch.ones(4))
    assert y.dtype == torch.float64
    np.testing.assert_allclose(y.detach().numpy(), [1.0, -0.5])
    y.sum().backward()
    assert c.grad.dtype == torch.float32
    assert layer.last_solution.margin == pytest.approx(0.5)


def test_second_derivatives_and_wrong_shapes_raise():
    layer = QPLayer(torch.eye(2), torch.cat([torch.eye(2), -torch.eye(2)]))
    c = torch.tensor([0.3, 0.5], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((layer(c, torch.ones(4)) ** 2).sum(), c, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
    with pytest.raises(SSIGDError, match="expected 1 or 2"):
        layer(c[None, None], torch.ones(4))
    with pytest.raises(SSIGDError, match="expected"):
        layer(torch.zeros(3, 3), torch.ones(4))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), dim=st.integers(1, 8), kind=st.sampled_from(["box", "coupled"]))
def test_batch_reports_the_margins_of_the_single_solver(seed, dim, kind):
    Q, G, c, h = data(dim, seed, 6, kind)
    single = ParametricQP(Q.numpy(), G.numpy())
    margins = [single.solve(ci, hi).margin for ci, hi in zip(c.numpy(), h.numpy(), strict=True)]
    np.testing.assert_allclose(BatchedQP(single).solve(c, h).margin.numpy(), margins, atol=1e-11)


def test_what_is_done_to_the_result_in_place_does_not_reach_the_gradient():
    Q, G = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64), torch.cat([torch.eye(2), -torch.eye(2)])
    c = torch.tensor([-3.0, 0.5], dtype=torch.float64)
    gradients = []
    for move in (lambda y: y.sub_(7.0), lambda y: y - 7.0):
        layer = QPLayer(torch.nn.Parameter(Q.clone()), G)
        move(layer(c, torch.ones(4))).square().sum().backward()
        gradients.append(layer.Q.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_second_derivatives_raise_for_a_loss_that_is_linear_too(batch):
    """The cotangent of y depends on nothing then, but the gradient depends on Q."""
    layer = QPLayer(torch.nn.Parameter(torch.eye(2, dtype=torch.float64)), torch.eye(2))
    c = torch.full((*batch, 2), -0.5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(c, torch.ones(2)).sum(), c, create_graph=True)
    assert torch.equal(gradient, torch.full_like(c, -1.0))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        gradient.square().sum().backward()


def test_copies_and_pickles_of_a_layer_that_was_used():
    layer = QPLayer(torch.eye(2), torch.cat([torch.eye(2), -torch.eye(2)]))
    c = torch.tensor([-3.0, 0.5])
    expected = layer(c, torch.ones(4))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(c, torch.ones(4)), expected)


@pytest.mark.parametrize(("c", "h"), [((3, 2), (2, 2)), ((2, 2), ()), ((), (3, 2)), ((0, 2), (3, 2))])
def test_shapes_that_are_no_batch(c, h):
    with pytest.raises(SSIGDError, match="shape"):
        QPLayer(torch.eye(2), torch.eye(2))(torch.zeros(c), torch.ones(h))


def test_a_batch_of_one_goes_with_several():
    layer, c, h = (
        QPLayer(torch.eye(2), torch.eye(2)),
        torch.tensor([[-3.0, 0.5]]),
        torch.tensor([[1.0, 1], [2, 1], [9, 1]]),
    )
    expected = torch.stack([layer(c[0], row) for row in h])
    assert torch.equal(layer(c, h), expected)
    assert torch.equal(layer(h, c.abs()), torch.stack([layer(row, c[0].abs()) for row in h]))
