"""BatchedLBFGS against torch.optim.LBFGS, one candidate and many."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from breaching_ext.matching.lbfgs import BatchedLBFGS
from breaching_ext.matching.line_search import Point, cubic_interpolate, strong_wolfe

SEARCHES = (None, "strong_wolfe")


def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    return (100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(dim=-1)


def bowl(x: torch.Tensor) -> torch.Tensor:
    """Smooth, convex, badly scaled, not quadratic: (..., D) -> (...)."""
    weight = torch.logspace(0, 1.0, x.shape[-1], dtype=x.dtype)
    return (weight * (x.square() + 0.1 * x.pow(4))).sum(dim=-1) + (x.sum(dim=-1) - 1).cosh()


def starts(n: int, d: int = 8, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 0.5 + 0.5 * torch.rand(n, d, generator=torch.Generator().manual_seed(5), dtype=dtype)


def batched(function, start, steps, split=None, **options):
    """Path (steps, N, D), first losses of every step (steps, N) and the optimizer."""
    pieces = [start] if split is None else [start[:, :split], start[:, split:]]
    params = [piece.clone().requires_grad_() for piece in pieces]
    optimizer = BatchedLBFGS(params, **options)
    path, losses = [], []
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            values = function(torch.cat(params, dim=1))
            values.sum().backward()
            return values

        losses.append(optimizer.step(closure).detach().clone())
        path.append(torch.cat([p.detach() for p in params], dim=1))
    return torch.stack(path), torch.stack(losses), optimizer


def single(function, start, steps, **options):
    """The same with torch's own optimizer for one candidate: (steps, D), (steps,), evaluations."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([x], **options)
    path, losses = [], []
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            value = function(x)
            value.backward()
            return value

        losses.append(optimizer.step(closure).item())
        path.append(x.detach().clone())
    return torch.stack(path), torch.tensor(losses, dtype=start.dtype), optimizer.state[x]["func_evals"]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("max_iter", [1, 4])
@pytest.mark.parametrize("history", [3, 100])
def test_one_candidate_follows_torch(search, max_iter, history):
    options = {"lr": 1.0 if search else 0.1, "max_iter": max_iter, "history_size": history, "line_search_fn": search}
    start = starts(1)
    path, losses, optimizer = batched(bowl, start, 20, split=3, **options)
    expected, expected_losses, evals = single(bowl, start[0], 20, **options)
    torch.testing.assert_close(path[:, 0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(losses[:, 0], expected_losses, rtol=1e-6, atol=1e-6)
    assert optimizer.func_evals == [evals]


@pytest.mark.parametrize("max_eval", [2, 3, 6])
def test_a_search_gets_the_evaluations_that_are_left(max_eval):
    options = {"lr": 20.0, "max_iter": 20, "max_eval": max_eval, "line_search_fn": "strong_wolfe"}  # far too long
    start = starts(1)
    path, _, optimizer = batched(rosenbrock, start, 8, **options)
    assert optimizer.func_evals[0] <= 8 * (max_eval + 1)  # a search may take one more than it is told
    if "max_ls=" in inspect.getsource(torch.optim.LBFGS.step):  # older torch gives every search 25
        expected, _, evals = single(rosenbrock, start[0], 8, **options)
        torch.testing.assert_close(path[:, 0], expected, rtol=0, atol=1e-6)
        assert optimizer.func_evals == [evals]


@pytest.mark.parametrize("search", SEARCHES)
def test_many_candidates_follow_their_own_runs(search):
    options = {"lr": 1.0 if search else 0.1, "max_iter": 5, "history_size": 6, "line_search_fn": search}
    start = starts(5) * torch.tensor([0.01, 0.5, 1.0, 2.0, 5.0], dtype=torch.float64)[:, None]
    path, _, optimizer = batched(bowl, start, 12, **options)
    for n in range(5):
        alone, _, own = batched(bowl, start[n : n + 1], 12, **options)
        torch.testing.assert_close(path[:, n], alone[:, 0], rtol=0, atol=1e-10)
        assert optimizer.func_evals[n] == own.func_evals[0]
        expected, _, _ = single(bowl, start[n], 12, **options)
        torch.testing.assert_close(path[:, n], expected, rtol=0, atol=1e-6)


def test_candidates_differ_in_evaluations():
    """Otherwise the test above would not show that searches of different length stay apart."""
    start = starts(4) * torch.tensor([0.01, 0.5, 2.0, 9.0], dtype=torch.float64)[:, None]
    _, _, optimizer = batched(rosenbrock, start, 4, line_search_fn="strong_wolfe")
    assert len(set(optimizer.func_evals)) > 1


def test_a_skipped_pair_moves_only_its_own_history():
    """On a saddle one candidate meets negative curvature and skips pairs that another takes."""

    def function(x):
        curvature = torch.where(x[..., :1] > 0, 1.0, -0.05)
        return (curvature * x.square()).sum(dim=-1) + 0.01 * x.pow(4).sum(dim=-1)

    start = torch.tensor([[1.0, 0.7, -0.4], [-1.0, 0.7, -0.4], [-0.5, 0.1, 0.9]], dtype=torch.float64)
    options = {"lr": 0.3, "max_iter": 3, "history_size": 2}
    path, _, optimizer = batched(function, start, 6, **options)
    assert len(set(optimizer._history.taken)) > 1
    for n in range(3):
        expected, _, _ = single(function, start[n], 6, **options)
        torch.testing.assert_close(path[:, n], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_candidate_that_turns_non_finite_is_put_back_and_the_others_go_on(search):
    def function(x):  # candidate 1 runs down a slope into the logarithm's pole
        free = bowl(x)
        return torch.where(torch.arange(len(x)) == 1, torch.log(x[:, 0]) + 0 * free, free) if len(x) > 1 else free

    start = starts(3)
    options = {"lr": 0.5, "max_iter": 6, "line_search_fn": search}
    path, _, optimizer = batched(function, start, 6, **options)
    assert path.isfinite().all()
    if search is None:
        assert optimizer.failed == [False, True, False]
        assert torch.equal(path[-1, 1], path[-2, 1])
        assert function(path[-1])[1].isfinite()  # back at a point with a value, not where it failed
    for n in (0, 2):
        alone, _, _ = batched(bowl, start[n : n + 1], 6, **options)
        torch.testing.assert_close(path[:, n], alone[:, 0], rtol=0, atol=1e-10)


def test_a_converged_candidate_drops_out():
    start = starts(2)
    start[0] = 0.0

    def function(x):
        return x.square().sum(dim=-1) * torch.tensor([1.0, 3.0], dtype=x.dtype)

    _, _, optimizer = batched(function, start, 1, lr=0.1)
    assert optimizer.func_evals[0] == 1
    assert optimizer.func_evals[1] > 1


@pytest.mark.parametrize("search", SEARCHES)
def test_resumes_bit_for_bit(search):
    options = {"lr": 0.1, "max_iter": 3, "history_size": 4, "line_search_fn": search}
    start = starts(3)
    straight, _, _ = batched(bowl, start, 6, **options)
    half, _, first = batched(bowl, start, 3, **options)
    x = half[-1].clone().requires_grad_()
    second = BatchedLBFGS([x])  # the state has the options, too
    second.load_state_dict(first.state_dict())
    for _ in range(3):

        def closure():
            second.zero_grad()
            values = bowl(x)
            values.sum().backward()
            return values

        second.step(closure)
    assert torch.equal(x.detach(), straight[-1])


def uneven(wave: torch.Tensor, flat: bool):
    """A function of one step length with several minima, or one of straight pieces: t -> (value, slope)."""
    size, speed, phase = wave

    def value(t: torch.Tensor) -> torch.Tensor:
        hills = (size * torch.sin(speed * t + phase)).sum()
        return 0.1 * (t - 2).abs() + (hills.clamp(-1, 1) if flat else hills + 0.02 * t.square())

    def at(t: float) -> tuple[float, float]:
        point = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        found = value(point)
        (slope,) = torch.autograd.grad(found, point)
        return found.item(), slope.item()

    return at


def search_of_torch(function, t, d_norm, **options):
    """Step lengths that torch's own line search asks for, where it ends, and how many evaluations it counts."""
    from torch.optim.lbfgs import _strong_wolfe

    asked, (f, slope) = [], function(0.0)
    direction = torch.tensor([1.0, 0.0], dtype=torch.float64) * d_norm
    gradient = torch.tensor([1.0, 0.0], dtype=torch.float64) / d_norm

    def evaluate(x, t, d):
        asked.append(float(t))
        value, slope = function(float(t))
        return value, slope * gradient

    start = (None, t, direction, f, slope * gradient, torch.tensor(slope, dtype=torch.float64))
    f, _, t, evals = _strong_wolfe(evaluate, *start, **options)
    return asked, float(t), f, evals


def search_of_ours(function, t, d_norm, **options):
    def point(t):
        return Point(t, *function(t), torch.zeros(1))

    asked, search = [], strong_wolfe(point(0.0), t, d_norm, **options)
    try:
        asked.append(next(search))
        while True:
            asked.append(search.send(point(asked[-1])))
    except StopIteration as stop:
        return asked, stop.value.point.t, stop.value.point.f, stop.value.evals


@pytest.mark.parametrize("flat", [False, True])
def test_a_line_search_asks_for_the_same_steps_as_torch(flat):
    """On functions with several minima, edges and plateaus, where every branch of the search is taken."""
    generator, lengths = torch.Generator().manual_seed(0), []
    for case in range(400):
        wave = torch.rand(3, 3, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [4.0], [6.3]])
        function = uneven(wave, flat)
        if not function(0.0)[1] < 0:
            continue
        t = 10 ** (4 * torch.rand((), generator=generator, dtype=torch.float64).item() - 3)
        d_norm = (1.0, 4.0)[case % 2]  # powers of two: torch multiplies by it and divides
        options = {"max_ls": (25, 3, 1)[case % 3], "c2": (0.9, 0.1)[case % 4 > 1], "tolerance_change": 1e-9}
        options["tolerance_change"] = (1e-9, 0.05)[case % 5 == 0]
        options["c1"] = (1e-4, 0.2)[case % 7 == 0]
        expected, found = (search(function, t, d_norm, **options) for search in (search_of_torch, search_of_ours))
        assert found[0] == pytest.approx(expected[0], rel=1e-9, abs=1e-12)
        assert found[1:3] == pytest.approx(expected[1:3], rel=1e-9, abs=1e-12)
        assert found[3] == expected[3]
        lengths.append(len(found[0]))
    assert len(lengths) > 100
    assert max(lengths) > 8


@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-5, 5), st.floats(-5, 5), st.floats(-3, 3), st.floats(0.01, 3))
@settings(max_examples=200)
def test_cubic_interpolation_stays_between_its_points(fa, fb, sa, sb, ta, width):
    zero = torch.zeros(1)
    t = cubic_interpolate(Point(ta, fa, sa, zero), Point(ta + width, fb, sb, zero))
    assert ta <= t <= ta + width


def test_cubic_interpolation_finds_the_minimum_of_a_cubic():
    zero = torch.zeros(1)
    points = [Point(t, t**3 - 3 * t, 3 * t**2 - 3, zero) for t in (0.2, 1.7)]
    assert cubic_interpolate(*points) == pytest.approx(1.0)
    assert cubic_interpolate(*reversed(points)) == pytest.approx(1.0)
    assert cubic_interpolate(Point(0.0, 0.0, -1.0, zero), Point(1.0, math.inf, math.inf, zero)) == 0.5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "lr"),
        ({"max_iter": 0}, "max_iter"),
        ({"history_size": 0}, "history_size"),
        ({"line_search_fn": "armijo"}, "strong_wolfe"),
    ],
)
def test_bad_options_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        BatchedLBFGS([torch.zeros(2, 3, requires_grad=True)], **options)


def test_bad_parameters_and_closures_are_named():
    with pytest.raises(ValueError, match="candidate axis"):
        BatchedLBFGS([torch.zeros(2, 3, requires_grad=True), torch.zeros(3, 3, requires_grad=True)])
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="one loss per candidate"):
        BatchedLBFGS([x]).step(lambda: x.square().sum())
    with pytest.raises(ValueError, match="candidates"):
        BatchedLBFGS([x]).load_state_dict(BatchedLBFGS([torch.ones(3, 3)]).state_dict())
