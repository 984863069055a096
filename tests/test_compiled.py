"""The compiled engine gives the vmap engine's numbers, compiles once, and gives way where it cannot work."""

from __future__ import annotations

import logging

import pytest
import torch
from cases import attack_config, build_model, loss, observed

from breaching_ext.attacks import JointCandidateAttacker
from breaching_ext.attacks.candidate_choice import Target
from breaching_ext.matching import calibration, compilation
from breaching_ext.matching.compilation import FirstThatWorks, compile_once, compiled, moved_by_rounding
from breaching_ext.matching.compiled_update import CompiledUpdate
from breaching_ext.matching.engine import GradientRule
from breaching_ext.matching.tracing import SpecialisationError
from breaching_ext.matching.track import Track
from breaching_ext.matching.update_rules import update_rule

NO_GROUP = "regularization.group_regularization.scale=0"
SETUP = {"dtype": torch.float64, "device": torch.device("cpu")}


def reconstruct(batching: str, *overrides: str, iterations: int = 8):
    model = build_model("own")
    payload, shared, *_ = observed(model)
    options = [f"restarts.candidate_batching={batching}", "restarts.seed=2", "restarts.num_trials=2", *overrides]
    cfg = attack_config("joint_candidates", options, iterations)
    return JointCandidateAttacker(model, loss(), cfg, SETUP).reconstruct(payload, shared)


def distance(one, other) -> float:
    return ((one["candidates"] - other["candidates"]).norm() / other["candidates"].norm()).item()


def test_same_numbers_through_the_warm_up_with_one_compilation(traced_only):
    group = ["regularization.group_regularization.scale=0.5", "regularization.group_regularization.warmup_iters=3"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, stats = reconstruct("compile", "optim.signed=soft", "optim.step_size_decay=linear", *group)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    eager, eager_stats = reconstruct("vmap", "optim.signed=soft", "optim.step_size_decay=linear", *group)
    assert stats["engine"] == "compile"
    assert graphs == 2  # the evaluation and the update, whatever changes from step to step
    assert distance(compiled, eager) < 1e-8
    for trial in range(2):
        assert stats[f"Trial_{trial}_Val"] == pytest.approx(eager_stats[f"Trial_{trial}_Val"], rel=1e-8)


STEPS = {
    "adam": ["optim.optimizer=adam", "optim.signed=hard", "optim.step_size_decay=cosine-decay"],
    "adam-safe": ["optim.optimizer=adam-safe", "optim.warmup=3", "optim.boxed=false"],
    "bert-adam": ["optim.optimizer=bert-adam", "optim.signed=soft"],
    "momgd": ["optim.optimizer=momgd", "optim.signed=soft", "optim.step_size_decay=step-lr"],
    "gd": ["optim.optimizer=gd", "optim.grad_clip=0.01", "optim.signed=null"],
}


@pytest.mark.parametrize("case", STEPS)
def test_the_compiled_update_follows_the_optimizer(traced_only, case):
    compiled, stats = reconstruct("compile", *STEPS[case])
    eager, eager_stats = reconstruct("vmap", *STEPS[case])
    assert stats["engine"] == "compile"
    assert distance(compiled, eager) < 1e-8
    assert stats["gradient_evaluations"] == eager_stats["gradient_evaluations"]
    for trial in range(2):
        assert stats[f"Trial_{trial}_Val"] == pytest.approx(eager_stats[f"Trial_{trial}_Val"], rel=1e-8)


@pytest.mark.parametrize(
    "overrides",
    [["optim.langevin_noise=0.1"], ["+augmentations.discrete_shift.lim=2"], ["optim.optimizer=l-bfgs"]],
    ids=["noise", "augmentation", "l-bfgs"],
)
def test_steps_without_a_compiled_update_go_on_as_before(traced_only, overrides):
    options = [*overrides, "optim.signed=null", "objective.type=euclidean"]
    compiled, stats = reconstruct("compile", *options, iterations=3)
    assert stats["engine"] == "compile"
    assert distance(compiled, reconstruct("vmap", *options, iterations=3)[0]) < 1e-8


class AnySize(torch.nn.Module):
    """A model for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = torch.nn.Conv2d(3, 5, 3, stride=2), torch.nn.Linear(5, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("batching", ["compile", "auto"])
def test_an_augmentation_that_changes_the_images_size(traced_only, monkeypatch, batching):
    monkeypatch.setattr(calibration, "SHORT", 1)
    monkeypatch.setattr(calibration, "CLEARLY", 0.0)  # never `list`
    monkeypatch.setattr(calibration, "expected_compile_seconds", lambda *args: 0.0)
    torch.manual_seed(3)
    model = AnySize().double().eval()
    model.name = "any"
    payload, shared, *_ = observed(model)
    results = {}
    for engine in (batching, "vmap"):
        overrides = ["+augmentations.focus.size=24", "differentiable_augmentations=true", "restarts.seed=2", NO_GROUP]
        cfg = attack_config(overrides=[*overrides, f"restarts.candidate_batching={engine}"], iterations=4)
        results[engine], stats = JointCandidateAttacker(model, loss(), cfg, SETUP).reconstruct(payload, shared)
        assert stats["engine"] in ("compile", "vmap")
        assert stats["engine"] == engine or engine == "auto"
    assert distance(results[batching], results["vmap"]) < 1e-8


def test_the_update_leaves_the_point_beside_its_best():
    """What is kept is the point after the step with the lowest value, what goes on is the last one."""
    parameter = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    stacks, track = [parameter.detach()], Track.start([parameter])
    rule = update_rule(torch.optim.SGD([parameter], lr=1.0))
    update = CompiledUpdate(stacks, rule, GradientRule(10), track, "eager")
    assert torch.equal(stacks[0], torch.zeros(2, 3))  # the check at the start has moved nothing
    for iteration, values in enumerate([[3.0, 1.0], [2.0, 2.0], [4.0, torch.nan]]):
        gradient = -torch.ones_like(stacks[0])
        failed = update(iteration, stacks, [gradient], torch.tensor(values, dtype=torch.float64), track)
    assert failed.tolist() == [False, True]
    assert track.alive.tolist() == [True, False]
    assert track.best_values.tolist() == [2.0, 1.0]
    assert track.best[0][:, 0].tolist() == [2.0, 1.0]
    assert stacks[0][:, 0].tolist() == [3.0, 1.0]  # the second was put back to its best


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    ],
)
def test_rules_equal_torchs_optimizers(optimizer):
    """Over 20 steps, and torch's optimizer goes on from the rule's state."""
    torch.manual_seed(0)
    start = torch.randn(3, 4, dtype=torch.float64)
    own, other = start.clone().requires_grad_(), start.clone().requires_grad_()
    theirs, ours = optimizer([other]), optimizer([own])
    rule = update_rule(ours)
    for step in range(25):
        gradient = torch.randn_like(start)
        own.grad, other.grad = gradient.clone(), gradient.clone()
        theirs.step()
        if step >= 20:
            ours.step()
            continue
        numbers = torch.tensor(rule.numbers(), dtype=torch.float64).unbind()
        (moments,) = rule.state()
        point, after = rule.update(own.detach(), gradient, moments, list(numbers))
        with torch.no_grad():
            own.copy_(point)
        for slot, value in zip(moments, after, strict=True):
            slot.copy_(value)
    assert torch.allclose(own, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5),
        lambda p: torch.optim.RMSprop(p),
        type("Own", (torch.optim.Adam,), {}),
    ],
)
def test_optimizers_without_a_rule(optimizer):
    assert update_rule(optimizer([torch.zeros(2, requires_grad=True)])) is None


@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_a_graph_is_compared_until_it_is_replayed(wrong):
    """Of a CUDA graph the first call runs as it is, the second records, the third replays; each may be wrong."""

    def evaluate(stack):
        return [stack * 2], stack.sum(1), stack.sum(1)

    calls = []

    def graph(stack):
        calls.append(stack)
        gradients, *others = evaluate(stack)
        return [gradients[0] + (len(calls) >= wrong)], *others

    stacks = [torch.rand(2, 3, dtype=torch.float64)]
    difference, allowed = compilation._checked(graph, evaluate, stacks, compilation.UNTIL_REPLAYED)
    assert difference > allowed


def test_a_call_that_may_not_differ_is_not_hidden_by_one_that_may(monkeypatch):
    found = iter([(0.04, 0.05), (0.03, 0.02), (0.0, 0.02)])
    monkeypatch.setattr(compilation, "_difference", lambda *_: next(found))
    assert compilation._checked(None, None, [], 3) == (0.03, 0.02)


@pytest.mark.parametrize(
    "overrides",
    [[], ["regularization.total_variation.scale=0", NO_GROUP], ["restarts.num_trials=1", NO_GROUP]],
    ids=["regularized", "without regularizers", "one candidate"],
)
def test_real_compilation(overrides):
    """Without a regularizer the gradient comes as convolutions leave it: the candidates within the batch."""
    torch._dynamo.reset()
    compiled, stats = reconstruct("compile", "optim.signed=soft", *overrides)
    eager, _ = reconstruct("vmap", "optim.signed=soft", *overrides)
    assert stats["engine"] == "compile"
    assert distance(compiled, eager) < 1e-8


def test_compiled_code_sees_other_shapes_and_layouts_of_its_arguments():
    def evaluate(*stacks):
        return [2 * stacks[0]], stacks[0].flatten(1).sum(1), stacks[0].flatten(1).sum(1)

    function = compile_once(evaluate, device=torch.device("cpu"))
    whole = torch.arange(4 * 6 * 6, dtype=torch.float64).view(4, 6, 6)
    for stack in (whole, whole[:2], whole[:, :3, :3], whole.transpose(1, 2), whole.float()):
        for found, expected in zip(function(stack), evaluate(stack), strict=True):
            torch.testing.assert_close(found, expected)

    def update(stacks, gradients):
        return [stack - gradient for stack, gradient in zip(stacks, gradients, strict=True)]

    function = compile_once(update, device=torch.device("cpu"))
    for gradient in (whole.clone(), whole.transpose(1, 2), whole.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.testing.assert_close(function([whole], [gradient]), update([whole], [gradient]))


def test_every_engine_of_a_process_is_compiled():
    """torch compiles one code object eight times and runs it eagerly from then on; a sweep has more engines."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def engine(factor):
        return compile_once(lambda x: factor * x.sin(), "eager")

    for factor in range(12):
        assert torch.equal(engine(float(factor))(torch.ones(3)), factor * torch.ones(3).sin())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 12


def test_data_laid_out_for_compiled_code_have_the_same_value():
    model = build_model("ResNet20")
    payload, shared, images, _ = observed(model)
    attacker = JointCandidateAttacker(model, loss(), attack_config("joint_candidates"), SETUP)
    models, labels, _ = attacker.prepare_attack(payload, shared)
    attacker.objective.initialize(attacker.loss_fn, attacker.cfg.impl, None)
    target = Target(models, shared, labels, list(images.shape))
    objectives = [attacker._pure_objective(target, compiled)[0] for compiled in (False, True)]
    (plain, _), (laid_out, _) = (objective(images * 0.5) for objective in objectives)
    assert torch.allclose(plain, laid_out, rtol=1e-12)


def test_a_compiler_that_fails_gives_way_to_vmap(monkeypatch, caplog):
    def refuse(*args, **kwargs):
        def fail(*inner):
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(torch, "compile", refuse)
    with caplog.at_level(logging.WARNING):
        _, stats = reconstruct("compile", iterations=1)
    assert stats["engine"] == "vmap"
    assert "no compiler here" in caplog.text


class Breaking(AnySize):
    """A model of which torch.compile can compile parts only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


def test_a_model_that_is_compiled_in_parts_only_gives_way_to_vmap(traced_only, caplog):
    """The parts would run one by one under torch.func, which takes longer than the replay."""
    torch.manual_seed(3)
    model = Breaking().double().eval()
    model.name = "breaking"
    payload, shared, *_ = observed(model)
    cfg = attack_config(overrides=["restarts.candidate_batching=compile"], iterations=2)
    _, stats = JointCandidateAttacker(model, loss(), cfg, SETUP).reconstruct(payload, shared)
    assert stats["engine"] == "vmap"
    assert "candidate_batching=compile: taking vmap, because torch.compile failed (Unsupported: " in caplog.text


def test_the_first_form_that_works_stays():
    calls = []

    def form(name, fails):
        def call(value):
            calls.append(name)
            if fails:
                raise RuntimeError(f"{name} cannot")
            return name, value

        return lambda: call

    function = FirstThatWorks([form("a", True), form("b", False), form("c", False)])
    assert [function(1), function(2)] == [("b", 1), ("b", 2)]
    assert calls == ["a", "b", "b"]
    broken = FirstThatWorks([form("a", True), form("d", True)])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="d cannot"):
            broken(1)


def test_no_other_form_is_tried_where_memory_ran_out():
    def form():
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        FirstThatWorks([lambda: form, lambda: pytest.fail("tried another form")])()


def test_an_update_that_cannot_be_compiled_leaves_the_compiled_evaluation(monkeypatch, traced_only, caplog):
    def refuse(*arguments):
        raise SpecialisationError("no update here")

    expected, _ = reconstruct("compile")
    monkeypatch.setattr("breaching_ext.matching.compiled_engine.CompiledUpdate", refuse)
    result, stats = reconstruct("compile")
    assert stats["engine"] == "compile"
    assert "The optimizer's update is not compiled, because no update here" in caplog.text
    torch.testing.assert_close(result["candidates"], expected["candidates"], rtol=0, atol=1e-9)


def test_compiling_for_a_cpu_does_not_advise_about_cuda(caplog):
    logger = logging.getLogger("torch.utils.cpp_extension")
    before = logger.level
    function = FirstThatWorks([lambda: lambda: logger.warning("No CUDA runtime is found")])
    with caplog.at_level(logging.DEBUG):
        function()
    assert "CUDA" not in caplog.text
    assert logger.level == before


def test_options_that_torch_does_not_know_are_left_out(monkeypatch):
    """Names of a compiler's options come and go; what is compiled without them is as right."""
    asked = []

    def fake(function, **kwargs):
        asked.append(kwargs["options"])
        return function

    monkeypatch.setattr(torch, "compile", fake)
    monkeypatch.setattr(torch._inductor, "list_options", lambda: ["cpp_wrapper"])
    assert compile_once(lambda x: x + 1)(1) == 2
    assert asked[0]["cpp_wrapper"]
    assert "cpp_wrapper_build_separate" not in asked[0]
    assert compile_once(lambda x: x + 1, device=torch.device("cuda"))(1) == 2
    assert "cpp_wrapper" not in asked[1]
    assert set(asked[1]) == {"guard_filter_fn"}


def compiled_as(monkeypatch, function):
    monkeypatch.setattr(torch, "compile", lambda eager, **kwargs: function)


def test_a_kink_at_the_start_does_not_speak_against_compiled_code(monkeypatch):
    """At the start itself the two forms stand on different sides of a kink; a rounding away they agree."""

    def evaluate(stack):
        return [(stack >= 1).double()], stack.sum(1), stack.sum(1)

    def other_side(stack):
        return [(stack > 1).double()], stack.sum(1), stack.sum(1)

    compiled_as(monkeypatch, other_side)
    assert compiled(evaluate, [torch.ones(3, 1, dtype=torch.float64)], "eager") is other_side


def test_kinks_everywhere_leave_what_a_rounding_does(monkeypatch):
    def jumping(stack, phase):  # the last bits of the input decide about one per cent of the gradient
        noise = (stack * 2**51).sin() * 1e9
        return [1 + 0.01 * (noise + phase).sin()], stack.sum(1), stack.sum(1)

    stacks = [torch.rand(3, 40, dtype=torch.float64) + 1]
    compiled_as(monkeypatch, lambda stack: jumping(stack, 0.5))
    assert compiled(lambda stack: jumping(stack, 0.0), stacks, "eager")
    compiled_as(monkeypatch, lambda stack: ([1.2 * jumping(stack, 0.5)[0][0]], *jumping(stack, 0.5)[1:]))
    with pytest.raises(SpecialisationError, match="differs"):
        compiled(lambda stack: jumping(stack, 0.0), stacks, "eager")


def test_compiled_code_with_other_numbers_gives_way_to_vmap(monkeypatch, caplog):
    def wrong(function, **kwargs):
        def changed(*stacks):
            gradients, values, losses = function(*stacks)
            return [g * 1.01 for g in gradients], values, losses

        return changed

    monkeypatch.setattr(torch, "compile", wrong)
    with caplog.at_level(logging.WARNING):
        _, stats = reconstruct("compile", iterations=1)
    assert stats["engine"] == "vmap"
    assert "differs from the eager one" in caplog.text


def test_indices_have_no_rounding():
    """MAGIA's subsets are among what is evaluated."""
    index = torch.tensor([[3, 1]])
    assert moved_by_rounding(index, 0) is index
