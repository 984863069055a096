"""The memory budget is kept, running out of memory loses nothing, and chunks change no number."""

from __future__ import annotations

import logging

import pytest
import torch
from cases import attack_config, build_model, loss, observed

from breaching_ext.attacks import JointCandidateAttacker
from breaching_ext.attacks.joint_loop import JointLoop
from breaching_ext.errors import ConfigError
from breaching_ext.matching import calibration, evaluation, memory
from breaching_ext.matching.engine import GradientRule
from breaching_ext.matching.evaluation import StackedEvaluation
from breaching_ext.matching.randomness import CandidateStreams
from breaching_ext.matching.vmap_engine import VmapEngine

SETUP = {"dtype": torch.float64, "device": torch.device("cpu")}
CPU = torch.device("cpu")


def attack(*overrides: str, candidates: int = 5, iterations: int = 4, model: str = "own"):
    torch.manual_seed(0)
    module = AnySize().double() if model == "any size" else build_model(model)
    payload, shared, *_ = observed(module)
    options = ["restarts.candidate_batching=vmap", f"restarts.num_trials={candidates}", "restarts.seed=3"]
    options += ["regularization.group_regularization.warmup_iters=1", "optim.signed=soft", *overrides]
    return JointCandidateAttacker(module, loss(), attack_config("joint_candidates", options, iterations), SETUP), (
        payload,
        shared,
    )


def reconstruct(*overrides: str, **more):
    attacker, data = attack(*overrides, **more)
    return attacker.reconstruct(*data)


#: Random, and four times as large: augmented images are most of what there is.
AUGMENTED = ("+augmentations={zoom: {out_size: 64}, discrete_shift: {lim: 4}}", "differentiable_augmentations=true")
AUGMENTED += ("regularization.group_regularization.scale=0",)


@pytest.mark.parametrize(("replay", "more"), [(False, ()), (True, ()), (False, AUGMENTED), (True, AUGMENTED)])
def test_a_budget_is_kept_and_changes_no_number(monkeypatch, replay, more):
    if replay:
        monkeypatch.setattr(calibration, "SHORT", 1)
    model = "any size" if more else "own"
    whole, stats = reconstruct(*more, model=model)
    assert stats["memory"]["candidates_at_a_time"] is None
    assert stats["memory"]["bytes_per_candidate"] > 1e5
    states = 8 * whole["candidates"].numel() * 8
    budget = states + int(2.9 * memory._WORKSPACE * stats["memory"]["bytes_per_candidate"])
    sizes, peaks = [], []
    original = VmapEngine.evaluate

    def watched(self):
        count = len(self.parameters[0])
        if count == 1:  # the check on the first candidate
            return original(self)
        result, peak = memory.peak_memory(lambda: original(self), CPU)
        sizes.append(self.evaluation._size(count))
        peaks.append(peak)
        return result

    monkeypatch.setattr(VmapEngine, "evaluate", watched)
    chunked, stats = reconstruct(*more, f"impl.memory_budget={budget}", model=model)
    assert set(sizes) == {2}
    assert stats["memory"]["candidates_at_a_time"] == 2
    assert max(peaks[1:]) + states < budget
    assert (chunked["candidates"] - whole["candidates"]).abs().max() < 1e-12


def test_a_budget_below_one_candidate_is_refused_before_the_loop():
    with pytest.raises(ConfigError, match=r"memory_budget=20000 .* valid: [0-9]+ \("):
        reconstruct("impl.memory_budget=20000")


def test_a_budget_for_one_candidate_at_a_time_is_said_to_do_nothing(caplog):
    reconstruct("impl.memory_budget=20000", "restarts.candidate_batching=list")
    assert "impl.memory_budget has no effect" in caplog.text


class AnySize(torch.nn.Module):
    """A model of images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.conv(x)).mean(dim=(2, 3)))


def test_the_size_of_augmented_images_counts():
    """Enlarged four times each way, they take about sixteen times as much."""
    torch.manual_seed(0)
    model, found = AnySize().double(), []
    payload, shared, *_ = observed(model)
    for zoom in ((), ("+augmentations.zoom={out_size: 128}", "differentiable_augmentations=true")):
        options = ["restarts.candidate_batching=vmap", "regularization.group_regularization.scale=0", *zoom]
        cfg = attack_config("joint_candidates", options, 1)
        _, stats = JointCandidateAttacker(model, loss(), cfg, SETUP).reconstruct(payload, shared)
        found.append(stats["memory"]["bytes_per_candidate"])
    assert 10 < found[1] / found[0] < 25


def test_augmented_images_exist_for_as_many_candidates_as_are_evaluated_at_a_time():
    """One at a time, more candidates take their gradients more, and that is all."""

    def enlarged(images: torch.Tensor) -> torch.Tensor:
        return images.repeat_interleave(8, 2).repeat_interleave(8, 3)

    def objective(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = images.square().mean()
        return value, value.detach()

    peaks = []
    for count in (2, 20):
        starts, streams = [torch.rand(count, 1, 3, 16, 16)], CandidateStreams(range(count), CPU)
        known = (starts, objective, lambda stacks: (None, None), GradientRule(1), streams, enlarged, True)
        peaks.append(memory.peak_memory(VmapEngine(*known, chunk=1).evaluate, CPU)[1])
    images = starts[0].nbytes / count
    assert peaks[1] - peaks[0] < 18 * 3 * images  # gradients, and their copies in one tensor
    assert peaks[0] > 64 * images


@pytest.mark.parametrize("value", ["much", "-3", "0", "4 elephants"])
def test_a_budget_that_is_no_size(value):
    with pytest.raises(ConfigError, match=r"impl\.memory_budget"):
        attack(f"impl.memory_budget={value}")


def test_sizes():
    assert memory.parse_bytes("4GiB") == 4 * 1024**3
    assert memory.parse_bytes("1.5 GB") == 1_500_000_000
    assert memory.parse_bytes(123) == memory.parse_bytes("123 B") == 123
    assert memory.parse_bytes(None) is None
    assert [memory.show_bytes(x) for x in (5, 3.21 * 1024**2, 4000 * 1024**3)] == ["5 B", "3.2 MiB", "4000 GiB"]
    assert 0 < memory.free_memory(CPU) < 2**50


class Crowded:
    """Stands for a device with room for `most` candidates: more raise what torch raises."""

    def __init__(self, monkeypatch, most: int, error: Exception):
        self.most, self.error, self.calls = most, error, []
        original = evaluation.vmap

        def vmap(function, **options):
            inner = original(function, **options)

            def limited(*stacks):
                self.calls.append(len(stacks[0]))
                if len(stacks[0]) > self.most:
                    raise self.error
                return inner(*stacks)

            return limited

        monkeypatch.setattr(evaluation, "vmap", vmap)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("aoti_torch_empty_strided(4, int_array_0, int_array_1, 6, 0, 0) API call failed at x.cpp, line 2"),
    MemoryError(),
]


@pytest.mark.parametrize(
    ("error", "more"),
    [*((error, ()) for error in ERRORS), (ERRORS[0], AUGMENTED)],
    ids=["cuda", "cpu", "compiled", "python", "augmented"],
)
def test_out_of_memory_halves_the_chunk_and_loses_nothing(monkeypatch, caplog, error, more):
    model = "any size" if more else "own"
    whole, whole_stats = reconstruct(*more, model=model)
    crowded = Crowded(monkeypatch, 1, error)
    with caplog.at_level(logging.WARNING):
        chunked, stats = reconstruct(*more, model=model)
    crowded.calls.pop(0) if more else None  # augmented images are a second part of the check
    assert crowded.calls[:4] == [1, 5, 2, 1]  # the check, then 5 at once, then 2, then one by one
    assert caplog.text.count("Out of memory") == 2
    assert stats["memory"]["candidates_at_a_time"] == 1
    assert (chunked["candidates"] - whole["candidates"]).abs().max() < 1e-12
    assert stats["gradient_evaluations"] == whole_stats["gradient_evaluations"]


def test_no_room_for_one_candidate_returns_the_best_so_far(monkeypatch, caplog):
    crowded = Crowded(monkeypatch, 9, ERRORS[0])
    original = JointLoop._iterate

    def filling_up(self, iteration, bar):
        crowded.most = 9 if iteration < 2 else 0
        return original(self, iteration, bar)

    monkeypatch.setattr(JointLoop, "_iterate", filling_up)
    with caplog.at_level(logging.ERROR):
        result, stats = reconstruct()
    assert stats["interrupted"]
    assert "Out of memory in iteration 3" in caplog.text
    assert len(stats["Trial_0_Val"]) == 2
    assert result["data"].isfinite().all()


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch):
    crowded = Crowded(monkeypatch, 9, RuntimeError("something else"))
    original = JointLoop._iterate
    monkeypatch.setattr(JointLoop, "_iterate", lambda *a: (setattr(crowded, "most", 0), original(*a))[1])
    with pytest.raises(RuntimeError, match="something else"):
        reconstruct()


@pytest.mark.parametrize("count", [2, 4])
def test_counted_memory_is_linear_in_the_candidates(count):
    attacker, data = attack()
    models, labels, _ = attacker.prepare_attack(*data)
    attacker.objective.initialize(attacker.loss_fn, attacker.cfg.impl, None)
    from breaching_ext.attacks.candidate_choice import Target

    objective, _ = attacker._pure_objective(Target(models, data[1], labels, [2, 3, 32, 32]))
    evaluate = StackedEvaluation(objective, 1)
    stack = torch.rand(count, 2, 3, 32, 32, dtype=torch.float64)
    _, one = memory.peak_memory(lambda: evaluate(stack[:1]), CPU)
    _, several = memory.peak_memory(lambda: evaluate(stack), CPU)
    assert several == pytest.approx(count * one, rel=0.1)


def test_the_history_of_lbfgs_counts():
    """A budget that Adam is content with has no room for two hundred copies of every candidate."""
    _, stats = reconstruct()
    images = 5 * 2 * 3 * 32 * 32 * 8
    budget = 100 * images + int(5.1 * memory._WORKSPACE * stats["memory"]["bytes_per_candidate"])
    _, stats = reconstruct(f"impl.memory_budget={budget}", iterations=1)
    assert stats["memory"]["candidates_at_a_time"] is None
    lbfgs = ["optim.optimizer=l-bfgs", "optim.signed=null", "objective.type=euclidean"]
    starts = [torch.zeros(5, 2, 3, 32, 32, dtype=torch.float64)]
    assert memory.plan_memory(starts, 10, 8 * images + 100, 0).chunk is None
    with pytest.raises(ConfigError, match=f"valid: {208 * images + 18}"):
        memory.plan_memory(starts, 10, 8 * images + 100, 200)
    with pytest.raises(ConfigError, match="memory_budget"):
        reconstruct(f"impl.memory_budget={budget}", *lbfgs, iterations=1)
