"""The attack as users call it: from weights to images, through Breaching's functions and through the command."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import json
import os
import struct
import subprocess
import sys
import warnings

import breaching
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import breaching_ext
from breaching_ext.attacks import KKTAttacker
from breaching_ext.data import BinaryFashionMNIST
from breaching_ext.errors import ConfigError, SharedDataError
from breaching_ext.kkt import (
    MLP,
    HomogeneousNetwork,
    Recipe,
    build_network,
    load_checkpoint,
    nearest,
    network_from_checkpoint,
    release,
    train,
    train_or_load,
)
from breaching_ext.kkt.candidates import candidate_labels, correlations, stretch, strongest
from breaching_ext.kkt.models import is_plain_mlp
from breaching_ext.kkt.problem import build_problem
from breaching_ext.kkt.recipe import initialise
from breaching_ext.kkt.span import span_of
from breaching_ext.kkt.training_set import check_training_set
from breaching_ext.run import run

SHAPE = (1, 6, 6)
SMALL = ["optim.max_iterations=400", "restarts.num_trials=4", "restarts.seed=0", "extraction.lr=0.05"]


def config(*overrides: str):
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = {key.split("=")[0]: key for key in [*SMALL, *overrides]}  # Hydra refuses a key that is given twice
        return breaching.get_attack_config("kkt", overrides=list(chosen.values()))


def squares() -> tuple[torch.Tensor, torch.Tensor]:
    """Four images with a bright square each, and labels ±1."""
    images = 0.1 * torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(3))
    for index, (y, x) in enumerate([(0, 0), (0, 3), (3, 0), (3, 3)]):
        images[index, 0, y : y + 3, x : x + 3] += 0.8
    return images, torch.tensor([1.0, -1.0, -1.0, 1.0])


@pytest.fixture(scope="module")
def victim() -> MLP:
    images, labels = squares()
    model = MLP(SHAPE, (60,))
    model.mean.copy_(images.mean(dim=0))
    train(model, images, labels, Recipe(1e-3, lr=0.02, target_loss=1e-8, check_every=200, seed=1), progress=False)
    return model


def test_images_come_back_and_beat_both_controls(victim):
    """Through Breaching's own prepare_attack."""
    breaching_ext.register()
    images, _ = squares()
    attacker = breaching.attacks.prepare_attack(victim, None, config())
    assert isinstance(attacker, KKTAttacker)
    found, stats = attacker.reconstruct(*release(victim, 4))
    scores = nearest(found["pool"], images, victim.mean)
    assert float(scores.ncc.mean()) > 0.8
    assert stats["kkt_loss"] < 0.02
    start = MLP(SHAPE, (60,))
    start.mean.copy_(victim.mean)
    initialise(start, Recipe(0.1, seed=1))
    control, control_stats = attacker.reconstruct(*release(start, 4))
    assert float(nearest(control["pool"], images, victim.mean).ncc.mean()) < float(scores.ncc.mean()) - 0.2
    assert control_stats["kkt_loss"] > 5 * stats["kkt_loss"]


def test_what_is_returned(victim):
    attacker = KKTAttacker(victim, None, config("optim.max_iterations=60", "extraction.candidates=7"))
    found, stats = attacker.reconstruct(*release(victim, 4))
    assert found["data"].shape == (4, *SHAPE)
    assert found["candidates"].shape == (4, 4, *SHAPE)
    assert found["candidate_scores"].shape == (4,)
    assert found["pool"].shape == (7, *SHAPE)
    assert found["pool_labels"].tolist() == [1, 1, 1, 1, -1, -1, -1]
    assert set(found["labels"].tolist()) <= {0, 1}
    best = int(found["candidate_scores"].argmin())
    assert torch.equal(found["data"], found["candidates"][best])
    assert stats["opt_value"] == stats["kkt_loss"] == pytest.approx(float(found["candidate_scores"].min()))
    assert stats["gradient_evaluations"] == 4 * 60
    assert len(stats["Trial_3_Val"]) == 3  # steps 0, 50 and the last
    assert 0 <= float(found["data"].min()) <= float(found["data"].max()) <= 1
    assert "kkt" in repr(attacker)
    again, _ = attacker.reconstruct(*release(victim, 4))
    assert torch.equal(found["data"], again["data"])
    dry, dry_stats = attacker.reconstruct(*release(victim, 4), dryrun=True)
    assert dry_stats["gradient_evaluations"] == 4
    assert dry["data"].isfinite().all()


def test_a_start_can_be_given_and_the_span_can_be_switched_off(victim):
    """From the true images the loss is small at once; the plain start needs its steps."""
    images, labels = squares()
    ordered = images[labels.argsort(descending=True)]
    overrides = ("extraction.multiple=1", "extraction.span=full", "optim.max_iterations=150", "extraction.lr=0.002")
    attacker = KKTAttacker(victim, None, config(*overrides))
    warm, warm_stats = attacker.reconstruct(*release(victim, 4), initial_data=ordered)
    assert warm_stats["engine"] == "kkt, all pixels"
    assert float(nearest(warm["pool"], images, victim.mean).ncc.mean()) > 0.85


def test_a_small_convolution_goes_through(victim):
    torch.manual_seed(0)
    model = breaching_ext.kkt.SmallConv(SHAPE, (3, 4))
    found, stats = KKTAttacker(model, None, config("optim.max_iterations=5")).reconstruct(*release(model, 2))
    assert found["data"].shape == (2, *SHAPE)
    assert min(stats["Trial_0_Val"]) < stats["Trial_0_Val"][0]


def test_a_stopped_extraction_goes_on_bit_for_bit(victim, tmp_path, monkeypatch):
    file = tmp_path / "kkt.pt"
    cfg = config("optim.max_iterations=40", f"+impl.checkpoint_path={file}", "impl.checkpoint_every=10")
    whole, _ = KKTAttacker(victim, None, config("optim.max_iterations=40")).reconstruct(*release(victim, 4))
    search = breaching_ext.kkt.Extraction
    step = search.step

    def interrupted(self):
        if self.step_count == 25:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(search, "step", interrupted)
    _, stopped = KKTAttacker(victim, None, cfg).reconstruct(*release(victim, 4))
    assert stopped["interrupted"]
    monkeypatch.setattr(search, "step", step)
    resumed, stats = KKTAttacker(victim, None, cfg).reconstruct(*release(victim, 4))
    assert torch.equal(whole["pool"], resumed["pool"])
    assert not stats["interrupted"]
    assert not file.exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["restarts.num_trials=0"], "restarts.num_trials=0"),
        (["restarts.seed=abc"], "restarts.seed=abc"),
        (["restarts.seed=1.5"], "restarts.seed=1.5"),
        (["impl.dtype=foo"], "impl.dtype=foo"),
        (["+extraction.magic=1"], "magic"),
        (["optim.optimizer=lion"], "optim.optimizer"),
        (["extraction.lr=0"], r"extraction\.lr=0 is not possible"),
        (["extraction.lr=fast"], r"extraction\.lr=fast is not possible; valid: a number above 0"),
        (["optim.max_iterations=0"], r"optim\.max_iterations=0 is not possible"),
    ],
    ids=["restarts", "seed", "half a seed", "dtype", "key", "optimizer", "rate", "word", "steps"],
)
def test_a_config_that_cannot_work(victim, overrides, words):
    with pytest.raises(ConfigError, match=words):
        KKTAttacker(victim, None, config(*overrides))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["extraction.candidates=0"], "candidates=0"),
        (["extraction.steepness=-1"], "steepness=-1"),
        (["extraction.span=x"], "span="),
        (["extraction.slack=null"], "slack=None"),
        (["extraction.init_scale=null"], "init_scale=None"),
        (["extraction.multiple=null"], "multiple=None"),
        (["extraction.multiple=0"], "multiple=0"),
        (["impl.checkpoint_every=often"], "checkpoint_every=often"),
    ],
    ids=["candidates", "steepness", "span", "slack", "init_scale", "no multiple", "multiple", "checkpoints"],
)
def test_a_search_that_cannot_work(victim, overrides, words):
    """Said when the attack is made, which is before a network is trained for it."""
    with pytest.raises(ConfigError, match=words):
        KKTAttacker(victim, None, config(*overrides))


def test_a_rate_that_is_too_large_is_said(victim, caplog):
    with pytest.raises(SharedDataError, match=r"lower attack.extraction.lr=1e\+30"):
        KKTAttacker(victim, None, config("extraction.lr=1e30")).reconstruct(*release(victim, 4))
    KKTAttacker(victim, None, config("extraction.lr=1e4", "optim.max_iterations=5")).reconstruct(*release(victim, 4))
    assert "No restart came further than its start" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "(the last is noise)"),
        (["extraction.span=2"], "2 directions are searched for 4 suspected images"),
        (["extraction.span=full"], "All pixels are searched: span=full"),
    ],
)
def test_what_is_said_of_the_span_is_so(victim, caplog, overrides, says):
    with caplog.at_level("INFO"):
        KKTAttacker(victim, None, config("optim.max_iterations=2", *overrides)).reconstruct(*release(victim, 4))
    assert says in caplog.text
    assert ("The data span only" in caplog.text) is (not overrides)  # nobody looked where it is set


def test_bad_releases(victim):
    attacker = KKTAttacker(victim, None, config())
    for number in (0, None, -3):
        with pytest.raises(SharedDataError, match="num_data_points"):
            attacker.reconstruct(*release(victim, number))
    with pytest.raises(SharedDataError, match=r"\(60, 36\)"):
        attacker.reconstruct(*release(MLP(SHAPE, (20,)), 4))
    payload, shared = release(victim, 4)
    payload[0]["parameters"][0][0, 0] = float("nan")
    with pytest.raises(SharedDataError, match="not finite"):
        attacker.reconstruct(payload, shared)
    with pytest.raises(ConfigError, match="one output"):
        KKTAttacker(torch.nn.Linear(3, 10), None, config())


# ---------------------------------------------------------------------- published checkpoints


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_checkpoints(tmp_path, nest, prefix):
    """The paper's keys, D-h-h-1, in the forms in which such files come."""
    source = MLP(SHAPE, (8, 8))
    state = {prefix + k: v for k, v in source.state_dict().items() if k != "mean"}
    torch.save(state if nest is None else {"epoch": 3, nest: state}, tmp_path / "weights.pth")
    target = MLP(SHAPE, (8, 8))
    load_checkpoint(target, tmp_path / "weights.pth")
    built = network_from_checkpoint(tmp_path / "weights.pth", SHAPE)
    x = torch.rand(3, *SHAPE)
    assert torch.equal(source(x), target(x))
    assert torch.equal(source(x), built(x))


def test_checkpoints_that_do_not_fit(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(MLP(SHAPE, (8, 8)).state_dict(), file)
    with pytest.raises(ConfigError, match=r"layers.0.weight \(8, 36\).*needs layers.0.weight \(9, 36\)"):
        load_checkpoint(MLP(SHAPE, (9,)), file)
    with pytest.raises(ConfigError, match=r"layers.0.weight \(8, 36\)"):
        network_from_checkpoint(file, (1, 5, 5))
    state = MLP(SHAPE, (9,)).state_dict()
    torch.save({**state, "mean": torch.zeros(3)}, file)
    target = MLP(SHAPE, (9,))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(ConfigError, match=r"mean \(3,\); the network needs \(1, 6, 6\)"):
        load_checkpoint(target, file)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    torch.save({"epoch": 3}, file)
    with pytest.raises(ConfigError, match="no state dict"):
        load_checkpoint(MLP(SHAPE, (9,)), file)
    torch.save({"conv.weight": torch.zeros(3, 1, 5, 5)}, file)
    with pytest.raises(ConfigError, match=r"conv.weight \(3, 1, 5, 5\)"):
        network_from_checkpoint(file, SHAPE)
    with pytest.raises(ConfigError, match="does not exist"):
        load_checkpoint(MLP(SHAPE, (9,)), tmp_path / "nothing.pth")


# ---------------------------------------------------------------------- evaluation and candidates


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 5), st.floats(-2, 2), st.integers(0, 100))
def test_correlation_and_stretch_do_not_see_contrast(gain, offset, seed):
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    changed = gain * images + offset
    torch.testing.assert_close(correlations(images, changed).diagonal(), torch.ones(3, dtype=torch.double))
    torch.testing.assert_close(stretch(changed), stretch(images), rtol=1e-6, atol=1e-6)


def test_nearest_candidate():
    images = torch.rand(4, 1, 8, 8)
    mean = images.mean(dim=0)
    pool = torch.cat([torch.rand(2, 1, 8, 8), images[[2, 0, 3, 1]]])
    found = nearest(pool, images, mean)
    assert found.index.tolist() == [3, 5, 2, 4]
    torch.testing.assert_close(found.ncc, torch.ones(4, dtype=torch.double))
    metrics = found.as_dict()
    assert metrics["ncc_share"] == metrics["ssim_share"] == 1
    assert nearest(torch.rand(6, 1, 8, 8), images, mean).as_dict()["ncc_share"] == 0


def test_the_strongest_candidates_show_different_images():
    images = torch.rand(3, 1, 8, 8)
    centred = torch.cat([images, images[:1] * 1.01]) - images.mean(dim=0)
    order = strongest(centred, torch.tensor([0.9, 0.2, 0.1, 0.8]), 3)
    assert order.tolist() == [0, 1, 2]  # 3 shows what 0 shows
    assert strongest(centred[:2], torch.tensor([0.1, 0.2]), 5).tolist() == [1, 0, 1, 0, 1]
    assert candidate_labels(3).tolist() == [1, 1, -1]


# ---------------------------------------------------------------------- data, case and command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a dataset in Fashion-MNIST's files: 60 and 30 images of ten classes, a bright column each."""
    home = tmp_path_factory.mktemp("fashion")
    draw = np.random.default_rng(0)
    for stem, count in (("train", 60), ("t10k", 30)):
        classes = np.arange(count) % 10
        images = draw.integers(0, 60, (count, 28, 28))
        images[np.arange(count), :, 2 * classes] += 150
        images_header, labels_header = struct.pack(">4I", 0x803, count, 28, 28), struct.pack(">2I", 0x801, count)
        (home / f"{stem}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(images_header + images.astype(np.uint8).tobytes())
        )
        (home / f"{stem}-labels-idx1-ubyte").write_bytes(labels_header + classes.astype(np.uint8).tobytes())
    return home


def test_blocks_are_balanced(folder):
    data = BinaryFashionMNIST(labels="parity", folder=folder)
    permuted = BinaryFashionMNIST(labels="permuted", folder=folder)
    assert len(data) == len(permuted) == 60
    for block in range(6):
        points = [data[10 * block + i] for i in range(10)]
        assert [int(image[0].mean(dim=0).argmax()) // 2 for image, _ in points] == list(range(10))
        assert [label for _, label in points] == [1, 0] * 5
        assert sum(permuted[10 * block + i][1] for i in range(10)) == 5
    assert permuted.targets != data.targets
    assert permuted.targets == BinaryFashionMNIST(labels="permuted", folder=folder).targets
    assert len(data.other_split()) == 30
    assert data.mean_image().shape == (1, 28, 28)
    with pytest.raises(ConfigError, match=r"case\.data\.labels"):
        BinaryFashionMNIST(labels="magic", folder=folder)
    with pytest.raises(ConfigError, match="not found"):
        BinaryFashionMNIST(folder=folder / "nothing")


def test_a_part_of_the_images_is_the_first_of_them(folder, monkeypatch):
    whole = BinaryFashionMNIST(folder=folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    part = BinaryFashionMNIST(folder=f"~/{folder.name}", size=20)
    assert len(part) == len(part.targets) == len(part.lookup) == 20
    assert all(torch.equal(part[i][0], whole[i][0]) and part[i][1] == whole[i][1] for i in range(20))
    assert torch.equal(part.mean_image(), whole.mean_image())
    assert len(part.other_split()) == len(whole.other_split())


def command(root, cwd, *overrides: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "TORCH_HOME": str(cwd)}
    arguments = [sys.executable, "-m", "breaching_ext", "attack=kkt", "case=kkt_fashion_mnist", *overrides]
    return subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True)


def test_the_command_trains_attacks_and_evaluates(root, tmp_path, folder):
    done = command(
        *(root, tmp_path, f"case.data.path={folder}", "case.data.default_clients=2", "case.model=kkt-mlp-40"),
        *("case.user.num_data_points=4", "case.training.target_loss=1e-4", "case.training.check_every=100"),
        *("case.training.lr=0.05", "case.training.max_steps=200", "attack.optim.max_iterations=10"),
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr + done.stdout
    (home,) = tmp_path.glob("outputs/*/*/*")
    record = json.loads((home / "metrics.json").read_text())
    assert set(record["kkt"]) == {"training", "unseen"}
    assert len(record["kkt"]["unseen"]["ncc"]) == 4
    assert record["training"]["loss"] < 1e-3
    assert record["kkt_loss"] > 0
    assert record["kkt_loss_absolute"] > record["kkt_loss"]
    tensors = torch.load(home / "candidates.pt")
    assert tensors["pool"].shape == (8, 1, 28, 28)
    assert tensors["candidates"].shape == (8, 4, 1, 28, 28)
    for name in ("reconstruction.png", "candidates.png", "config.yaml"):
        assert (home / name).exists()
    assert not (home / "training.pt").exists()


def release_of(cfg):
    user, server, *_ = breaching.cases.construct_case(cfg.case, {"device": torch.device("cpu"), "dtype": torch.float})
    return server.run_protocol(user)


def composed(folder, *overrides):
    breaching_ext.register()
    small = [f"case.data.path={folder}", "case.data.default_clients=2", "case.user.num_data_points=4", "device=cpu"]
    small += ["case.model=kkt-mlp-40", "case.training.max_steps=40", "attack.optim.max_iterations=4"]
    with initialize_config_module("breaching.config", version_base="1.3"):
        return compose("breaching_ext", ["case=kkt_fashion_mnist", "attack=kkt", *small, *overrides])


def test_a_dry_run_trains_for_one_step_and_keeps_no_network(folder, tmp_path):
    cfg = composed(folder, "dryrun=true", f"case.training.cache_path={tmp_path / 'network.pt'}")
    assert run(cfg).record["training"]["steps"] == 1
    assert not list(tmp_path.iterdir())


def test_with_checkpoints_a_killed_extraction_does_not_train_again(folder, tmp_path, monkeypatch):
    def composition():
        return composed(folder, "attack.impl.checkpoint_every=2", "case.user.provide_labels=true")

    whole = run(composition()).record
    assert whole["labels_known"]  # and used

    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(KKTAttacker, "_search", killed)
        with pytest.raises(Killed):
            run(composition(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"network.pt"}
    with monkeypatch.context() as patched:
        patched.setattr("breaching_ext.kkt.training._loop", lambda *args: pytest.fail("trained again"))
        assert run(composition(), tmp_path).record["kkt_loss"] == whole["kkt_loss"]
    assert not list(tmp_path.glob("*.pt")) or {p.name for p in tmp_path.glob("*.pt")} == {"candidates.pt"}
    other = composition()
    other.case.training.max_steps = 20  # the folder serves another run
    assert run(other, tmp_path).record["training"]["steps"] == 20


def test_what_the_client_and_its_control_hold(folder):
    """The control are images of the other split; an untrained network is the start, and nothing else."""
    client = release_of(composed(folder, "case.training.max_steps=1"))[2]["data"]
    cfg = composed(folder, "case.training.untrained=true", "case.training.first_layer_std=0.05", "case.training.seed=3")
    user, server, *_ = breaching.cases.construct_case(cfg.case, {"device": torch.device("cpu"), "dtype": torch.float})
    unseen, other = user.unseen(), user.dataloader.dataset.dataset.other_split()
    assert all(any(torch.equal(image, other[i][0]) for i in range(len(other))) for image in unseen)
    assert not any(torch.equal(image, own) for image in unseen for own in client)
    (shared, *_), *_ = server.run_protocol(user)
    start = build_network("kkt-mlp-40", (1, 28, 28))
    initialise(start, Recipe(first_layer_std=0.05, seed=3))
    for mine, released in zip(start.parameters(), shared["parameters"], strict=True):
        torch.testing.assert_close(released, mine.detach())


def test_what_a_client_releases(folder):
    """Its dataset's mean image with the weights, its labels if it says so; every client has a control of its own."""
    cfg = composed(folder, "case.training.untrained=true", "case.user.provide_labels=true")
    setup = {"device": torch.device("cpu"), "dtype": torch.float}
    user, server, *_ = breaching.cases.construct_case(cfg.case, setup)
    (shared, *_), _, truth = server.run_protocol(user)
    torch.testing.assert_close(shared["buffers"][0], BinaryFashionMNIST(folder=folder).mean_image())
    assert shared["metadata"]["labels"].tolist() == sorted(truth["labels"].tolist())
    cfg.case.user.update(user_idx=1, provide_labels=False)
    second, server, *_ = breaching.cases.construct_case(cfg.case, setup)
    assert not any(torch.equal(image, other) for image in second.unseen() for other in user.unseen())
    assert server.run_protocol(second)[0][0]["metadata"]["labels"] is None


def test_restarts_start_from_seeds_that_follow_each_other(victim):
    def candidates(seed):
        options = (f"restarts.seed={seed}", "restarts.num_trials=3")
        return KKTAttacker(victim, None, config(*options)).reconstruct(*release(victim, 4), dryrun=True)[0][
            "candidates"
        ]

    first, second = candidates(5), candidates(6)
    assert not torch.allclose(first[0], first[1])
    torch.testing.assert_close(first[1:], second[:2])


def test_a_dry_run_leaves_a_training_that_was_killed_alone(folder, tmp_path):
    torch.save({"key": "of a long training", "step": 1, "tensors": []}, tmp_path / "training.pt")
    assert run(composed(folder, "dryrun=true"), tmp_path).record["training"]["steps"] == 1
    assert (tmp_path / "training.pt").exists()


def test_a_client_that_does_not_say_how_many_images_is_refused_before_the_training(folder, monkeypatch):
    monkeypatch.setattr("breaching_ext.kkt.training._loop", lambda *args: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="provide_num_data_points=false"):
        run(composed(folder, "case.user.provide_num_data_points=false"))


def test_a_network_of_other_images_is_doubted(folder, tmp_path, caplog):
    torch.manual_seed(0)
    model = build_network("kkt-mlp-40", (1, 28, 28))
    data = release_of(composed(folder, "case.training.max_steps=1"))[2]
    with torch.no_grad():  # more than half of its answers are wrong
        right = (model(data["data"].float())[:, 0] * (2 * data["labels"] - 1) > 0).float().mean()
        model.layers[-1].weight.mul_(-1 if right > 0.5 else 1)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    record = run(composed(folder, f"case.training.weights={tmp_path / 'weights.pt'}")).record
    assert record["training"]["misclassified"] > 0
    assert "probably not its training images" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["case.user.num_data_points=0"], "num_data_points=0"),
        (["case.training.weights=/nothing.pth"], "does not exist"),
        (["+case.training.magic=1"], "magic"),
        (["case.training.lr=fast"], "training.lr=fast is not possible; valid: a number above 0"),
        (["case.training.max_steps=2.5"], "training.max_steps=2.5 is not possible"),
        (["case.model=ResNet18"], "kkt-mlp"),
    ],
    ids=["n0", "weights", "key", "word", "part", "model"],
)
def test_errors_are_one_line(folder, overrides, words):
    breaching_ext.register()
    small = [f"case.data.path={folder}", "case.data.default_clients=2", "attack.optim.max_iterations=2"]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = breaching.get_config(overrides=["case=kkt_fashion_mnist", "attack=kkt", *small, *overrides])
    with pytest.raises(ConfigError, match=words):
        release_of(cfg)


def test_the_sweep_names_settings_that_exist(root):
    """And trains one network for all its runs."""
    sweep = OmegaConf.load(root / "config" / "sweep" / "kkt.yaml")
    cfg = config()
    for name, values in sweep.hydra.sweeper.params.items():
        key = name.removeprefix("attack.")
        assert OmegaConf.select(cfg, key) is not None
        for value in str(values).split(","):
            KKTAttacker(MLP(SHAPE, (3,)), None, config(f"{key}={value}"))
    assert "cache_path" in OmegaConf.load(root / "config" / "case" / "kkt_fashion_mnist.yaml").training


def test_one_network_for_several_attacks(tmp_path):
    images, labels = squares()
    recipe = Recipe(1e-3, lr=0.05, target_loss=1e-2, target_residual=1.0, check_every=50, seed=1)
    first, second = MLP(SHAPE, (10,)), MLP(SHAPE, (10,))
    report = train_or_load(first, images, labels, recipe, tmp_path / "network.pt")
    assert train_or_load(second, images, labels, recipe, tmp_path / "network.pt") == report
    assert torch.equal(first(images), second(images))
    with pytest.raises(ConfigError, match="other shape, recipe"):
        train_or_load(second, images, -labels, recipe, tmp_path / "network.pt")


def test_the_study_runs_and_resumes(root, tmp_path, folder, monkeypatch):
    monkeypatch.syspath_prepend(root / "examples")  # as for a script
    spec = importlib.util.spec_from_file_location("kkt_study", root / "examples" / "kkt_study.py")
    study = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kkt_study", study)
    spec.loader.exec_module(study)
    monkeypatch.setattr(study, "BinaryFashionMNIST", lambda **given: BinaryFashionMNIST(folder=folder, **given))
    monkeypatch.setattr(study, "OWNED", 10)
    recipe = Recipe(1e-3, lr=0.05, target_loss=1e-3, check_every=100, max_steps=300)
    quick = ("optim.max_iterations=10", "restarts.num_trials=2")
    arms = {"default": study.Arm("quick", 4, "kkt-mlp-30", recipe=recipe, attack=quick, seeds=2)}
    arms["untrained"] = study.replace(arms["default"], untrained=True, attack=(*quick, "extraction.span=3"))
    short = Recipe(1e-3, lr=0.05, check_every=5, max_steps=5)
    arms["conv"] = study.Arm(
        "quick", 4, "kkt-conv-4-4", recipe=short, attack=(*quick, "extraction.candidates=4"), seeds=1
    )
    monkeypatch.setattr(study, "ARMS", arms)
    monkeypatch.setattr(
        sys, "argv", ["kkt_study.py", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    )
    real = study.KKTAttacker.reconstruct

    def interrupted(self, *given):
        found, stats = real(self, *given)
        return found, {**stats, "interrupted": True}

    with monkeypatch.context() as patched:  # Ctrl-C ends the study, and what the attack had is no run
        patched.setattr(study.KKTAttacker, "reconstruct", interrupted)
        with pytest.raises(KeyboardInterrupt):
            study.main()
    assert not list((tmp_path / "out").rglob("*.json"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        study.main()
    assert "default: quick" in printed.getvalue()
    files = sorted((tmp_path / "out" / "runs").iterdir())
    assert len(files) == 5
    assert json.loads(files[0].read_text())["singular_vectors"] is None  # of conv: no weights over all pixels
    assert json.loads(files[0].read_text())["training_images"]["ncc"]
    for name in ("table.md", "shares.png", "margins.png", "default_seed0.png"):
        assert (tmp_path / "out" / name).exists()
    monkeypatch.setattr(study, "make", lambda *_: pytest.fail("a run that is there was made again"))
    with contextlib.redirect_stdout(io.StringIO()):
        study.main()


class TwoOutputs(HomogeneousNetwork):
    """Not what the attack is for."""

    def __init__(self) -> None:
        super().__init__(SHAPE)
        self.layer = torch.nn.Linear(36, 2, bias=False)

    def forward(self, inputs, **_):
        return self.layer((inputs - self.mean).flatten(1))


class OwnForward(MLP):
    """An MLP by its class alone."""

    def forward(self, inputs, **_):
        return 3.0 * super().forward(inputs)


def test_own_networks_are_asked_what_they_compute(caplog):
    with pytest.raises(ConfigError, match=r"has shape \(1, 2\); attack=kkt needs \(1, 1\)"):
        KKTAttacker(TwoOutputs(), None, config()).reconstruct(*release(TwoOutputs(), 2))
    torch.manual_seed(0)
    own, plain = OwnForward(SHAPE, (5,)), MLP(SHAPE, (5,))
    problem, usual = build_problem(own, 20.0), build_problem(plain, 20.0, "full")
    assert (is_plain_mlp(own), is_plain_mlp(plain)) == (False, True)
    x, c = torch.rand(1, 2, *SHAPE), torch.rand(1, 2)
    total = (c[0] * own(x[0] + own.mean)[:, 0]).sum()
    gradients = torch.autograd.grad(total, list(own.parameters()))
    smooth = sum((p - g).square().sum() for p, g in zip(own.parameters(), gradients, strict=True))
    sharp = build_problem(own, float("inf")).residual(x, c, ())
    assert sharp.item() == pytest.approx(smooth.item(), rel=1e-5)
    assert not problem.slack_widths
    assert usual.slack_widths == [5]


def test_the_space_of_all_images_needs_no_matrix(victim):
    span = span_of(victim.layers[0].weight.detach(), "full")
    x = torch.rand(3, 36)
    assert span.full
    assert span.rank == 36
    assert span.basis.numel() == 0
    assert torch.equal(span.pixels(span.inside(x)), x)
    assert span.outside(x) == 0.0


@pytest.mark.parametrize("widths", [(4, 3), (3,) * 11])  # of twelve layers, names are no longer in order as text
def test_files_with_hidden_biases_and_the_papers_prefix(tmp_path, widths):
    """Biases on all hidden layers and none on the output."""
    torch.manual_seed(0)
    model = MLP(SHAPE, widths, "hidden")
    state = {key.replace("layers.", "convnet."): value for key, value in model.state_dict().items() if key != "mean"}
    torch.save(state, tmp_path / "weights.pth")
    loaded = network_from_checkpoint(tmp_path / "weights.pth", SHAPE)
    x = torch.rand(2, *SHAPE)
    assert torch.equal(loaded(x), model(x))


def test_images_that_are_no_pixels_are_said(caplog):
    images, labels = squares()
    with caplog.at_level("WARNING"):
        check_training_set(MLP(SHAPE, (4,)), images, labels)
        assert not caplog.records
        check_training_set(MLP(SHAPE, (4,)), 2 * images - 1, labels)
    assert "The images lie in -1" in caplog.text


@pytest.mark.parametrize("name", ["input_noise", "gradient_noise", "per_example_clipping"])
def test_defences_that_are_not_applied_are_refused(folder, name):
    cfg = composed(folder, f"case.user.local_diff_privacy.{name}=0.5")
    with pytest.raises(ConfigError, match=f"local_diff_privacy.{name}=0.5: a client that releases"):
        release_of(cfg)
