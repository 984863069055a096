"""A killed run goes on bit for bit."""

from __future__ import annotations

import pytest
import torch
from breaching.attacks.auxiliaries.common import optimizer_lookup
from cases import attack_config, build_model, loss, observed
from hydra import compose, initialize_config_module
from torch.utils._pytree import tree_leaves

from breaching_ext import run as run_module
from breaching_ext.attacks import JointCandidateAttacker
from breaching_ext.attacks.checkpoint import fingerprint
from breaching_ext.attacks.joint_loop import JointLoop
from breaching_ext.errors import ConfigError
from breaching_ext.matching.engine import GradientRule
from breaching_ext.matching.randomness import CandidateStreams
from breaching_ext.matching.state import on_device, optimizer_state, restore_optimizer
from breaching_ext.matching.vmap_engine import VmapEngine
from breaching_ext.registration import register

SETUP = {"dtype": torch.float64, "device": torch.device("cpu")}

#: options that each bring state of their own: moments, momentum, curvature, noise, augmentation, warm-up, consensus
CASES = {
    "adam": ["optim.warmup=3", "optim.step_size_decay=linear", "optim.langevin_noise=0.1"],
    "momgd": ["optim.optimizer=momgd", "+augmentations.discrete_shift.lim=2", "optim.step_size_decay=step-lr"],
    "jitter": ["+augmentations.colorjitter={mean: 0.1, std: 0.1}", "optim.langevin_noise=0.1"],
    "signed": ["optim.signed=hard", "optim.warmup=3", "optim.step_size_decay=cosine-decay"],
    "nesterov": ["optim.optimizer=momgd", "optim.signed=soft"],
    "l-bfgs": ["optim.optimizer=l-bfgs", "optim.signed=null", "objective.type=euclidean"],
}


def attack(path, every, batching, overrides, **more):
    model = build_model("own")
    payload, shared, *_ = observed(model)
    options = [
        f"impl.checkpoint_every={every or 'null'}",
        f"impl.checkpoint_path={path}",
        f"restarts.candidate_batching={batching}",
        "restarts.num_trials=2",
        "restarts.seed=1",
        "regularization.group_regularization.scale=0.2",
        "regularization.group_regularization.warmup_iters=2",
        "regularization.group_regularization.update_every=4",
        *overrides,
    ]
    cfg = attack_config("joint_candidates", options, 11)
    return JointCandidateAttacker(model, loss(), cfg, SETUP).reconstruct(payload, shared, **more)


class Killed(BaseException):
    """Stands for a kill: nothing in the package handles it."""


@pytest.mark.parametrize("batching", ["list", "vmap", "compile"])
@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, traced_only, case, batching):
    path = tmp_path / "checkpoint.pt"
    whole, whole_stats = attack(path, None, batching, CASES[case])
    original = JointLoop._iterate

    def killed(self, iteration, bar):
        if iteration == 8:
            raise Killed
        return original(self, iteration, bar)

    monkeypatch.setattr(JointLoop, "_iterate", killed)
    with pytest.raises(Killed):
        attack(path, 3, batching, CASES[case])
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]

    done = []

    def counted(self, iteration, bar):
        done.append(iteration)
        return original(self, iteration, bar)

    monkeypatch.setattr(JointLoop, "_iterate", counted)
    resumed, resumed_stats = attack(path, 3, batching, CASES[case])
    assert done == list(range(6, 11))
    assert resumed_stats["engine"] == batching
    assert torch.equal(resumed["candidates"], whole["candidates"])
    for key in ("Trial_0_Val", "Trial_1_Val", "gradient_evaluations", "alignments"):
        assert resumed_stats[key] == whole_stats[key]
    assert not path.exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    monkeypatch.setattr("breaching_ext.attacks.checkpoint.Checkpoint.remove", lambda self: None)
    attack(path, 3, "vmap", CASES["adam"])
    with pytest.raises(ConfigError, match="another config"):
        attack(path, 3, "vmap", ["optim.step_size=0.2"])


@pytest.mark.parametrize("change", ["weights", "loss", "normalisation", "local steps"])
def test_a_checkpoint_of_another_problem_is_refused(tmp_path, monkeypatch, change):
    """The gradients and the config are the same; what they are matched with is not."""
    path = tmp_path / "checkpoint.pt"
    monkeypatch.setattr("breaching_ext.attacks.checkpoint.Checkpoint.remove", lambda self: None)
    options = [f"impl.checkpoint_path={path}", "impl.checkpoint_every=3", "restarts.seed=1", "restarts.num_trials=2"]
    cfg = attack_config("joint_candidates", options, 3)
    steps = {"labels": [torch.tensor([1, 2])], "steps": 1, "data_per_step": 2, "lr": 0.1}

    def once(changed=False):
        model, loss_fn, known = build_model("own"), torch.nn.CrossEntropyLoss(), {}
        payload, shared, *_ = observed(model)
        if changed and change == "weights":
            model.head.weight.data += 1e-3
        if changed and change == "loss":
            loss_fn = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        if changed and change == "normalisation":
            known = {"mean": [0.5, 0.5, 0.5]}
        if change == "local steps":
            known = {"local_hyperparams": {**steps, "lr": 0.2 if changed else 0.1}}
        payload, shared, *_ = observed(build_model("own"), **known)
        payload[0]["parameters"] = list(model.parameters())
        return JointCandidateAttacker(model, loss_fn, cfg, SETUP).reconstruct(payload, shared)

    once()
    once()  # the same goes on
    with pytest.raises(ConfigError, match="another config, model, gradient"):
        once(changed=True)


def test_bad_interval(tmp_path):
    with pytest.raises(ConfigError, match="checkpoint_every=0"):
        attack(tmp_path / "c.pt", "0", "vmap", [])


def test_a_run_without_a_seed_says_which_one_its_checkpoint_has(tmp_path, monkeypatch):
    path, unseeded = tmp_path / "checkpoint.pt", [*CASES["adam"], "restarts.seed=null"]
    monkeypatch.setattr("breaching_ext.attacks.checkpoint.Checkpoint.remove", lambda self: None)
    monkeypatch.setattr(torch, "initial_seed", lambda: 5)
    first, _ = attack(path, 3, "vmap", unseeded)
    monkeypatch.setattr(torch, "initial_seed", lambda: 6)  # another process
    with pytest.raises(ConfigError, match=r"restarts\.seed=5, and this one has 6; valid to go on: restarts\.seed=5"):
        attack(path, 3, "vmap", unseeded)
    resumed, _ = attack(path, 3, "vmap", [*CASES["adam"], "restarts.seed=5"])
    assert torch.equal(resumed["candidates"], first["candidates"])


def test_a_path_alone_keeps_nothing_and_decides_nothing(tmp_path, caplog):
    path = tmp_path / "checkpoint.pt"
    path.write_text("of another run")
    attack(path, None, "auto", CASES["adam"])
    assert "checkpoint_path=" in caplog.text
    assert "has no effect without impl.checkpoint_every" in caplog.text
    assert path.read_text() == "of another run"


@pytest.mark.parametrize(
    ("saved", "planned", "taken", "warns"), [(1, None, 1, False), (1, 2, 1, False), (None, 1, 1, True)]
)
def test_a_resumed_run_goes_on_in_the_chunks_of_the_first(caplog, saved, planned, taken, warns):
    first, second = stacked(saved), stacked(planned)
    second.restore(first.state(), 0)
    assert second.evaluation.chunk == taken
    assert ("not bit for bit" in caplog.text) == warns


def stacked(chunk: int | None) -> VmapEngine:
    def factory(stacks):
        optimizer = torch.optim.SGD(stacks, lr=0.1)
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    rule, streams = GradientRule(3, 0.0, None, None), CandidateStreams([0, 1], torch.device("cpu"))
    objective = lambda x: (x.square().sum(), x.sum())  # noqa: E731
    return VmapEngine([torch.ones(2, 3)], objective, factory, rule, streams, chunk=chunk)


def test_one_step_to_try_leaves_the_checkpoint_of_the_long_run(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    monkeypatch.setattr(JointCandidateAttacker, "keep_checkpoint", True)
    attack(path, 3, "vmap", CASES["adam"])
    kept = path.read_bytes()
    monkeypatch.setattr(JointCandidateAttacker, "keep_checkpoint", False)
    _, stats = attack(path, 3, "vmap", CASES["adam"], dryrun=True)
    assert len(stats["Trial_0_Val"]) == 1
    assert path.read_bytes() == kept


@pytest.mark.parametrize("batching", ["list", "vmap"])
def test_a_run_whose_results_were_lost_is_not_run_again(tmp_path, monkeypatch, batching):
    """Killed between the loop and the files: the checkpoint has the end of the run."""
    path = tmp_path / "checkpoint.pt"
    choose = JointCandidateAttacker._conclude

    def killed(*args):
        raise Killed

    monkeypatch.setattr(JointCandidateAttacker, "_conclude", killed)
    with pytest.raises(Killed):
        attack(path, 4, batching, CASES["signed"])
    monkeypatch.setattr(JointCandidateAttacker, "_conclude", choose)
    monkeypatch.setattr(JointLoop, "_iterate", lambda *args: pytest.fail("run again"))
    resumed, stats = attack(path, 4, batching, CASES["signed"])
    assert not path.exists()
    monkeypatch.undo()
    whole, whole_stats = attack(path, None, batching, CASES["signed"])
    assert torch.equal(resumed["candidates"], whole["candidates"])
    assert stats["Trial_1_Val"] == whole_stats["Trial_1_Val"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, caplog, error):
    def full(*args):
        raise error

    monkeypatch.setattr("breaching_ext.attacks.checkpoint.torch.save", full)
    found, stats = attack(tmp_path / "checkpoint.pt", 3, "vmap", CASES["signed"])
    assert "could not be written" in caplog.text
    assert not stats["interrupted"]
    assert found["data"].isfinite().all()
    assert list(tmp_path.iterdir()) == []


def test_an_optimizers_tensors_go_where_its_parameters_are():
    meta = torch.device("meta")
    moved = on_device([torch.zeros(2), [torch.zeros(3, dtype=torch.float64)], 4, None], meta)
    assert moved[0].device == moved[1][0].device == meta
    assert moved[1][0].dtype == torch.float64
    assert moved[2:] == [4, None]


@pytest.mark.parametrize("optimizer", ["adam", "momgd", "l-bfgs"])
def test_an_optimizer_is_restored_where_its_parameters_are(optimizer):
    """A checkpoint is read onto the CPU. `meta` stands for a GPU: torch refuses to mix it with the CPU, too."""

    def made(parameter):
        return optimizer_lookup([parameter], optimizer, 0.1, scheduler="linear", max_iterations=9)

    trained = torch.ones(3, dtype=torch.float64, requires_grad=True)
    before, _ = made(trained)
    for _ in range(2):
        before.step(lambda: (setattr(trained, "grad", trained.detach().clone()), trained.sum())[1])
    after, scheduler = made(torch.empty(3, dtype=torch.float64, device="meta", requires_grad=True))
    restore_optimizer(after, scheduler, optimizer_state(before), 2)
    (slots,) = after.state.values()
    tensors = [t for name, value in slots.items() if name != "step" for t in tree_leaves(value) if torch.is_tensor(t)]
    assert tensors
    assert all(t.device.type == "meta" for t in tensors)


def test_results_that_could_not_be_evaluated_are_there_and_not_run_again(tmp_path, monkeypatch):
    """The command's own way: the checkpoint goes when everything is written."""
    register()
    overrides = ["attack.optim.max_iterations=3", "attack.restarts.num_trials=2", "attack.impl.checkpoint_every=2"]
    overrides += ["case.user.num_data_points=1", "case.model=lenet_zhu", "attack.impl.progress=false"]

    def once():
        with initialize_config_module("breaching.config", version_base="1.3"):
            cfg = compose("breaching_ext", overrides=overrides)
        return run_module.run(cfg, tmp_path)

    evaluate = run_module.evaluate
    monkeypatch.setattr(run_module, "evaluate", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        once()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["candidates.pt", "checkpoint.pt"]
    found = torch.load(tmp_path / "candidates.pt")["candidates"]
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    assert checkpoint["seconds"] > 0
    torch.save({**checkpoint, "seconds": 1000.0}, tmp_path / "checkpoint.pt")
    monkeypatch.setattr(run_module, "evaluate", evaluate)
    monkeypatch.setattr(JointLoop, "_iterate", lambda *args: pytest.fail("run again"))
    result = once()
    assert torch.equal(result.reconstruction["candidates"], found)
    assert 1000.0 < result.record["seconds"] < 2000.0  # of both processes
    assert {"candidates.pt", "metrics.json", "reconstruction.png"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "checkpoint.pt").exists()


def test_the_fingerprint_knows_everything_that_decides_a_run():
    cfg = attack_config("joint_candidates", [])
    shared, starts = [{"gradients": [torch.ones(2)]}], [torch.zeros(1, 2)]
    plain = fingerprint(cfg, shared, starts, "vmap", [torch.tensor([1, 2])])
    assert plain == fingerprint(cfg, shared, starts, "vmap", [torch.tensor([1, 2])])
    others = [
        fingerprint(cfg, shared, starts, "vmap", [torch.tensor([2, 1])]),  # other labels
        fingerprint(cfg, shared, starts, "vmap", [torch.tensor([1, 2]), torch.zeros(1)]),  # buffers
        fingerprint(cfg, shared, starts, "list", [torch.tensor([1, 2])]),
        fingerprint(cfg, shared, [torch.ones(1, 2)], "vmap", [torch.tensor([1, 2])]),
        fingerprint(cfg, shared, [start.double() for start in starts], "vmap", [torch.tensor([1, 2])]),
        fingerprint(cfg, [{"gradients": [torch.zeros(2)]}], starts, "vmap", [torch.tensor([1, 2])]),
    ]
    assert plain not in others
    at = [fingerprint(cfg, shared, starts, f"vmap <function loss at 0x{n}f>") for n in (1, 2)]
    assert at[0] == at[1]  # an address is another in the process that goes on
    fingerprint(cfg, shared, [start.bfloat16() for start in starts], "vmap")  # a dtype that numpy has not


@pytest.mark.parametrize("content", [{"candidates": torch.zeros(2)}, torch.zeros(2), "<html>", "junk", ""])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "candidates.pt"
    path.write_text(content) if isinstance(content, str) else torch.save(content, path)
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        attack(path, 4, "auto", [])


def test_states_travel_on_the_cpu():
    state = {"engine": {"moments": [torch.ones(2)], "step": 3}, "alive": (torch.ones(1),)}
    moved = on_device(state, torch.device("meta"))  # another device; deep inside, too
    assert {leaf.device.type for leaf in tree_leaves(moved) if isinstance(leaf, torch.Tensor)} == {"meta"}
    assert moved["engine"]["step"] == 3
