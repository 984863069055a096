"""The clock beside a recorded evaluation puts every operation where it belongs, and changes no number."""

from __future__ import annotations

import pytest
import torch

from breaching_ext.matching import graph_costs
from breaching_ext.matching.evaluation import StackedEvaluation
from breaching_ext.matching.graph_costs import Costs, measure_costs
from breaching_ext.matching.tracing import record, replayed


@pytest.fixture
def clock(monkeypatch):
    """Every operation takes a second by this clock."""
    seconds = iter(range(10000))
    monkeypatch.setattr(graph_costs.time, "perf_counter", lambda: next(seconds))


def evaluate(stack):
    return [(stack @ stack).sin() @ stack], stack.sum((0, 1)), stack.cos()


def test_products_are_left_out_and_the_rest_is_counted(clock):
    stacks = [torch.rand(3, 3)]
    assert measure_costs(record(evaluate, stacks), stacks) == Costs(light=3.0)  # of five, two are products


def test_what_no_cache_holds_is_counted_apart(clock, monkeypatch):
    stacks = [torch.rand(3, 3)]
    monkeypatch.setattr(graph_costs, "LARGE", 30)
    assert measure_costs(record(evaluate, stacks), stacks) == Costs(large=3.0)


def test_convolutions_are_tried_in_the_other_layout(monkeypatch):
    """By this clock a convolution takes three seconds, and one of channels-last tensors takes one."""
    convolve = torch.nn.Conv2d(4, 8, 3).requires_grad_(False)
    stack = torch.rand(2, 4, 9, 9)
    graph = record(lambda x: ([convolve(x)], x.sum((1, 2, 3)), x.sum((1, 2, 3))), [stack])
    asked = []

    def timed(self, target, args, kwargs):
        if target in graph_costs._CONVOLUTIONS:
            asked.append(args[0].is_contiguous(memory_format=torch.channels_last))
        return target(*args, **kwargs), 1.0 if asked and asked[-1] else 3.0

    monkeypatch.setattr(graph_costs._Clock, "_timed", timed)
    assert measure_costs(graph, [stack]).layout == 2.0
    assert asked == [False, True, False, True]  # as it is; the other once to prepare; then both


def test_costs_of_a_stack_in_chunks_are_those_of_all_of_it(clock):
    def objective(image):
        value = image.sin().sum()
        return value, value

    stack = torch.rand(6, 3)
    whole, chunked = (StackedEvaluation(objective, 1, chunk, specialise=replayed) for chunk in (None, 2))
    one = whole.costs([stack])
    assert one.light > 0
    assert chunked.costs([stack]) == one * 3  # three chunks of as many operations
    assert StackedEvaluation(objective, 1).costs([stack]) == Costs()
