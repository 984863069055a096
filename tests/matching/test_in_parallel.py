"""Candidates shared among threads get the numbers of the whole stack, whatever goes wrong in one of them."""

from __future__ import annotations

import threading

import pytest
import torch
from cases import attack_config, build_model, loss, observed
from hypothesis import given, settings
from hypothesis import strategies as st

from breaching_ext.attacks import JointCandidateAttacker
from breaching_ext.matching.compilation import FirstThatWorks, compiled
from breaching_ext.matching.evaluation import StackedEvaluation
from breaching_ext.matching.in_parallel import LEAST, InParallel, in_parallel, shares

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def objective(images, other):
    return (images.tanh() * other.cos()).square().sum() + images.sin().mean(), images.detach().abs().sum()


def stacks_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((count, *shape), generator=generator, dtype=torch.float64) for shape in ((2, 3, 4, 4), (1,))]


def assert_same(found, expected):
    for one, other in zip((*found[0], *found[1:]), (*expected[0], *expected[1:]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 23), st.integers(1, 6))
def test_shares_give_the_numbers_of_the_whole_stack(count, number):
    evaluation, stacks = StackedEvaluation(objective, 2), stacks_of(count)
    size = -(-count // number)
    assert_same(InParallel(evaluation.plain, size, number)(*stacks), evaluation(*stacks))


def test_the_shares_run_at_the_same_time_with_their_own_processors(two_threads):
    together, seen = threading.Barrier(2, timeout=30), []

    def evaluate(*stacks):
        together.wait()  # hangs, and fails, where one share follows the other
        torch.ones(2**16).sin()  # torch's first operation in a thread sets its number of processors
        seen.append((torch.get_num_threads(), threading.current_thread() is threading.main_thread()))
        return [stacks[0]], stacks[1], stacks[1]

    stacks = stacks_of(8)
    evaluate_all = InParallel(evaluate, 4, 2, 1)
    for _ in range(2):
        gradients, values, _ = evaluate_all(*stacks)
        assert torch.equal(gradients[0], stacks[0])
        assert torch.equal(values, stacks[1])
    assert seen == [(1, False)] * 4
    assert torch.get_num_threads() == 2
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]  # threads of others begin as before


@pytest.mark.parametrize(
    ("threads", "count", "expected"), [(1, 64, 1), (2, 7, 1), (2, 8, 2), (2, 64, 2), (16, 8, 2), (16, 32, 8)]
)
def test_how_many_threads(monkeypatch, threads, count, expected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert shares(count, CPU) == expected
    assert shares(count, torch.device("cuda")) == 1


def test_an_error_is_raised_when_all_shares_have_ended():
    running = threading.Event()

    def evaluate(images, other):
        if images[0, 0, 0, 0, 0] == 0:
            raise MemoryError("no room")
        running.wait(0.2)
        running.set()
        return [images], other, other

    stacks = [torch.arange(8.0).view(8, 1, 1, 1, 1), torch.zeros(8)]
    with pytest.raises(MemoryError, match="no room"):
        InParallel(evaluate, 4, 2)(*stacks)
    assert running.is_set()


def test_out_of_memory_in_a_share_halves_the_chunk(two_threads, caplog):
    full = StackedEvaluation(objective, 2)

    def tight(plain, stacks):
        def evaluate(*part):
            if len(part[0]) > 2:
                raise MemoryError("no room")
            return plain(*part)

        return InParallel(evaluate, -(-len(stacks[0]) // 2), 2)

    tried = StackedEvaluation(objective, 2, specialise=tight)
    stacks = stacks_of(8)
    assert_same(tried(*stacks), full(*stacks))
    assert tried.chunk == 4
    assert "going on with 4" in caplog.text


def test_code_that_python_runs_is_not_shared(two_threads):
    """It would run one thread at a time, with one processor."""
    seen = []

    def compile_for(stacks):
        def fails():
            raise RuntimeError("no C++ here")

        seen.append((len(stacks[0]), torch.get_num_threads()))
        function = FirstThatWorks([fails, lambda: StackedEvaluation(objective, 2).plain])
        function(*stacks)
        return function

    evaluate = in_parallel(compile_for, stacks_of(8))
    assert not isinstance(evaluate, InParallel)
    assert seen == [(4, 1), (8, 2)]


def test_compiled_code_is_shared(two_threads):
    evaluation, stacks = StackedEvaluation(objective, 2), stacks_of(9)
    parts = []

    def compile_for(part):
        parts.append((len(part[0]), torch.get_num_threads()))
        return compiled(evaluation.plain, part)

    evaluate = in_parallel(compile_for, stacks)
    assert isinstance(evaluate, InParallel)
    assert parts == [(5, 1)]
    first = evaluate(*stacks)
    assert_same(first, evaluation(*stacks))
    for one, other in zip(first[0], evaluate(*stacks)[0], strict=True):
        assert torch.equal(one, other)


def test_an_attack_whose_candidates_are_shared(two_threads, traced_only):
    model = build_model("own")
    payload, shared, *_ = observed(model)
    results = {}
    for batching in ("compile", "vmap"):
        options = [f"restarts.candidate_batching={batching}", "restarts.seed=2", f"restarts.num_trials={2 * LEAST + 1}"]
        cfg = attack_config("joint_candidates", options, 6)
        setup = {"dtype": torch.float64, "device": CPU}
        results[batching], stats = JointCandidateAttacker(model, loss(), cfg, setup).reconstruct(payload, shared)
        assert stats["engine"] == batching
    found, expected = (results[name]["candidates"] for name in ("compile", "vmap"))
    assert ((found - expected).norm() / expected.norm()).item() < 1e-8
