"""The clock beside a recorded evaluation puts every operation where it belongs, and changes no number."""

from __future__ import annotations

import pytest
import torch

from breaching_ext.matching import graph_costs
from breaching_ext.matching.evaluation import StackedEvaluation
from breaching_ext.matching.graph_costs import Costs, measure_costs
from breaching_ext.matching.tracing import operations, record, replayed


@pytest.fixture
def clock(monkeypatch):
    """Every operation takes a second by this clock."""
    seconds = iter(range(10000))
    monkeypatch.setattr(graph_costs.time, "perf_counter", lambda: next(seconds))


def evaluate(stack):
    return [(stack @ stack).sin() @ stack], stack.sum((0, 1)), stack.cos()


def test_products_are_left_out_and_the_rest_is_counted(clock):
    stacks = [torch.rand(3, 3)]
    assert measure_costs(record(evaluate, stacks), stacks) == Costs(light=3 / 5)  # two of five are products


def test_what_no_cache_holds_is_counted_for_itself(clock, monkeypatch):
    stacks = [torch.rand(3, 3)]
    monkeypatch.setattr(graph_costs, "LARGE", 30)
    assert measure_costs(record(evaluate, stacks), stacks) == Costs(large=3 / 5)


def test_convolutions_are_tried_in_the_other_layout(monkeypatch):
    """By this clock a convolution takes three seconds, one of channels-last tensors takes one, as all others do, and
    laying out the weights takes half a second."""
    convolve = torch.nn.Conv2d(4, 8, 3).requires_grad_(False)
    stack = torch.rand(2, 4, 9, 9)
    graph = record(lambda x: ([convolve(x)], x.sum((1, 2, 3)), x.sum((1, 2, 3))), [stack])
    asked, laid_out = [], []

    def timed(self, target, args, kwargs):
        if target is graph_costs._channels_last:
            laid_out.append(args[0].shape)
            return target(*args), 0.5
        if target in graph_costs._CONVOLUTIONS:
            asked.append(args[0].is_contiguous(memory_format=torch.channels_last))
        return target(*args, **kwargs), 3.0 if target in graph_costs._CONVOLUTIONS and not asked[-1] else 1.0

    monkeypatch.setattr(graph_costs._Clock, "_timed", timed)
    others = operations(graph) - 1  # a second each
    costs, everything = measure_costs(graph, [stack]), 3.0 + others
    assert (costs.layout, costs.weights, costs.model) == (2.0 / everything, 0.5 / everything, 0.5 / everything)
    assert laid_out == [convolve.weight.shape] * graph_costs.REPEATS
    assert asked == [False, True, False, True] * graph_costs.REPEATS  # as it is; the other to prepare; then both


def test_weights_that_are_computed_are_not_the_models(monkeypatch):
    """A compiler computes them laid out; a view of the model's own is the model's."""
    weights = torch.rand(8, 4, 3, 3)

    def convolve(stack):
        scaled = torch.nn.functional.conv2d(stack, weights * stack.mean())
        turned = torch.nn.functional.conv2d(stack, weights.transpose(2, 3).view(8, 4, 3, 3))
        return [scaled + turned], stack.sum((1, 2, 3)), stack.sum((1, 2, 3))

    stack = torch.rand(2, 4, 9, 9)
    graph = record(convolve, [stack])
    monkeypatch.setattr(graph_costs._Clock, "_timed", lambda self, target, args, kwargs: (target(*args, **kwargs), 1.0))
    costs = measure_costs(graph, [stack])
    assert 2 * costs.model == costs.weights > 0


def test_the_weights_of_a_derivative_are_found():
    """They stand elsewhere among its arguments."""
    weights = torch.rand(8, 4, 3, 3)

    def gradient(stack):
        small = torch.func.grad(lambda x: torch.nn.functional.conv2d(x, weights).square().sum())(stack)
        return [small], stack.sum((1, 2, 3)), stack.sum((1, 2, 3))

    graph = record(gradient, [torch.rand(2, 4, 9, 9)])
    convolutions = [node for node in graph.graph.nodes if node.target in graph_costs._CONVOLUTIONS]
    assert len({node.target for node in convolutions}) == 2
    found = [getattr(graph, node.args[graph_costs._CONVOLUTIONS[node.target]].target) for node in convolutions]
    assert all(torch.equal(value, weights) for value in found)


def test_of_every_operation_the_median_counts(monkeypatch):
    """A machine that is busy for a moment slows one operation of one run down."""
    stacks = [torch.rand(3, 3)]
    times = iter([1.0, 9.0, 2.0, 8.0, 1.0, 3.0, 1.0, 2.0, 2.0])  # three runs of three operations
    monkeypatch.setattr(graph_costs, "REPEATS", 3)

    def timed(self, target, args, kwargs):
        return target(*args, **kwargs), 5.0 if target in graph_costs._PRODUCTS else next(times)

    monkeypatch.setattr(graph_costs._Clock, "_timed", timed)
    assert measure_costs(record(evaluate, stacks), stacks) == Costs(light=5 / 15)  # 1 + 2 + 2, and two products


@pytest.mark.parametrize(("seconds", "times"), [(1.0, 1), (5.0, 3), (1e9, graph_costs.REPEATS)])
def test_a_graph_is_run_for_as_long_as_it_is_worth(clock, monkeypatch, seconds, times):
    """By this clock a run takes a second, and so does a look at the clock."""
    runs = []
    monkeypatch.setattr(graph_costs._Clock, "run", lambda self, *stacks: runs.append(graph_costs.time.perf_counter()))
    measure_costs(record(evaluate, [torch.rand(3, 3)]), [torch.rand(3, 3)], seconds)
    assert len(runs) == times


def test_costs_of_a_stack_in_chunks_are_those_of_the_first(clock):
    def objective(image):
        value = image.sin().sum()
        return value, value

    stack = torch.rand(6, 3)
    whole, chunked = (StackedEvaluation(objective, 1, chunk, specialise=replayed) for chunk in (None, 2))
    one = whole.costs([stack], 1e9)
    assert one.light > 0
    assert chunked.costs([stack], 1e9) == one  # shares of as many operations
    assert StackedEvaluation(objective, 1).costs([stack], 1e9) == Costs()
