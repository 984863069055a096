"""Stacked, compiled and sequential training give the same results; divergence, resuming and choosing."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from breaching_ext.optimizer_study import VARIANTS, OptimizerExperiment, create_optimizer, run_grid
from breaching_ext.optimizer_study import grid as grid_module
from breaching_ext.optimizer_study.config import AdamWConfig, Budget
from breaching_ext.optimizer_study.executor import (
    COMPILE_FROM_SECONDS,
    even_chunks,
    make_plan,
)
from breaching_ext.optimizer_study.memory import members_in_memory
from breaching_ext.optimizer_study.models import create_model
from breaching_ext.optimizer_study.task import TrainingTask
from breaching_ext.optimizer_study.training import SequentialRun, StackedRun, train

CELLS = [(1.0, 0.0), (0.25, 4.0), (2.0, 1.0)]


def images(n, size=4, seed=0):
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_task(variant_id="B3", model="mlp", epochs=3, **options):
    """Sixty steps in three epochs, with a smaller last batch."""
    variant = VARIANTS[variant_id]
    size = 8 if model == "small_conv" else 4
    skeleton = create_model(model, size, latent=3, **({"hidden": 5} if model == "mlp" else {"channels": (2, 3)}))
    return TrainingTask(
        variant=variant,
        schedule=variant.create_schedule(epochs),
        budget=Budget(79, 4, epochs),
        model=skeleton.double(),
        train=images(79, size),
        test=images(10, size, seed=1),
        **options,
    )


def parameters_after(run, members):
    logs = train(run, members)
    return logs, run.params


@pytest.mark.parametrize("variant_id", VARIANTS)
def test_stacked_training_is_sequential_training(variant_id):
    """Parameters agree to 1e-12 after sixty steps in float64, the sequential side with torch's own
    optimizer."""
    task = make_task(variant_id)
    assert task.steps == 60
    stacked_logs, stacked = parameters_after(StackedRun(task, CELLS), len(CELLS))
    for member, cell in enumerate(CELLS):
        logs, alone = parameters_after(SequentialRun(task, [cell]), 1)
        for name, value in alone.items():
            assert (stacked[name][member] - value[0]).abs().max().item() <= 1e-12
        assert logs[0].epoch_test_losses == pytest.approx(stacked_logs[member].epoch_test_losses, rel=1e-10)
        assert logs[0].epoch_train_losses == pytest.approx(stacked_logs[member].epoch_train_losses, rel=1e-10)


def test_stacked_convolutions_are_sequential_ones():
    task = make_task("D3", "small_conv")
    _, stacked = parameters_after(StackedRun(task, CELLS), len(CELLS))
    for member, cell in enumerate(CELLS):
        _, alone = parameters_after(SequentialRun(task, [cell]), 1)
        for name, value in alone.items():
            assert (stacked[name][member] - value[0]).abs().max().item() <= 1e-12


def test_the_sequential_run_is_what_a_user_would_write():
    """The members of a grid follow the path of `create_optimizer` in a plain training loop."""
    task = make_task("B8")
    budget, model = task.budget, copy.deepcopy(task.model)
    optimizer = create_optimizer("B8", model.parameters(), lr_multiplier=0.5, wd_multiplier=8, budget=budget)
    for epoch in range(3):
        for index, batch in enumerate(task.batches(epoch)):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(batch), batch).backward()
            optimizer.set_epoch(epoch + index / budget.steps_per_epoch)
            optimizer.step()
    _, stacked = parameters_after(StackedRun(task, [(0.5, 8.0)]), 1)
    for name, value in model.named_parameters():
        assert (stacked[name][0] - value).abs().max().item() <= 1e-12


@pytest.mark.xfail(
    torch.__version__ < (2, 12), reason="its compiler fails with KeyError", raises=Exception, strict=True
)
def test_compiled_training_is_plain_training():
    layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Unflatten(1, (1, 4, 4))).double()
    task = TrainingTask(**{**make_task("D3", epochs=1).__dict__, "model": layers})
    _, plain = parameters_after(StackedRun(task, CELLS), len(CELLS))
    _, fast = parameters_after(StackedRun(task, CELLS, compiled=True), len(CELLS))
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-10, atol=1e-12)


def test_members_see_the_same_batches_and_every_image_once():
    task = make_task()
    batches = list(task.batches(1))
    assert [len(b) for b in batches] == [4] * 19 + [3]
    seen = torch.cat(batches).flatten(1).sum(1).sort().values
    torch.testing.assert_close(seen, task.train.flatten(1).sum(1).sort().values)
    assert not torch.equal(next(task.batches(0)), next(task.batches(1)))


def grid_arguments(**changes):
    return {
        "variant_id": "B1",
        "model": create_model("mlp", 4, hidden=4, latent=2),
        "train": images(24).float(),
        "test": images(8, seed=1).float(),
        "lr_multipliers": [0.5, 1.0],
        "wd_multipliers": [0.0, 1.0, 2.0],
        "epochs": 3,
        "batch_size": 8,
        "progress": False,
    } | changes


def losses(experiment):
    return [result.log.epoch_test_losses for result in experiment.results]


@pytest.mark.parametrize("executor", ["auto", "stacked", "sequential"])
def test_executors_and_chunks_agree(executor):
    whole = run_grid(**grid_arguments(executor="stacked"))
    other = run_grid(**grid_arguments(executor=executor, chunk=4))
    for a, b in zip(losses(whole), losses(other), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert [r.cell for r in other.results] == [(lr, wd) for lr in (0.5, 1.0) for wd in (0.0, 1.0, 2.0)]
    assert other.config["plan"]["executor"] in (("stacked", "sequential") if executor == "auto" else (executor,))


def test_the_model_and_the_global_generator_are_left_alone():
    arguments = grid_arguments()
    before, state = copy.deepcopy(arguments["model"].state_dict()), torch.get_rng_state()
    run_grid(**arguments)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in arguments["model"].state_dict().items():
        assert torch.equal(value, before[name])


def test_runs_repeat_and_depend_on_the_seed():
    """With a given executor, to the last bit; `auto` times the executors, whose rounding differs."""
    first, again, other = (run_grid(**grid_arguments(executor="stacked", seed=seed)) for seed in (42, 42, 43))
    assert losses(first) == losses(again)
    assert losses(first) != losses(other)


@pytest.mark.parametrize("executor", ["stacked", "sequential"])
def test_a_diverged_member_does_not_stop_the_others(executor, tmp_path):
    arguments = grid_arguments(variant_id="A2", lr_multipliers=[1.0, 1e30], executor=executor)
    experiment = run_grid(**arguments)
    assert {d["lr_multiplier"] for d in experiment.diverged} == {1e30}
    assert len(experiment.diverged) == 3
    healthy = run_grid(**(arguments | {"lr_multipliers": [1.0]}))
    assert losses(experiment)[:3] == losses(healthy)
    bad = experiment.results[-1].log
    assert math.isnan(bad.final_test_loss)
    assert bad.diverged_epoch is not None
    loaded = OptimizerExperiment.load(experiment.save(tmp_path / "a2.json"))
    assert loaded.diverged == experiment.diverged


def kept_lines(checkpoint):
    return [json.loads(line) for line in checkpoint.read_text().splitlines() if line]


def kept_cells(checkpoint):
    return [(r["lr_multiplier"], r["wd_multiplier"]) for line in kept_lines(checkpoint) for r in line["results"]]


def test_every_chunk_is_on_disk_before_the_next_one_begins(tmp_path, monkeypatch):
    """However short it was: nobody calls anything when a process is killed."""
    checkpoint = tmp_path / "grid.partial"
    real, kept = grid_module.train, []

    def watched(*args):
        kept.append(len(kept_cells(checkpoint)) if checkpoint.exists() else 0)
        return real(*args)

    monkeypatch.setattr(grid_module, "train", watched)
    run_grid(**grid_arguments(executor="stacked", chunk=2, compile=False), checkpoint=checkpoint)
    assert kept == [0, 2, 4]
    assert [len(line["results"]) for line in kept_lines(checkpoint)] == [2, 2, 2], "a chunk is written once"


def test_a_line_that_was_cut_short_costs_its_chunk_and_no_other(tmp_path, monkeypatch):
    checkpoint = tmp_path / "grid.partial"
    arguments = grid_arguments(executor="stacked", chunk=2, compile=False)
    whole = run_grid(**arguments, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-200])
    real, trained = grid_module.train, []
    monkeypatch.setattr(grid_module, "train", lambda run, n, *rest: (trained.append(n), real(run, n, *rest))[1])
    for _ in range(2):  # what was trained again is behind the piece
        again = run_grid(**arguments, checkpoint=checkpoint)
        assert losses(again) == losses(whole)
    assert trained == [2]


def test_nothing_is_left_of_a_first_chunk_that_cannot_be_written(tmp_path, monkeypatch):
    """A full disk: the next call begins anew, and need not be told to delete a piece of a line."""
    checkpoint = tmp_path / "grid.partial"
    arguments = grid_arguments(executor="stacked", chunk=2, compile=False)

    def full(path, write):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("breaching_ext.files.write_atomically", full)
        with pytest.raises(OSError, match="No space"):
            run_grid(**arguments, checkpoint=checkpoint)
    assert not checkpoint.exists()
    assert losses(run_grid(**arguments, checkpoint=checkpoint)) == losses(run_grid(**arguments))


class Noisy(nn.Module):
    """A model that draws in every call."""

    def __init__(self):
        super().__init__()
        self.inner = create_model("mlp", 4, hidden=4, latent=2)

    def forward(self, images):
        return self.inner(images + 0.1 * torch.randn_like(images))


def test_a_model_that_draws_goes_on_from_its_own_checkpoint(tmp_path):
    checkpoint = tmp_path / "grid.partial"
    arguments = grid_arguments(model=Noisy(), executor="sequential")
    first = run_grid(**arguments, checkpoint=checkpoint)
    state = torch.get_rng_state()
    again = run_grid(**arguments, checkpoint=checkpoint)
    assert losses(first) == losses(again)
    assert torch.equal(state, torch.get_rng_state())


def test_a_killed_grid_resumes_where_it_was(tmp_path, monkeypatch):
    """After an interruption in the third chunk the first two are not trained again, and the result is the
    same."""
    checkpoint = tmp_path / "grid.partial"
    arguments = grid_arguments(executor="stacked", chunk=2, compile=False)
    whole = run_grid(**arguments)
    real, trained = grid_module.train, []

    def interrupted(run, members, *rest):
        trained.append(members)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return real(run, members, *rest)

    monkeypatch.setattr(grid_module, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_grid(**arguments, checkpoint=checkpoint)
    before = kept_lines(checkpoint)
    assert before[-1]["seconds"]["wall_seconds"] > 0
    before[-1]["seconds"] = {"wall_seconds": 1000.0, "cpu_seconds": 2000.0}
    checkpoint.write_text("\n".join(map(json.dumps, before)))
    resumed = run_grid(**arguments, checkpoint=checkpoint)
    assert trained == [2, 2, 2, 2]
    assert 1000 < resumed.config["wall_seconds"] < 1500
    assert 2000 < resumed.config["cpu_seconds"] < 2500
    assert losses(resumed) == losses(whole)


def test_a_checkpoint_of_another_run_is_refused_and_stays(tmp_path):
    checkpoint = tmp_path / "grid.partial"
    run_grid(**grid_arguments(executor="stacked"), checkpoint=checkpoint)
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint=.*unfinished run of other settings"):
        run_grid(**grid_arguments(executor="stacked", seed=7), checkpoint=checkpoint)
    assert checkpoint.read_bytes() == before
    checkpoint.write_text("notes of mine")
    with pytest.raises(ValueError, match=r"checkpoint=.*unfinished run of other settings"):
        run_grid(**grid_arguments(executor="stacked"), checkpoint=checkpoint)
    assert checkpoint.read_text() == "notes of mine"


class Scaled(nn.Module):
    """A model whose text and weights say nothing of what it computes, nor of what it passes back."""

    def __init__(self, factor=1.0, detached=False):
        super().__init__()
        self.inner = create_model("mlp", 4, hidden=4, latent=2)
        self.factor, self.detached = factor, detached

    def forward(self, images):
        out = self.inner(images)
        return self.factor * (0.5 * out.detach() + 0.5 * out if self.detached else out)


@pytest.mark.parametrize("other", [{"factor": 0.9}, {"detached": True}])
def test_a_model_of_the_same_text_and_weights_but_other_code_is_another(other, tmp_path):
    checkpoint = tmp_path / "grid.partial"
    first, second = Scaled(), Scaled(**other)
    second.load_state_dict(first.state_dict())
    assert repr(first) == repr(second)
    run_grid(**grid_arguments(model=first, executor="stacked"), checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"checkpoint=.*other settings, model or data"):
        run_grid(**grid_arguments(model=second, executor="stacked"), checkpoint=checkpoint)


def test_rounding_makes_no_other_run(tmp_path):
    """Other machines and numbers of threads add in another order."""
    checkpoint = tmp_path / "grid.partial"
    run_grid(**grid_arguments(model=(model := Scaled()), executor="stacked"), checkpoint=checkpoint)
    before = checkpoint.read_bytes()
    model.factor = 1 + 1e-6
    run_grid(**grid_arguments(model=model, executor="stacked"), checkpoint=checkpoint)
    assert checkpoint.read_bytes() == before, "something was trained again"


def test_a_checkpoint_keeps_the_cells_that_another_grid_trained(tmp_path):
    checkpoint = tmp_path / "grid.partial"
    whole = run_grid(**grid_arguments(executor="stacked"), checkpoint=checkpoint)
    cell = whole.results[0].cell
    other = grid_arguments(executor="stacked") | {"lr_multipliers": [cell[0]], "wd_multipliers": [cell[1], 1000.0]}
    part = run_grid(**other, checkpoint=checkpoint)
    assert losses(part)[0] == losses(whole)[0]
    assert set(kept_cells(checkpoint)) == {r.cell for r in (*whole.results, *part.results)}


def test_a_run_with_logs_of_steps_leaves_the_checkpoint_alone(tmp_path, caplog):
    checkpoint = tmp_path / "grid.partial"
    run_grid(**grid_arguments(executor="stacked"), checkpoint=checkpoint)
    before = checkpoint.read_bytes()
    run_grid(**grid_arguments(executor="stacked", log_steps=True), checkpoint=checkpoint)
    assert checkpoint.read_bytes() == before
    assert "is not used" in caplog.text


@pytest.mark.parametrize("executor", ["auto", "sequential"])
def test_planning_does_not_move_the_statistics_of_a_model(executor):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Unflatten(1, (1, 4, 4)))
    before = copy.deepcopy(model.state_dict())
    run_grid(**grid_arguments(model=model, executor=executor))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sizes_for_which_memory_runs_out_are_not_taken(monkeypatch):
    """The others are; where none fits, the least is halved, and what is no want of memory is said."""
    cells = [(1.0, float(wd)) for wd in range(32)]
    fits = 16

    def fake_time(build, task, repeats=5):
        run = build()
        if isinstance(run, SequentialRun):
            return 100.0
        if len(run.lr) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return 1.0

    monkeypatch.setattr("breaching_ext.optimizer_study.executor.time_step", fake_time)
    monkeypatch.setattr("breaching_ext.optimizer_study.executor._STEP_SECONDS", 1e9)
    assert make_plan(make_task(), cells, compiled=False).chunk == 16
    fits = 5
    assert make_plan(make_task(), cells, compiled=False).chunk == 4
    fits = 0
    assert make_plan(make_task(), cells, compiled=False).executor == "sequential"
    with pytest.raises(torch.OutOfMemoryError):
        make_plan(make_task(), cells, "stacked", compiled="auto")


@pytest.mark.parametrize(
    "change",
    [{"lr_multipliers": [1.0, math.inf]}, {"wd_multipliers": [0.0, math.nan]}, {"settings": {"eps": math.inf}}],
)
def test_numbers_that_no_file_could_hold_are_refused(change):
    with pytest.raises(ValueError, match="finite number"):
        run_grid(**(grid_arguments() | change))


def test_steps_and_samples_are_recorded_when_asked(tmp_path):
    arguments = grid_arguments(log_steps=True, sample_epochs=[1, 3], variant_id="B3")
    stacked = run_grid(**arguments, executor="stacked")
    alone = run_grid(**arguments, executor="sequential")
    for a, b in zip(stacked.results, alone.results, strict=True):
        for name in ("step_losses", "step_grad_norms", "step_weight_norms", "step_lrs"):
            assert len(getattr(a.log, name)) == 9
            assert getattr(a.log, name) == pytest.approx(getattr(b.log, name), rel=1e-3)
        assert a.log.step_lrs[0] == pytest.approx(a.learning_rate)
        assert sorted(a.log.samples) == [1, 3]
        assert a.log.samples[3].shape == (8, 1, 4, 4)
    loaded = OptimizerExperiment.load(stacked.save(tmp_path / "b3.json"))
    assert loaded.results[2].log.step_grad_norms == stacked.results[2].log.step_grad_norms
    assert (loaded.results[2].log.samples[3] == stacked.results[2].log.samples[3]).all()
    without = run_grid(**grid_arguments(variant_id="B3"), executor="stacked")  # to the same file
    loaded = OptimizerExperiment.load(without.save(tmp_path / "b3.json"))
    assert not loaded.results[2].log.step_grad_norms


def test_a_model_with_buffers_is_trained_sequentially():
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Unflatten(1, (1, 4, 4)))
    assert run_grid(**grid_arguments(model=model)).config["plan"]["executor"] == "sequential"
    with pytest.raises(ValueError, match="buffers"):
        run_grid(**grid_arguments(model=model, executor="stacked", compile=False))


def test_test_images_do_not_move_the_statistics_of_batch_norm(monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Unflatten(1, (1, 4, 4)))
    seen, measure = [], SequentialRun.test_losses

    def watched(self):
        before = self.model[2].running_mean.clone()
        losses = measure(self)
        seen.append((self.model[2].running_mean == before).all() and self.model[2].training)
        return losses

    monkeypatch.setattr(SequentialRun, "test_losses", watched)
    run_grid(**grid_arguments(model=model, executor="sequential"))
    assert seen
    assert all(seen)


class Halving(nn.Module):
    """Computes something else in training, as denoising models do."""

    def __init__(self):
        super().__init__()
        self.inner = create_model("mlp", 4, hidden=4, latent=2)

    def forward(self, images):
        return self.inner(0.5 * images if self.training else images)


def test_test_losses_are_those_of_evaluation_mode_whatever_the_executor():
    model = Halving()
    stacked, alone = (run_grid(**grid_arguments(model=model, executor=e)) for e in ("stacked", "sequential"))
    for a, b in zip(losses(stacked), losses(alone), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert model.training
    samples = [
        run_grid(**grid_arguments(model=model, executor=e, sample_epochs=[1])) for e in ("stacked", "sequential")
    ]
    a, b = (run.results[0].log.samples[1] for run in samples)
    assert abs(a - b).max() < 1e-5


@pytest.mark.parametrize("what", ["frozen", "dropout"])
def test_models_that_executors_would_treat_differently_are_refused(what):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Dropout(0.5), nn.Unflatten(1, (1, 4, 4)))
    model[2].p = 0.5 if what == "dropout" else 0.0
    model[1].bias.requires_grad_(what != "frozen")
    with pytest.raises(ValueError, match=what):
        run_grid(**grid_arguments(model=model))


@pytest.mark.parametrize(
    ("sequential", "plain", "compiled", "expected"),
    [
        (4.0, 6.0, 9.0, ("stacked", False)),
        (4.0, 6.0, 3.0, ("stacked", True)),
        (1.0, 6.0, 4.5, ("sequential", False)),
    ],
)
def test_the_plan_is_the_fastest_way(monkeypatch, sequential, plain, compiled, expected):
    """With made-up milliseconds a step (a stack has three members), the least a member-step wins."""
    fast_step = object()

    def fake_time(build, task, repeats=5):
        run = build()
        if isinstance(run, SequentialRun):
            return sequential
        return compiled if run.function is fast_step else plain

    monkeypatch.setattr("breaching_ext.optimizer_study.executor.time_step", fake_time)
    monkeypatch.setattr("breaching_ext.optimizer_study.executor._batch_step", lambda run, task: lambda: None)
    monkeypatch.setattr("breaching_ext.optimizer_study.training.compiled_step", lambda *args: fast_step)
    plan = make_plan(make_task(), CELLS, compiled=True)
    assert (plan.executor, plan.compiled) == expected
    assert plan.chunk == (3 if plan.executor == "stacked" else 1)
    assert plan.compiled_ms == compiled / 3


def test_without_a_compiler_the_study_goes_on(monkeypatch, caplog):
    """As if nobody had thought of compiling, which takes the smallest chunk that is about as fast as the fastest."""
    cells = [(1.0, float(wd)) for wd in range(32)]

    def broken(*args):
        raise OSError("no compiler\nhere")

    def fake_time(build, task, repeats=5):
        run = build()
        return 100.0 if isinstance(run, SequentialRun) else {16: 17.0, 32: 32.0}[len(run.lr)]

    executor = "breaching_ext.optimizer_study.executor"
    for name, value in (
        ("_measure_compiled", broken),
        ("time_step", fake_time),
        ("_STEP_SECONDS", 1e9),
        ("COMPILE_FROM_SECONDS", 0),
    ):
        monkeypatch.setattr(f"{executor}.{name}", value)
    with caplog.at_level("INFO"):
        plan = make_plan(make_task(), cells)
    assert plan == make_plan(make_task(), cells, compiled=False)
    assert (plan.executor, plan.chunk, plan.compiled) == ("stacked", 32, False)
    assert "not compiled (OSError: no compiler)" in caplog.text
    with pytest.raises(OSError, match="no compiler"):
        make_plan(make_task(), cells, compiled=True)


def test_short_runs_are_not_compiled(monkeypatch):
    """Compiling is tried only where training takes long against it."""
    tried = []
    monkeypatch.setattr("breaching_ext.optimizer_study.executor.time_step", lambda build, task, repeats=5: 6.0)
    monkeypatch.setattr("breaching_ext.optimizer_study.executor._measure_compiled", lambda *args: tried.append(args))
    task = make_task()
    assert 6.0 / 1e3 * task.steps < COMPILE_FROM_SECONDS
    assert not make_plan(task, CELLS).compiled
    assert not tried
    make_plan(make_task(epochs=1000), CELLS)
    assert len(tried) == 1


def test_smaller_chunks_are_taken_where_they_are_faster(monkeypatch):
    """Of sixteen members at a time and all at once the faster is run, unless a chunk is given."""
    cells = [(1.0, float(wd)) for wd in range(32)]

    def fake_time(build, task, repeats=5):
        run = build()
        return 100.0 if isinstance(run, SequentialRun) else {16: 16.0, 32: 64.0, 8: 24.0}[len(run.lr)]

    monkeypatch.setattr("breaching_ext.optimizer_study.executor.time_step", fake_time)
    monkeypatch.setattr("breaching_ext.optimizer_study.executor._STEP_SECONDS", 1e9)
    assert make_plan(make_task(), cells, compiled=False).chunk == 16
    assert make_plan(make_task(), cells, compiled=False, chunk=8).chunk == 8


def test_a_chunk_that_is_given_is_not_cut_to_what_is_quick_to_measure(monkeypatch):
    """A step of a second a member: as many as a second holds, four at least, are tried unless a number is given."""
    cells = [(1.0, float(wd)) for wd in range(32)]

    def fake_time(build, task, repeats=5):
        run = build()
        return 1000.0 if isinstance(run, SequentialRun) else float(len(run.lr))

    monkeypatch.setattr("breaching_ext.optimizer_study.executor.time_step", fake_time)
    assert make_plan(make_task(), cells, compiled=False).chunk == 4
    assert make_plan(make_task(), cells, compiled=False, chunk=16).chunk == 16
    assert make_plan(make_task(), cells, compiled=False, chunk=20).chunk == 16


@given(members=st.integers(1, 300), largest=st.integers(1, 300))
def test_chunks_are_even_and_as_few_as_possible(members, largest):
    chunk = even_chunks(members, largest)
    count = -(-members // chunk)
    assert chunk <= largest
    assert count == -(-members // largest)
    assert (count - 1) * chunk < members <= count * chunk


def test_chunks_follow_memory(monkeypatch):
    task = make_task()
    monkeypatch.setattr("breaching_ext.optimizer_study.memory._free_memory", lambda: 1)
    assert members_in_memory(task) == 1
    assert make_plan(task, CELLS, "stacked", False).chunk == 1
    monkeypatch.setattr("breaching_ext.optimizer_study.memory._free_memory", lambda: 2**40)
    assert make_plan(task, CELLS, "stacked", False).chunk == len(CELLS)


def test_settings_reach_the_members():
    decay = run_grid(**grid_arguments(settings={"decay": "lr"}))
    assert decay.config["optimizer"]["decay"] == "lr"
    default = run_grid(**grid_arguments(wd_multipliers=[0.0, 1.0, 32.0]))
    decay = run_grid(**grid_arguments(wd_multipliers=[0.0, 1.0, 32.0], settings={"decay": "lr"}))
    assert losses(decay)[0] == pytest.approx(losses(default)[0], rel=1e-5)  # no decay, no difference
    assert losses(decay)[2] != pytest.approx(losses(default)[2], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant_id": "E1"}, "variant_id='E1'"),
        ({"executor": "magic"}, "executor='magic'.*auto, stacked, sequential"),
        ({"compile": "often"}, "compile='often'"),
        ({"lr_multipliers": [0.0]}, "lr_multipliers"),
        ({"wd_multipliers": [-1.0]}, "wd_multipliers"),
        ({"wd_multipliers": [1.0, 1.0]}, "without repetition"),
        ({"epochs": 0}, "epochs=0"),
        ({"model": "vit"}, "model='vit'.*mlp"),
        ({"test": torch.rand(4, 1, 5, 5)}, "test="),
        ({"train": torch.rand(0, 1, 4, 4)}, "at least one item"),
        ({"schedule": "linear"}, "schedule='linear'"),
    ],
)
def test_wrong_arguments_are_named_before_training(changes, message):
    with pytest.raises(ValueError, match=message):
        run_grid(**grid_arguments(**changes))


def test_adamw_with_torchs_decay_is_torchs_adamw_in_a_grid():
    """A member of a grid against a plain loop with torch.optim.AdamW, written out."""
    task = make_task("B1")
    task = TrainingTask(**{**task.__dict__, "variant": task.variant.with_settings(decay="lr")})
    assert isinstance(task.variant.config, AdamWConfig)
    model = copy.deepcopy(task.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 * 0.25, weight_decay=1e-3 * 4)
    for epoch in range(3):
        for batch in task.batches(epoch):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(batch), batch).backward()
            optimizer.step()
    _, stacked = parameters_after(StackedRun(task, CELLS), len(CELLS))
    for name, value in model.named_parameters():
        assert (stacked[name][1] - value).abs().max().item() <= 1e-12
