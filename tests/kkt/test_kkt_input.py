"""What the attack is given: labels of its candidates, starts, releases and files; and what is refused in one line."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import re
import sys
import warnings
from dataclasses import asdict

import breaching
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import breaching_ext
from breaching_ext.attacks import KKTAttacker
from breaching_ext.attacks.kkt_input import labels_of_candidates, start_of
from breaching_ext.errors import ConfigError, SharedDataError
from breaching_ext.kkt import (
    MLP,
    Recipe,
    SmallConv,
    load_checkpoint,
    nearest,
    network_from_checkpoint,
    release,
    train_or_load,
    training,
)
from breaching_ext.kkt.candidates import candidate_labels, signs
from breaching_ext.kkt.extraction import Extracted, Extraction
from breaching_ext.kkt.problem import build_problem
from breaching_ext.kkt.release import TrainedModelUser

SHAPE = (1, 6, 6)
SMALL = ["optim.max_iterations=3", "restarts.num_trials=2", "restarts.seed=0"]


def config(*overrides: str):
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.deepcopy(composed(*overrides))


@functools.lru_cache
def composed(*overrides: str):
    return breaching.get_attack_config("kkt", overrides=[*SMALL, *overrides])


@pytest.fixture
def model() -> MLP:
    torch.manual_seed(0)
    return MLP(SHAPE, (9,))


def attacked(model, *overrides, number=4, labels=None, **given):
    return KKTAttacker(model, None, config(*overrides)).reconstruct(*release(model, number, labels), **given)


# ---------------------------------------------------------------------- labels of the candidates


@pytest.mark.parametrize(
    ("overrides", "labels", "expected"),
    [
        ((), None, [1, 1, 1, 1, -1, -1, -1, -1]),
        ((), [0, 1, 0, 0], [-1, 1, -1, -1, -1, 1, -1, -1]),
        ((), torch.tensor([1.0, 1.0, -1.0, 1.0]), [1, 1, -1, 1, 1, 1, -1, 1]),
        (("extraction.multiple=1",), [0, 1, 0, 0], [-1, 1, -1, -1]),
        (("extraction.multiple=1.5",), [0, 1, 0, 1], [1, 1, 1, -1, -1, -1]),
        (("extraction.candidates=7",), [0, 1, 0, 0], [1, 1, -1, -1, -1, -1, -1]),
        (("extraction.candidates=3",), [1, 0, 1, 1], [1, 1, -1]),  # three quarters of three, and both occur
        (("extraction.candidates=2",), [0, 0, 0, 1], [1, -1]),
        ((), [0, 0, 0, 0], [-1] * 8),
        (("extraction.candidate_labels=balanced",), [0, 1, 0, 0], [1, 1, 1, 1, -1, -1, -1, -1]),
        (("extraction.candidate_labels=[-1,1,1]",), [0, 1, 0, 0], [-1, 1, 1]),
        (("extraction.candidate_labels=[0,1,1,0]", "extraction.candidates=4"), None, [-1, 1, 1, -1]),
    ],
)
def test_labels_of_candidates(model, overrides, labels, expected):
    found, _ = attacked(model, *overrides, labels=labels)
    assert found["pool_labels"].tolist() == expected


def test_every_image_has_the_label_of_its_candidate(model):
    """Of all restarts, in Breaching's classes 0 and 1."""
    cfg = config("extraction.candidate_labels=[-1,1,1]")
    cfg.restarts.seed = 2  # the second restart is the better one, with other labels than the first
    found, _ = KKTAttacker(model, None, cfg).reconstruct(*release(model, 4))
    assert int(found["candidate_scores"].argmin()) == 1
    assert not torch.equal(*found["candidate_labels"])
    assert found["candidate_labels"].shape == (2, 4)
    assert torch.equal(found["labels"], found["candidate_labels"][1])
    stretched = breaching_ext.kkt.candidates.stretch(found["pool"])
    for image, label in zip(found["data"], found["labels"], strict=True):
        (index,) = (stretched == image).flatten(1).all(dim=1).nonzero()[0].tolist()
        assert int(label) == max(0, [-1, 1, 1][index])


def keeping(model, path, *overrides):
    """Return an attacker that writes checkpoints, at least at the end, and leaves the last one there."""
    attacker = KKTAttacker(
        model, None, config(f"+impl.checkpoint_path={path}", "impl.checkpoint_every=100", *overrides)
    )
    attacker.keep_checkpoint = True
    return attacker


def test_other_labels_or_another_mean_image_are_another_run(model, tmp_path):
    """They decide it, so a checkpoint of others is refused."""
    attacker = keeping(model, tmp_path / "kkt.pt")
    attacker.reconstruct(*release(model, 4, [1, 1, 0, 1]))
    with pytest.raises(ConfigError, match="another config"):
        attacker.reconstruct(*release(model, 4, [1, 0, 0, 1]))
    payload, shared = release(model, 4, [1, 1, 0, 1])
    payload[0]["buffers"][0] += 0.1
    with pytest.raises(ConfigError, match="another config"):
        attacker.reconstruct(payload, shared)


def test_what_leaves_no_checkpoint(model, tmp_path):
    """A dry run, and a search that went nowhere, which would go on to nowhere."""
    dry = keeping(model, tmp_path / "kkt.pt")
    dry.cfg.impl.checkpoint_every = 1
    dry.reconstruct(*release(model, 4), dryrun=True)
    with pytest.raises(SharedDataError, match="No restart stayed finite"):
        keeping(model, tmp_path / "kkt.pt", "extraction.lr=1e30").reconstruct(*release(model, 4))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 2, 1], [0, -1, 1, 1], torch.eye(4)[:, :1]])
def test_labels_that_are_none(model, labels):
    with pytest.raises(SharedDataError, match=r"metadata\['labels'\]=.*valid: 4 times 0 or 1"):
        attacked(model, labels=labels)


def test_what_counts_as_two_labels():
    assert signs([True, False]).tolist() == [1, -1]
    assert signs(torch.tensor([-1, -1])).tolist() == [-1, -1]
    assert signs(["a"]) is signs([0, -1]) is signs(3) is signs([0.5]) is None
    assert candidate_labels(1, torch.tensor([1.0, -1.0])).tolist() == [1]
    rare = -torch.ones(10)
    rare[3] = 1
    assert candidate_labels(3, rare).tolist() == [1, -1, -1]  # a label that occurs is not left out
    assert candidate_labels(3, -rare).tolist() == [1, 1, -1]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["extraction.candidate_labels=even"], r"candidate_labels=even is not possible; valid: auto, balanced, or a"),
        (["extraction.candidate_labels=[1,2]"], r"candidate_labels=\[1, 2\] is not"),
        (["extraction.candidate_labels=[]"], r"candidate_labels=\[\] is not"),
        (["extraction.candidate_labels=null"], r"candidate_labels=None is not"),
        (["extraction.candidate_labels=[1,-1]", "extraction.candidates=3"], "candidates=3 does not fit the 2"),
        (["extraction.span=10"], r"extraction\.span=10 is not possible; valid: auto, full, or 1 to 9"),
        (["restarts.scoring=euclidean"], "restarts.scoring=euclidean is not possible for kkt; valid: kkt-loss"),
        (["impl.dtype=float16"], r"impl\.dtype=float16 is not possible for kkt.*valid: float, double"),
        (["impl.dtype=bfloat16"], r"impl\.dtype=bfloat16 is not possible for kkt"),
        (["+restarts.trials=3"], r"restarts key='trials'.*num_trials"),
        (["+impl.memory_budget=1GB"], r"impl key='memory_budget'.*checkpoint_every"),
        (["+extractions.span=3"], r"key='extractions'.*extraction"),
    ],
)
def test_what_can_be_known_is_said_before_a_network_is_trained(model, overrides, words):
    with pytest.raises(ConfigError, match=words):
        KKTAttacker(model, None, config(*overrides))


def test_an_older_config_has_balanced_labels():
    extraction = OmegaConf.create({"candidates": None, "multiple": 1})
    metadata = {"num_data_points": 3, "labels": None}
    assert labels_of_candidates(extraction, metadata).tolist() == [1, 1, -1]


def test_what_the_statistics_say(model):
    """An empty seed is torch's."""
    cfg = config()
    cfg.restarts.seed = None
    torch.manual_seed(7)
    _, stats = KKTAttacker(model, None, cfg).reconstruct(*release(model, 4))
    cfg.restarts.seed = 7
    _, same = KKTAttacker(model, None, cfg).reconstruct(*release(model, 4))
    assert stats["seed"] == same["seed"] == 7
    assert stats["kkt_loss"] == same["kkt_loss"]
    norm = sum(float(p.detach().square().sum()) for p in model.parameters())
    assert stats["kkt_loss_absolute"] == pytest.approx(stats["kkt_loss"] * norm)


def test_what_is_concluded(model, caplog):
    """Of the restart with the least loss: its images by multiplier, what looks alike without the mean image last."""
    model.mean.copy_(10 * torch.rand(SHAPE))  # with it, all images look alike
    problem = build_problem(model, 20.0, "full")
    images = torch.rand(3, *SHAPE)
    images[1] = 1.01 * images[0]
    multipliers = torch.tensor([[0.1, 0.2, 0.3], [0.9, 0.8, 0.1]])
    losses, finite = torch.tensor([0.5, 0.25]), torch.tensor([False, True])
    found = Extracted(torch.stack([images.flip(0), images]), multipliers, losses, losses, [[1.0], [0.5]])
    found.finite, found.best_steps = finite, torch.tensor([1, 1])
    attacker, labels = KKTAttacker(model, None, config()), torch.tensor([1.0, 1.0, -1.0])
    result = attacker._conclude(found, problem, labels, 2)
    assert "1 of 2 restarts did not stay finite" in caplog.text
    assert torch.equal(result["multipliers"], multipliers[1])
    torch.testing.assert_close(result["pool"], images + model.mean)
    torch.testing.assert_close(result["data"], breaching_ext.kkt.candidates.stretch(images + model.mean)[[0, 2]])
    assert result["labels"].tolist() == [1, 0]
    span = build_problem(model, 20.0, 2)
    starts = torch.zeros(2, 3, 2)
    search = Extraction(span, labels, starts, attacker.options, [torch.Generator()] * 2)
    stats = attacker._statistics(found, search, 5)
    assert stats["failed_restarts"] == [0]
    assert stats["singular_values"] == span.span.singular_values[:5].tolist()
    assert (stats["rank"], stats["opt_value"], stats["seed"]) == (2, 0.25, 5)


# ---------------------------------------------------------------------- a start


@pytest.mark.parametrize("span", ["full", 3])
def test_where_a_search_starts(model, span):
    """Fewer images than candidates are taken again: n of 2n once with each label."""
    problem = build_problem(model, 20.0, span)
    starts = torch.zeros(2, 4, *problem.coordinate_shape)
    images = torch.rand(2, *SHAPE)
    found = start_of(images, problem, starts)
    torch.testing.assert_close(found, problem.coordinates_of(images[[0, 1, 0, 1]]).expand_as(starts))
    assert found.shape == starts.shape
    own = torch.rand(2, 3, *SHAPE)
    torch.testing.assert_close(start_of(own, problem, starts), problem.coordinates_of(own[:, [0, 1, 2, 0]]))


def test_a_start_is_where_the_search_begins(model):
    """At the second point of two the rate is half of the first's, and both are small."""
    images = torch.rand(4, *SHAPE)
    found, _ = attacked(model, "extraction.span=full", "extraction.lr=1e-6", initial_data=images)
    torch.testing.assert_close(found["pool"], images.repeat(2, 1, 1, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "shape", [(9, *SHAPE), (0, *SHAPE), (3, 4, *SHAPE), (2, 9, *SHAPE), (4, 1, 6, 5), SHAPE, (1, 2, 4, *SHAPE)]
)
def test_starts_that_do_not_fit(model, shape):
    with pytest.raises(SharedDataError, match=r"initial_data has shape .*valid: \(m, 1, 6, 6\) or .* m from 1 to 8"):
        attacked(model, initial_data=torch.rand(shape))


def test_a_start_that_is_not_finite(model):
    with pytest.raises(SharedDataError, match="initial_data is not finite"):
        attacked(model, initial_data=torch.full((4, *SHAPE), float("nan")))


# ---------------------------------------------------------------------- the released network


def test_half_precision_weights_are_searched_in_single_precision(model):
    """As they are: their values have no more digits."""
    found, stats = attacked(model.half())
    assert found["data"].dtype == torch.float
    again, same = KKTAttacker(model.float(), None, config()).reconstruct(*release(model, 4))
    assert stats["kkt_loss"] == same["kkt_loss"]
    assert torch.equal(found["data"], again["data"])


@pytest.mark.parametrize("buffer", [torch.zeros(3), torch.zeros(1), torch.zeros(6, 6)])
def test_buffers_that_do_not_fit(model, buffer):
    """A smaller one would be spread over the mean image."""
    payload, shared = release(model, 4)
    payload[0]["buffers"] = [buffer]
    with pytest.raises(SharedDataError, match=r"released buffers have shapes .*needs \[\(1, 6, 6\)\]"):
        KKTAttacker(model, None, config()).reconstruct(payload, shared)


def test_a_released_mean_image_takes_the_place_of_the_networks(model):
    attacker = KKTAttacker(model, None, config())
    payload, shared = release(model, 4)
    payload[0]["buffers"] = [torch.full(SHAPE, 0.5)]
    assert float(attacker.reconstruct(payload, shared)[0]["mean_image"].mean()) == 0.5
    shared[0]["buffers"] = [torch.full(SHAPE, 0.25)]
    assert float(attacker.reconstruct(payload, shared)[0]["mean_image"].mean()) == 0.25
    for none in ([], None):
        payload[0]["buffers"] = shared[0]["buffers"] = none
        assert float(attacker.reconstruct(payload, shared)[0]["mean_image"].mean()) == 0


def test_what_a_user_trained_takes_the_place_of_the_servers_network(model):
    trained = MLP(SHAPE, (9,))
    payload, shared = release(model, 4)
    wanted, _ = release(trained, 4)
    shared[0]["parameters"] = wanted[0]["parameters"]
    attacker = KKTAttacker(model, None, config())
    stats, alone = (attacker.reconstruct(p, shared)[1] for p in (payload, wanted))
    assert stats["kkt_loss"] == alone["kkt_loss"] != attacked(model)[1]["kkt_loss"]


@pytest.mark.parametrize("what", ["parameters", "buffers"])
def test_what_is_not_finite(model, what):
    payload, shared = release(model, 4)
    payload[0][what][0][0, 0] = float("inf")
    with pytest.raises(SharedDataError, match="are not finite"):
        KKTAttacker(model, None, config()).reconstruct(payload, shared)


def test_weights_that_are_no_tensors(model):
    payload, shared = release(model, 4)
    payload[0]["parameters"] = [p.numpy() for p in payload[0]["parameters"]]
    with pytest.raises(SharedDataError, match="released weights hold values of type ndarray; valid: tensors"):
        KKTAttacker(model, None, config()).reconstruct(payload, shared)


@pytest.mark.parametrize("widths", [300, (), (3.5,), (0,), "12", (3, True)])
def test_widths_that_are_none(widths):
    for kind in (MLP, SmallConv):
        with pytest.raises(ConfigError, match=r"widths=.* is not possible; valid: .*whole numbers above 0"):
            kind(SHAPE, widths)


def test_the_nearest_candidate_is_that_without_the_mean_image():
    """Which all have in common, and which would correlate everything."""
    torch.manual_seed(0)
    mean, parts = 10 * torch.rand(SHAPE), torch.randn(3, *SHAPE)
    found = nearest(mean + 0.1 * parts[[2, 0]], mean + parts[[0, 1, 2]], mean)
    assert found.index.tolist()[::2] == [1, 0]
    assert found.ncc[[0, 2]].min() > 0.999
    assert found.ncc[1] < 0.8


def test_images_of_another_size_have_no_nearest_candidate():
    with pytest.raises(SharedDataError, match=r"Candidates \(3, 1, 6, 6\) do not compare with images \(2, 1, 5, 5\)"):
        nearest(torch.rand(3, *SHAPE), torch.rand(2, 1, 5, 5), torch.zeros(SHAPE))


def test_slopes_that_are_not_used_are_said(model, caplog):
    with caplog.at_level("INFO"):
        attacked(model)
        assert "is not used" not in caplog.text
        attacked(model, "extraction.steepness=null")
    assert "attack.extraction.slack=3 is not used: the plain ReLU" in caplog.text


def test_an_unknown_number_of_images(model):
    payload, shared = release(model, 4)
    del shared[0]["metadata"]["num_data_points"]
    with pytest.raises(SharedDataError, match="how many images"):
        KKTAttacker(model, None, config()).reconstruct(payload, shared)


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "beside",
    [
        {"epoch": torch.tensor(3)},
        {"loss": torch.rand(7), "mean": torch.rand(3), "optimizer": {"state": {0: torch.rand(2)}}},
        {"net": {"lr": 0.1}},
    ],
)
@pytest.mark.parametrize("deep", [False, True])
def test_a_tensor_beside_the_state_dict_does_not_hide_it(model, tmp_path, beside, deep):
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "mean"}  # which is zero
    content = {**beside, "state_dict": state}
    torch.save({"model": content, "step": torch.tensor(1)} if deep else content, tmp_path / "weights.pt")
    found = network_from_checkpoint(tmp_path / "weights.pt", SHAPE)
    x = torch.rand(2, *SHAPE)
    assert torch.equal(found(x), model(x))


def test_a_mean_image_beside_the_state_dict_is_taken(model, tmp_path):
    """Unless there is one in it."""
    state, mean = model.state_dict(), torch.rand(SHAPE)
    own = state.pop("mean") + 0.125
    inner = {"state_dict": state, "model": {"lr": 0.1}}  # not every dict under such a name holds the weights
    other = {"state_dict": {"lr": 0.1}, "model": state}
    for content in ({**inner, "mean": mean}, {**other, "mean": mean}, {"mean": mean, "net": inner}):
        torch.save(content, tmp_path / "weights.pt")
        assert torch.equal(network_from_checkpoint(tmp_path / "weights.pt", SHAPE).mean, mean)
    torch.save({"state_dict": {**state, "mean": own}, "mean": mean}, tmp_path / "weights.pt")
    load_checkpoint(model, tmp_path / "weights.pt")
    assert torch.equal(model.mean, own)


@pytest.mark.parametrize("content", [{0: torch.zeros(2)}, [torch.zeros(2)], torch.zeros(2), {"model": {}}])
def test_files_without_a_state_dict(model, tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="holds no state dict"):
        load_checkpoint(model, tmp_path / "weights.pt")


def test_a_trained_network_that_cannot_be_kept_is_not_lost(model, tmp_path, monkeypatch, caplog):
    write = training.write_atomically

    def full(path, fill):
        if path.name == "network.pt":
            raise OSError("No space left on device")
        return write(path, fill)

    monkeypatch.setattr(training, "write_atomically", full)
    monkeypatch.setattr(training, "kkt_residual", lambda *_: 1.0)  # it takes longer than the steps
    images, labels = torch.rand(2, *SHAPE), torch.tensor([1.0, -1.0])
    recipe = Recipe(max_steps=2, check_every=1, seed=0)
    before = model(images)
    assert train_or_load(model, images, labels, recipe, tmp_path / "network.pt").steps == 2
    assert not torch.equal(model(images), before)
    assert "network.pt could not be written (No space left on device)" in caplog.text
    assert (tmp_path / "network.part.pt").exists()  # from which the next run goes on


# ---------------------------------------------------------------------- the documentation


@pytest.fixture
def short(monkeypatch):
    """Let a script train for two steps and search for three."""
    whole = breaching.get_attack_config
    monkeypatch.setattr(breaching, "get_attack_config", lambda name, overrides=(): whole(name, [*overrides, SMALL[0]]))
    monkeypatch.setattr(breaching_ext.kkt, "Recipe", functools.partial(Recipe, max_steps=2, check_every=2))
    monkeypatch.setattr(training, "kkt_residual", lambda *_: 1.0)


def test_the_scripts_of_the_documentation_run(root, short, tmp_path, monkeypatch):
    scripts = re.findall(r"```python\n(.*?)```", (root / "docs" / "kkt.md").read_text(), re.DOTALL)
    assert len(scripts) == 2
    monkeypatch.chdir(tmp_path)
    torch.save({"epoch": 1, "state_dict": MLP((3, 32, 32), (4, 3)).state_dict()}, "weights.pth")
    own = {"images": torch.rand(4, 1, 28, 28), "labels": torch.tensor([1.0, -1.0, 1.0, -1.0])}
    for script, given in zip(
        scripts, ({**own, "mean_image": torch.rand(1, 28, 28)}, {"mean_image": torch.rand(3, 32, 32)}), strict=True
    ):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(script.replace("release(model, 500)", "release(model, 5)"), given)
        assert len(given["found"]["data"]) == len(given.get("images", range(5)))
        assert torch.equal(given["found"]["mean_image"], given["mean_image"])


# ---------------------------------------------------------------------- the case, and what was measured


@pytest.mark.parametrize("user", ["local_gradient", "local_update"])
def test_one_output_has_no_gradient_to_share(user):
    """Of any attack's case, in Breaching's own scripts as well."""
    breaching_ext.register()
    case = OmegaConf.create({"user": {"user_type": user}, "model": "kkt-mlp-3"})
    with pytest.raises(ConfigError, match=rf"user_type={user} is not possible.*one output.*valid: trained_model"):
        breaching.cases.construct_user(MLP((1, 28, 28), (3,)), None, case, {})


def test_an_untrained_network_has_no_weights_to_load(model):
    user, training = OmegaConf.create({"num_data_points": 4}), OmegaConf.create({"untrained": True, "weights": "a.pt"})
    with pytest.raises(ConfigError, match=r"untrained=true releases no weights=a\.pt; valid: one of the two"):
        TrainedModelUser(model, None, None, None, 0, user, training)


def test_what_is_stored_was_measured_as_the_study_says(root, monkeypatch):
    """Recipes and overrides of the runs in examples/results/kkt are those of their arms."""
    monkeypatch.syspath_prepend(root / "examples")
    monkeypatch.delitem(sys.modules, "kkt_study", raising=False)
    import kkt_study

    files = sorted((root / "examples" / "results" / "kkt" / "runs").glob("*.json"))
    assert len(files) > 50
    for file in files:
        record = json.loads(file.read_text())
        arm, seed = kkt_study.ARMS[record["arm"]], record["seed"]
        recipe = {**asdict(kkt_study.recipe_of(arm, seed)), "seed": record["recipe"]["seed"]}
        assert record["recipe"] == recipe, file.name
        assert tuple(record["attack_overrides"]) == arm.attack
        assert np.isfinite(record["kkt_loss"])
