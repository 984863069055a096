"""The recorded graph without its idle views gives the same numbers, whatever is written in place."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from breaching_ext.matching.tracing import operations, record

STEPS = {
    "stay": lambda x: x.view(x.shape),
    "flat": lambda x: x.reshape(x.shape[0], -1),
    "fold": lambda x: x.reshape(x.shape[0], 2, -1),
    "turn": lambda x: x.transpose(1, -1),
    "identity": lambda x: x.permute(*range(x.dim())),
    "whole": lambda x: x[:, :],
    "half": lambda x: x[:, : max(1, x.shape[1] // 2)],
    "expand": lambda x: x.expand(x.shape),
    "twice": lambda x: x * 2,
    "write": lambda x: x.add_(1.5),
}


@settings(deadline=None)  # the first recording of a process imports what it needs
@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=12))
def test_any_chain_of_views_gives_the_same_numbers(names):
    def evaluate(stack):
        start = value = stack * 3  # what is written must not be the candidate itself
        for name in names:
            if value.numel() % (2 * len(value)) == 0 or name != "fold":
                value = STEPS[name](value)
        return [value.reshape(len(value), -1)], start.sum((1, 2)), start.flatten(1).amax(1)

    stack = torch.arange(48, dtype=torch.float64).view(2, 4, 6)
    graph = record(evaluate, [stack])
    (gradients, values, losses), expected = graph(stack), evaluate(stack)
    assert torch.equal(gradients[0], expected[0][0])
    assert torch.equal(values, expected[1])
    assert torch.equal(losses, expected[2])
    assert torch.equal(stack, torch.arange(48, dtype=torch.float64).view(2, 4, 6))


def test_idle_views_are_gone():
    def evaluate(stack):
        moved = stack.permute(0, 1, 2).view(2, 24).view(2, 4, 6)
        return [moved.expand(2, 4, 6) * 2], stack.sum((1, 2)), stack.sum((1, 2))

    assert operations(record(evaluate, [torch.rand(2, 4, 6)])) == 3  # the product and two sums
