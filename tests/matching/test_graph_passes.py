"""A recorded graph that was made shorter gives the same numbers, whatever is written in place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from breaching_ext.matching import tracing
from breaching_ext.matching.tracing import operations, record

CHANGES = {
    "twice": lambda x: x * 2,
    "twice, in whole numbers": lambda x: x * 2.0,
    "infinite": lambda x: x / -0.0,
    "copy": lambda x: x.clone(),
    "largest": lambda x: x.max(dim=-1, keepdim=True).values,
    "random": lambda x: x + torch.rand_like(x),
}
STEPS = {
    "stay": lambda x: x.view(x.shape),
    "flat": lambda x: x.reshape(x.shape[0], -1),
    "fold": lambda x: x.reshape(x.shape[0], 2, -1) if x.numel() % (2 * len(x)) == 0 else x,
    "turn": lambda x: x.transpose(1, -1),
    "identity": lambda x: x.permute(*range(x.dim())),
    "whole": lambda x: x[:, :],
    "half": lambda x: x[:, : max(1, x.shape[1] // 2)],
    "expand": lambda x: x.expand(x.shape),
    "write": lambda x: x.add_(1.5),
    **CHANGES,
}
#: What must meet, for a mistake to show, is drawn more often; so are the first few values.
OFTEN = ("write", "twice", "copy") * 5


def equal(found, expected):
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, expected, strict=True))


@settings(deadline=None, max_examples=200)  # the first recording of a process imports what it needs
@given(st.lists(st.tuples(st.sampled_from([*STEPS, *OFTEN]), st.integers(0, 4)), max_size=14))
def test_any_program_gives_the_same_numbers(program):
    """Every step takes the result of an earlier one, so the same is done twice, with and without writes between."""

    def evaluate(stack):
        values = [stack * 3]  # what is written must not be the candidate itself
        for name, source in program:
            values.append(STEPS[name](values[source % len(values)]))
        flat = [value.reshape(len(value), -1) for value in values]
        weighed = [(value * weights[: value.shape[1]]).sum(1) for value in flat]  # what is returned is never merged
        return weighed, values[-1].flatten(1).amax(1), values[0]

    weights = torch.arange(1, 25, dtype=torch.float64).sqrt()  # the order of the entries counts
    stack = torch.arange(48, dtype=torch.float64).view(2, 4, 6)
    graph = record(evaluate, [stack])
    torch.manual_seed(0)
    gradients, *others = graph(stack)
    torch.manual_seed(0)
    expected, *more = evaluate(stack)
    assert equal(gradients, expected)
    assert equal(others, more)
    assert torch.equal(stack, torch.arange(48, dtype=torch.float64).view(2, 4, 6))


def test_idle_views_are_gone():
    def evaluate(stack):
        moved = stack.permute(0, 1, 2).view(2, 24).view(2, 4, 6)
        return [moved.expand(2, 4, 6) * 2], stack.sum((1, 2)), stack.sum((1, 2))

    assert operations(record(evaluate, [torch.rand(2, 4, 6)])) == 3  # the product and two sums


@pytest.mark.parametrize(
    ("twice", "count"),
    [
        (lambda x: (x.exp(), x.exp()), 1 + 2),  # with the sum of it, which is one, too, and the sum of both
        (lambda x: (x.exp().view(6), x.exp().view(6)), 2 + 2),
        (lambda x: (x.max(0).values, x.max(0).values), 2 + 2),  # an operation with two results, and one of them
        (lambda x: (x * 1, x * True), 2 + 3),
        (lambda x: (x * 0.0, x * -0.0), 2 + 3),
        (lambda x: (x.cumsum(0), x.cumsum(1)), 2 + 3),
        (lambda x: (torch.rand_like(x), torch.rand_like(x)), 2 + 3),
        (lambda x: (x.clone().add_(1), x.clone().add_(1)), 4 + 3),
    ],
    ids=["same", "views", "two results", "types", "signed zeros", "arguments", "random", "written"],
)
def test_only_what_is_the_same_is_done_once(twice, count):
    def evaluate(stack):
        first, second = twice(stack)
        return [first.sum() + second.sum()], stack, stack

    assert operations(record(evaluate, [torch.rand(2, 3)])) == count


def test_what_is_written_in_between_is_done_again():
    def evaluate(stack):
        value = stack.clone()
        before = value.exp()
        value.mul_(2)
        return [before, value.exp()], stack, stack

    stack = torch.rand(2, 3)
    (before, after), *_ = record(evaluate, [stack])(stack)
    assert torch.equal(before, stack.exp())
    assert torch.equal(after, (2 * stack).exp())


def test_results_are_not_the_same_memory():
    """Whoever gets them may write into one of them."""
    (first, second), *_ = record(lambda x: ([x.exp(), x.exp()], x, x), [torch.rand(2)])(torch.rand(2))
    assert first.data_ptr() != second.data_ptr()


def test_a_graph_that_writes_into_what_it_is_given_stays():
    kept = torch.zeros(3)

    def evaluate(stack):
        first = (kept + stack).exp()
        kept.add_(1)
        return [first + (kept + stack).exp()], stack, stack

    graph = record(evaluate, [torch.rand(3)])
    kept.zero_()
    stack = torch.rand(3)
    assert torch.equal(graph(stack)[0][0], stack.exp() + (1 + stack).exp())


def needs_again(small, late):
    """The exponentials of all, or of one row, before and after (or between) many tensors of which four live at once."""

    def evaluate(stack):
        part = stack[:1] if small else stack
        first = part.exp().sum()
        if late:
            first = first + part.exp().sum()
        sine, cosine, tangent = stack.sin(), stack.cos(), stack.tan()
        first = first + (sine * cosine * tangent).sum()
        return [first if late else first + part.exp().sum()], stack, stack

    return evaluate


@pytest.mark.parametrize(("small", "late", "exponentials"), [(False, False, 2), (True, False, 1), (False, True, 1)])
def test_nothing_large_is_kept_where_memory_is_needed_most(small, late, exponentials):
    graph = record(needs_again(small, late), [torch.rand(100, 7)])
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.aten.exp.default) == exponentials


def chunk_written(stack):
    value = stack * 3
    before = value.exp()
    value.unsafe_chunk(2, 1)[0].mul_(2)  # shares memory, which torch does not declare
    return [before + value.exp()], stack, stack


def chunks_returned(stack):
    return [stack.exp().unsafe_chunk(2, 1)[0], stack.exp().unsafe_chunk(2, 1)[0]], stack, stack


def reshaped_in_place(stack):
    value = stack * 3
    first, second = value[:, 0], value[:, 0]
    first.unsqueeze_(1)
    return [first.sum(1) + second.sum()], stack, stack


def viewed_and_reshaped_in_place(stack):
    value = stack * 3
    value.view(value.shape).unsqueeze_(0)
    return [value + 1], stack, stack


def statistics_written(stack):
    mean, var = stack.new_zeros(4), stack.new_ones(4)
    before = mean.exp()
    normal = torch.nn.functional.batch_norm(stack, mean, var, training=True)
    return [normal + before + mean.exp()], stack, stack


def unused_draw(stack):
    return [stack + (torch.rand_like(stack), torch.rand_like(stack))[1]], stack, stack


@pytest.mark.parametrize(
    "evaluate",
    [
        chunk_written,
        chunks_returned,
        reshaped_in_place,
        viewed_and_reshaped_in_place,
        statistics_written,
        unused_draw,
    ],
)
def test_what_torch_does_not_declare(evaluate):
    stack = torch.rand(3, 4)
    torch.manual_seed(0)
    expected, *_ = evaluate(stack)
    state = torch.get_rng_state()
    graph = record(evaluate, [stack])
    torch.manual_seed(0)
    found, *_ = graph(stack)
    assert equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tensor.data_ptr() for tensor in found}) == len(found)


def test_a_graph_is_what_it_was_recorded_as(monkeypatch):
    """The property above has something to find: without merging, programs have more operations."""

    def evaluate(stack):
        return [stack.exp() + stack.exp()], stack, stack

    short = operations(record(evaluate, [torch.rand(2)]))
    monkeypatch.setattr(tracing, "shorten", lambda graph: None)
    assert (short, operations(record(evaluate, [torch.rand(2)]))) == (2, 3)
