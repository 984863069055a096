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


def test_what_no_cache_holds_is_read_and_written_by_compiled_code_too(clock, monkeypatch):
    stacks = [torch.rand(3, 3)]
    monkeypatch.setattr(graph_costs, "LARGE", 30)
    assert measure_costs(record(evaluate, stacks), stacks) == Costs()


def test_convolutions_are_tried_in_the_other_layout(monkeypatch):
    """By this clock a convolution takes three seconds, and one of channels-last tensors takes one, as all others do."""
    convolve = torch.nn.Conv2d(4, 8, 3).requires_grad_(False)
    stack = torch.rand(2, 4, 9, 9)
    graph = record(lambda x: ([convolve(x)], x.sum((1, 2, 3)), x.sum((1, 2, 3))), [stack])
    asked = []

    def timed(self, target, args, kwargs):
        if target in graph_costs._CONVOLUTIONS:
            asked.append(args[0].is_contiguous(memory_format=torch.channels_last))
        return target(*args, **kwargs), 3.0 if target in graph_costs._CONVOLUTIONS and not asked[-1] else 1.0

    monkeypatch.setattr(graph_costs._Clock, "_timed", timed)
    others = operations(graph) - 1  # a second each
    assert measure_costs(graph, [stack]).layout == 2.0 / (3.0 + others)
    assert asked == [False, True, False, True] * graph_costs.REPEATS  # as it is; the other to prepare; then both


def test_of_every_operation_the_median_counts(monkeypatch):
    """A machine that is busy for a moment slows one operation of one run down."""
    stacks = [torch.rand(3, 3)]
    times = iter([1.0, 9.0, 2.0, 8.0, 1.0, 3.0, 1.0, 2.0, 2.0])  # three runs of three operations
    monkeypatch.setattr(graph_costs, "REPEATS", 3)

    def timed(self, target, args, kwargs):
        return target(*args, **kwargs), 5.0 if target in graph_costs._PRODUCTS else next(times)

    monkeypatch.setattr(graph_costs._Clock, "_timed", timed)
    assert measure_costs(record(evaluate, stacks), stacks) == Costs(light=5 / 15)  # 1 + 2 + 2, and two products


def test_a_slow_graph_is_not_run_again(clock, monkeypatch):
    monkeypatch.setattr(graph_costs, "ENOUGH", 1.0)  # the first run takes longer by this clock
    runs = []
    monkeypatch.setattr(graph_costs._Clock, "run", lambda self, *stacks: runs.append(graph_costs.time.perf_counter()))
    measure_costs(record(evaluate, [torch.rand(3, 3)]), [torch.rand(3, 3)])
    assert len(runs) == 1


def test_costs_of_a_stack_in_chunks_are_those_of_the_first(clock):
    def objective(image):
        value = image.sin().sum()
        return value, value

    stack = torch.rand(6, 3)
    whole, chunked = (StackedEvaluation(objective, 1, chunk, specialise=replayed) for chunk in (None, 2))
    one = whole.costs([stack])
    assert one.light > 0
    assert chunked.costs([stack]) == one  # shares of as many operations
    assert StackedEvaluation(objective, 1).costs([stack]) == Costs()
