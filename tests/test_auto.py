"""`auto` takes the fastest engine, counts compile time, and takes the same one again."""

from __future__ import annotations

import itertools
import logging
from dataclasses import fields
from functools import partial

import pytest
import torch
from cases import attack_config, build_model, loss, observed
from hypothesis import assume, given
from hypothesis import strategies as st

from breaching_ext.attacks import JointCandidateAttacker
from breaching_ext.attacks.joint_loop import JointLoop
from breaching_ext.matching import calibration, choices, engine_parts, fastest, tracing
from breaching_ext.matching.evaluation import StackedEvaluation
from breaching_ext.matching.graph_costs import Costs
from breaching_ext.matching.tracing import (
    LITTLE,
    Replay,
    SpecialisationError,
    operations,
    record,
    record_a_little,
    replayed,
)
from breaching_ext.matching.track import Track, advancing

SETUP = {"dtype": torch.float64, "device": torch.device("cpu")}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BREACHING_EXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def clock(monkeypatch):
    """Seconds a step and of compiling as the test says; half of a replayed step is what compiling saves."""

    def measured(compiling: float = 1e9, **times: float):
        known = {"recording": 0.02, **times}
        monkeypatch.setattr(calibration, "expected_compile_seconds", lambda *known: compiling)
        monkeypatch.setattr(
            calibration,
            "seconds",
            lambda functions, device, iterations, aside=None, until_decided=False: {
                name: (function(), known[name])[1] for name, function in {**functions, **(aside or {})}.items()
            },
        )
        halved = Costs(light=0.5)
        monkeypatch.setattr(calibration, "saved_shares", lambda device: {"light": 1.0})
        monkeypatch.setattr(StackedEvaluation, "costs", lambda self, stacks, seconds: halved)
        monkeypatch.setattr(calibration, "SHORT", 1)

    return measured


def reconstruct(*overrides: str, iterations: int = 3, candidates: int = 2, model: str = "own"):
    module = build_model(model)
    payload, shared, *_ = observed(module)
    options = ["restarts.seed=2", f"restarts.num_trials={candidates}", "optim.signed=soft", *overrides]
    cfg = attack_config("joint_candidates", options, iterations)
    return JointCandidateAttacker(module, loss(), cfg, SETUP).reconstruct(payload, shared)


@pytest.mark.parametrize(("candidates", "iterations", "engine"), [(1, 250, "list"), (2, 50, "vmap")])
def test_a_short_run_measures_nothing(monkeypatch, own_cache, candidates, iterations, engine):
    monkeypatch.setattr(calibration, "seconds", lambda *args: pytest.fail("measured"))
    _, stats = reconstruct(iterations=iterations, candidates=candidates)
    assert stats["engine"] == engine
    assert not own_cache.exists()


def test_the_fastest_is_taken_logged_and_recorded(clock, caplog):
    clock(list=1e-6, vmap=3e-6)
    with caplog.at_level(logging.INFO):
        result, stats = reconstruct(candidates=2)
    assert stats["engine"] == stats["calibration"]["engine"] == "list"
    assert stats["calibration"]["step_seconds"] == {"list": 2e-6, "vmap": 3e-6}  # of both candidates
    assert "candidate_batching=auto takes list" in caplog.text
    assert torch.equal(
        result["candidates"], reconstruct("restarts.candidate_batching=list", candidates=2)[0]["candidates"]
    )


@pytest.mark.parametrize(("compiled", "engine"), [(50.0, "compile"), (500.0, "vmap")])
def test_compiling_where_it_may_pay_and_keeping_it_where_it_is_faster(clock, traced_only, compiled, engine):
    clock(list=1000.0, vmap=400.0, compile=compiled, compiling=40.0)
    result, stats = reconstruct(candidates=2)
    assert stats["engine"] == engine
    assert stats["calibration"]["compile_seconds"] > 0
    assert list(stats["calibration"]["step_seconds"]) == ["list", "vmap", "compile"]
    pinned, _ = reconstruct(f"restarts.candidate_batching={engine}", candidates=2)
    assert torch.allclose(result["candidates"], pinned["candidates"], rtol=0, atol=1e-9)


def test_compiling_is_left_out_where_it_takes_longer_than_it_saves(clock, monkeypatch):
    clock(list=0.02, vmap=0.01, compiling=40.0)
    monkeypatch.setattr(engine_parts, "CompiledEngine", lambda **parts: pytest.fail("compiled"))
    _, stats = reconstruct(iterations=50, candidates=2)
    assert stats["engine"] == "vmap"
    assert "more than it saves" in stats["calibration"]["reason"]
    assert stats["calibration"]["expected_compile_seconds"] == 40.0


def test_a_compiler_that_fails_is_said_and_costs_nothing_else(clock, monkeypatch):
    def refuse(**parts):
        raise SpecialisationError("no compiler here")

    clock(list=1000.0, vmap=400.0, compiling=40.0)
    monkeypatch.setattr(engine_parts, "CompiledEngine", refuse)
    _, stats = reconstruct(candidates=2)
    assert stats["engine"] == "vmap"
    assert stats["calibration"]["reason"] == "no compiler here"


def test_the_same_run_takes_the_same_engine_again(clock, caplog):
    clock(list=0.5, vmap=2.0)
    first, _ = reconstruct()
    clock(list=2.0, vmap=1.0)  # another measurement would decide otherwise
    with caplog.at_level(logging.INFO):
        second, stats = reconstruct()
    assert stats["engine"] == "list"
    assert "as an earlier run found" in caplog.text
    assert torch.equal(first["candidates"], second["candidates"])
    _, stats = reconstruct(iterations=4)  # another problem: measured anew
    assert stats["engine"] == "vmap"


def test_a_damaged_memory_of_choices_is_measured_anew(clock, own_cache):
    clock(list=0.5, vmap=2.0)
    reconstruct()
    (file,) = own_cache.rglob("*.json")
    file.write_text("{half")
    clock(list=2.0, vmap=1.0)
    assert reconstruct()[1]["engine"] == "vmap"
    clock(list=0.5, vmap=2.0)
    assert reconstruct()[1]["engine"] == "vmap", "the new choice was not kept"


def test_measuring_disturbs_neither_candidates_nor_random_numbers(monkeypatch):
    """Augmentation and noise draw random numbers; with and without measuring, the path is the same."""
    random = ["optim.langevin_noise=0.1", "+augmentations.discrete_shift.lim=2"]
    pinned, _ = reconstruct("restarts.candidate_batching=vmap", *random, candidates=2)
    monkeypatch.setattr(calibration, "SHORT", 1)
    monkeypatch.setattr(calibration, "CLEARLY", 0.0)  # never `list`
    monkeypatch.setattr(calibration, "COMPILING", 1e6)
    before = torch.get_rng_state()
    measured, stats = reconstruct(*random, candidates=2)
    assert stats["engine"] == "vmap"
    assert stats["calibration"]["step_seconds"]["list"] > 0
    assert torch.equal(measured["candidates"], pinned["candidates"])
    assert stats["gradient_evaluations"] == 2 * 3
    assert torch.equal(before, torch.get_rng_state())


def test_a_resumed_run_takes_the_checkpoints_engine(clock, monkeypatch, tmp_path):
    file = [f"impl.checkpoint_path={tmp_path / 'checkpoint.pt'}", "impl.checkpoint_every=2"]
    clock(list=0.5, vmap=2.0)
    whole, _ = reconstruct(iterations=6)
    iterate = JointLoop._iterate

    def killed(self, iteration, bar):
        if iteration == 5:
            raise SystemExit
        return iterate(self, iteration, bar)

    monkeypatch.setattr(JointLoop, "_iterate", killed)
    with pytest.raises(SystemExit):
        reconstruct(*file, iterations=6)
    monkeypatch.setattr(JointLoop, "_iterate", iterate)
    monkeypatch.setattr(calibration, "seconds", lambda *args: pytest.fail("measured"))
    monkeypatch.setenv("BREACHING_EXT_CACHE", str(tmp_path / "lost"))
    resumed, stats = reconstruct(*file, iterations=6)
    assert stats["engine"] == "list"
    assert torch.equal(resumed["candidates"], whole["candidates"])


@given(
    *(st.floats(1e-5, 10), st.floats(1e-5, 10), st.tuples(*[st.floats(0, 1)] * len(fields(Costs)))),
    *(st.integers(1, 10**6), st.floats(0.1, 1000), st.sampled_from([calibration.SAVED, calibration.SAVED_AVX512])),
)
def test_compiling_never_takes_longer_than_the_run_it_is_for(listed, vmap, costs, evaluations, expected, saved):
    steps = {"list": listed, "vmap": vmap}
    compiled = calibration.expected_step(vmap, Costs(*costs), saved)
    assert 0 < compiled <= vmap
    if calibration.compiling_pays(steps, compiled, evaluations, expected):
        assert calibration.compiling_may_pay(steps, evaluations, expected)  # its operations would be timed
        assert expected < min(steps.values()) * evaluations  # never longer than the run itself
        assert calibration.compiling_pays(steps, compiled, 2 * evaluations, expected)


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
def test_what_compiling_may_save_depends_on_where_the_time_goes_and_is_tried_in_a_long_run(monkeypatch, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    saved = calibration.saved_shares(torch.device("cpu"))
    assert saved == {"AVX512": calibration.SAVED_AVX512, "AVX2": calibration.SAVED}[capability]
    light, layout = (calibration.expected_step(0.2, Costs(**{name: 0.25}), saved) for name in ("light", "layout"))
    assert max(light, layout) < 0.2
    heavy = {"weights": 0.05, "model": 0.05}
    assert layout < calibration.expected_step(0.2, Costs(layout=0.25, **heavy), saved) < 0.2
    assert calibration.expected_step(0.2, Costs(**heavy), saved) == 0.2
    steps, gain = {"list": 0.4, "vmap": 0.2}, 0.2 - layout
    assert calibration.compiling_pays(steps, layout, 1000, 0.99 * 1000 * gain)
    assert not calibration.compiling_pays(steps, layout, 1000, 1.01 * 1000 * gain)
    steps = {"list": 0.01, "vmap": 0.2}  # compiling will not be faster than `list`: tried for a small share only
    assert not calibration.compiling_pays(steps, light, 1000, 0.03 * 0.01 * 1000)
    assert calibration.compiling_pays(steps, light, 1000, 0.015 * 0.01 * 1000)


def test_where_nothing_can_be_recorded_the_fastest_that_works_is_taken(monkeypatch):
    def refuse(function):
        raise NotImplementedError("no tracing here")

    monkeypatch.setattr(tracing, "make_fx", refuse)
    monkeypatch.setattr(calibration, "SHORT", 1)
    monkeypatch.setattr(calibration, "CLEARLY", 0.0)  # never `list`
    _, stats = reconstruct(candidates=2)
    assert stats["engine"] == "vmap"
    assert "no graph can be recorded" in stats["calibration"]["reason"]


def test_engines_are_timed_in_turn_forwards_and_backwards():
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in ("list", "vmap")}
    aside = {"recording": lambda: calls.append("recording")}
    assert set(calibration.seconds(functions, torch.device("cpu"), 10**9, aside)) == {"list", "vmap", "recording"}
    assert calls == 6 * ["recording", "vmap", "list", "list", "vmap", "recording"]


@pytest.fixture
def lasting(monkeypatch):
    """Return a function that lets time pass by a clock of its own, and how often it was called."""
    now = 0.0
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: now)

    def make(seconds):
        seconds, called = iter(seconds), []

        def call() -> None:
            nonlocal now
            now += next(seconds)
            called.append(now)

        return call, called

    return make


def test_the_median_counts(lasting):
    """A lucky moment of one engine must not decide."""
    quick, _ = lasting([9.0, 0.1, 0.4, 0.4, 0.5, 0.4])
    slow, called = lasting([9.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    found = calibration.seconds({"quick": quick, "slow": slow}, torch.device("cpu"), 1600)
    assert found == {"quick": pytest.approx(0.4), "slow": pytest.approx(1.0)}
    assert len(called) == 5  # a warm-up, and four rounds that take more than 4.8 seconds


def test_engines_are_compared_round_by_round(lasting):
    """The machine slows down in every round, and once in the middle of one: medians alone would say `vmap`."""
    vmap, _ = lasting([9.0, 1.0, 2.0, 3.0, 10.0, 11.0, *[99.0] * 6])
    compiled, _ = lasting([9.0, 0.9, 1.8, 30.0, 9.0, 9.9, *[89.1] * 6])
    aside, _ = lasting([0.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    engines = {"vmap": vmap, "compile": compiled}
    found = calibration.seconds(engines, torch.device("cpu"), 10**9, {"recording": aside}, repeats=5)
    assert found == {"vmap": pytest.approx(3.0), "compile": pytest.approx(2.7), "recording": pytest.approx(7.0)}


@pytest.mark.parametrize(
    ("step", "iterations", "calls"),
    [
        (1.0, 1, 1 + 3),  # a short run: three, which take two seconds with the third
        (3.0, 1, 1 + 1),  # one that takes longer is enough
        (0.01, 1500, 1 + 5),  # 0.3 % of 15 s hold four; the fifth is above
        (1.0, 10**6, 1 + 11),
    ],
)
def test_a_run_is_measured_as_long_as_it_is_worth(lasting, step, iterations, calls):
    call, called = lasting(itertools.repeat(step))
    aside, along = lasting(itertools.repeat(0.0))
    found = calibration.seconds({"vmap": call}, torch.device("cpu"), iterations, {"recording": aside})
    assert found == {"vmap": pytest.approx(step), "recording": 0.0}
    assert len(called) == len(along) == calls


@pytest.mark.parametrize(
    ("until_decided", "compiled", "rounds"),
    [
        (False, [0.9, 1.1], 3),  # 0.3 % of 1,400 s: three rounds of two seconds are more
        (True, [0.9, 1.1], 8),  # each wins rounds, so measuring goes on to 1 %
        (True, [0.9, 0.95], 3),  # one wins all
        (True, [1.1, 1.2], 3),
    ],
)
def test_engines_that_are_alike_are_timed_for_longer(lasting, until_decided, compiled, rounds):
    vmap, _ = lasting(itertools.repeat(1.0))
    other, called = lasting(itertools.chain([9.0], itertools.cycle(compiled)))
    pair = {"vmap": vmap, "compile": other}
    calibration.seconds(pair, torch.device("cpu"), 1400, until_decided=until_decided)
    assert len(called) == 1 + rounds


def test_no_operation_is_timed_where_the_run_is_too_short_to_compile(clock, monkeypatch):
    clock(list=0.02, vmap=0.01, compiling=40.0)
    monkeypatch.setattr(StackedEvaluation, "costs", lambda *known: pytest.fail("timed"))
    _, stats = reconstruct(iterations=50, candidates=2)
    assert stats["calibration"]["expected_step_seconds"] is None


def test_a_slow_machine_expects_to_compile_longer():
    usual, factors = calibration.TRACING, (0.0001, 0.5, 1, 2, 10000)
    expected = [calibration.expected_compile_seconds(1000, usual * factor) for factor in factors]
    base = calibration.COMPILING + 1000 * calibration.COMPILING_PER_OPERATION
    assert expected == pytest.approx([base / calibration.MOST_DIFFERENT, base / 2, base, base * 2, base * 4])
    checked = calibration.expected_compile_seconds(1000, usual, 2.0)
    assert checked == pytest.approx(base + 2 * calibration.CHECKING)  # evaluations are slow where they are measured so
    assert 0 < calibration.seconds({"recording": record_a_little}, torch.device("cpu"), 1)["recording"] / LITTLE < 1


@given(st.floats(1 / 3, 3.0), st.integers(1, 10**5), st.floats(0.0, 0.6))
def test_a_moment_at_which_everything_is_slow_decides_alike(slow, iterations, saved):
    """Of the tracing, the iterations and the compiling, all are so many times slower then."""
    steps, tracing = {"list": 0.5, "vmap": 0.1}, calibration.TRACING

    def decided(factor: float) -> bool:
        now = {name: factor * step for name, step in steps.items()}
        expected = calibration.expected_compile_seconds(500, factor * tracing, now["vmap"])
        return calibration.compiling_pays(now, (1 - saved) * now["vmap"], iterations, expected)

    usual = calibration.expected_compile_seconds(500, tracing, 0.1)
    assume(abs(max(saved, calibration.WORTH_A_TRY) * 0.1 * iterations / usual - 1) > 1e-9)
    assert decided(slow) == decided(1.0)


@pytest.mark.parametrize("engine", ["vmap", "compile"])
def test_an_engine_rewound_is_as_new(traced_only, engine):
    """After measuring, an engine goes back to its starts, its optimizer to its beginning."""
    module = build_model("own")
    payload, shared, *_ = observed(module)
    options = [f"restarts.candidate_batching={engine}", "restarts.seed=2", "optim.signed=soft"]
    cfg = attack_config("joint_candidates", options, 6)
    rewinding, plain = (JointCandidateAttacker(module, loss(), cfg, SETUP) for _ in range(2))
    choose = rewinding._choose_engine

    def stepped_and_rewound(parts, *others):
        built = choose(parts, *others)
        step, track = advancing(built.engine), Track.start(built.engine.parameters, parts.box)
        for iteration in range(3):
            step(iteration, track)
        built.engine.rewind()
        return built

    rewinding._choose_engine = stepped_and_rewound
    again, expected = (a.reconstruct(payload, shared)[0]["candidates"] for a in (rewinding, plain))
    assert torch.equal(again, expected)


# -- the replay ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("model", ["lenet_zhu", "own"])
def test_replay_is_the_same_to_the_last_bit_through_the_warm_up(monkeypatch, model, candidates):
    group = ["regularization.group_regularization.scale=0.5", "regularization.group_regularization.warmup_iters=2"]
    run = partial(
        reconstruct, "restarts.candidate_batching=vmap", *group, candidates=candidates, iterations=5, model=model
    )
    plain, _ = run()
    monkeypatch.setattr(calibration, "SHORT", 1)
    replay, _ = run()
    assert torch.equal(plain["candidates"], replay["candidates"])


def test_recording_computes_nothing_and_takes_no_memory():
    huge = torch.zeros(1, 1).expand(2, 10**13)  # a result of this size does not fit into any machine
    weights = torch.ones(1, 1)
    assert operations(record(lambda x: ([x * weights], x.sum(1), x.sum(1)), [huge])) == 3


def test_a_replay_that_would_differ_is_not_used(caplog):
    """The number of the call enters the value: a graph would freeze it."""
    calls = []

    def drifting(stack):
        calls.append(1)
        return [stack * len(calls)], stack.flatten(1).sum(1), stack.flatten(1).sum(1)

    with caplog.at_level(logging.INFO):
        assert replayed(drifting, [torch.rand(2, 3)]) is drifting
    assert "differs" in caplog.text


def test_a_replay_that_fails_is_not_used(caplog, monkeypatch):
    def fails(self, *stacks):
        raise RuntimeError("no such shape")

    def evaluate(stack):
        return [stack * 2], stack.flatten(1).sum(1), stack.flatten(1).sum(1)

    monkeypatch.setattr(Replay, "__call__", fails)
    with caplog.at_level(logging.INFO):
        assert replayed(evaluate, [torch.rand(2, 3)]) is evaluate
    assert "its replay fails (RuntimeError: no such shape)" in caplog.text


def test_an_evaluation_that_looks_at_its_numbers_cannot_be_recorded():
    def looking(stack):
        return [stack if stack.sum() > 0 else -stack], stack.sum(1), stack.sum(1)

    with pytest.raises(SpecialisationError, match="cannot be recorded"):
        record(looking, [torch.rand(2, 3)])


def test_lbfgs_counts_its_iterations_and_evaluations(monkeypatch, own_cache, clock):
    """Timed is an iteration of up to twenty evaluations: there are as many to do as the config says."""
    clock(list=1.0, vmap=2.0)
    monkeypatch.setattr(calibration, "SHORT", 200)
    options = ["optim.optimizer=l-bfgs", "optim.signed=null", "objective.type=euclidean"]
    _, stats = reconstruct(*options, iterations=10)
    assert stats["calibration"]["iterations"] == 10
    assert stats["calibration"]["step_seconds"] == {"list": 2.0, "vmap": 2.0}  # measured, as 200 evaluations


def test_a_choice_that_another_process_made_meanwhile_holds(clock, own_cache, monkeypatch):
    """Jobs of a sweep start together and measure under each other's load."""
    clock(list=0.5, vmap=2.0)
    reconstruct()
    (file,) = own_cache.rglob("*.json")
    of_the_other = file.read_text()
    file.unlink()
    clock(list=2.0, vmap=1.0)
    measure = fastest._measure

    def meanwhile(*arguments):
        found = measure(*arguments)
        file.write_text(of_the_other)
        return found

    monkeypatch.setattr(fastest, "_measure", meanwhile)
    assert reconstruct()[1]["engine"] == "list"
    assert file.read_text() == of_the_other


@pytest.mark.parametrize("change", ["processor", "version"])
def test_a_choice_holds_for_the_machine_and_the_version_that_it_was_made_by(clock, monkeypatch, change):
    clock(list=0.5, vmap=2.0)
    assert reconstruct()[1]["engine"] == "list"
    clock(list=2.0, vmap=1.0)
    if change == "processor":
        monkeypatch.setattr(choices, "_processor", lambda: "another")
    else:
        monkeypatch.setattr(choices, "__version__", "99")
    assert reconstruct()[1]["engine"] == "vmap"


def test_a_user_without_a_home(clock, monkeypatch, caplog):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("BREACHING_EXT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(choices.Path, "home", homeless)
    clock(list=0.5, vmap=2.0)
    assert reconstruct()[1]["engine"] == "list"
    assert "BREACHING_EXT_CACHE" in caplog.text


def test_a_cache_that_cannot_be_written_is_said(clock, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BREACHING_EXT_CACHE", str(tmp_path / "file"))
    clock(list=0.5, vmap=2.0)
    assert reconstruct()[1]["engine"] == "list"
    assert "is not kept" in caplog.text


def test_operations_that_cannot_be_timed_are_no_reason_to_stop(clock, monkeypatch):
    def fail(self, stacks, seconds):
        raise torch.OutOfMemoryError("CUDA out of memory")

    clock(list=1000.0, vmap=400.0, compiling=40.0)
    monkeypatch.setattr(StackedEvaluation, "costs", fail)
    _, stats = reconstruct(candidates=2)
    assert stats["engine"] == "vmap"
    assert "cannot be timed (OutOfMemoryError" in stats["calibration"]["reason"]
