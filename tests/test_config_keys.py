"""A key that nothing reads is refused, wherever an attack's keys are known; whoever extends an attack may add keys."""

from __future__ import annotations

from importlib import resources
from typing import ClassVar

import pytest
import torch
from breaching.attacks.auxiliaries.augmentations import augmentation_lookup
from breaching.attacks.auxiliaries.objectives import Euclidean, objective_lookup
from breaching.attacks.auxiliaries.regularizers import regularizer_lookup
from cases import attack_config, build_model, loss, observed
from omegaconf import OmegaConf

from breaching_ext.attacks import JointCandidateAttacker, MagiaAttacker, config_keys, observe
from breaching_ext.attacks.config_keys import JOINT_KEYS, MAGIA_KEYS, check_keys
from breaching_ext.attacks.output_checks import check_labels_of_output, output_of
from breaching_ext.errors import ConfigError, SharedDataError

SETUP = {"dtype": torch.float64, "device": torch.device("cpu")}


def built(kind, name, *overrides):
    return kind(build_model("own"), loss(), attack_config(name, list(overrides)), SETUP)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("+subset.k=2", "subset key='k'.*sel_k"),
        ("+image_prior.wieght=1", "image_prior key='wieght'.*weight"),
        ("+optim.inner=3", "optim key='inner'.*inner_iterations"),
        ("+pyramid.factor=[1]", "pyramid key='factor'.*factors"),
        ("image_prior.relative=null", "image_prior.relative=None.*true, false"),
        ("subset.sel_l_iter=0", r"subset\.sel_l_iter=0 is out of range.*1 or more"),
        ("subset=5", "subset=5 is not possible.*sel_mode"),
    ],
)
def test_magias_keys(overrides, words):
    with pytest.raises(ConfigError, match=words):
        built(MagiaAttacker, "magia", overrides)


def test_parts_of_magia_may_be_left_to_their_defaults():
    options = built(MagiaAttacker, "magia", "subset=null", "~pyramid").options
    assert options == built(MagiaAttacker, "magia").options


@pytest.mark.parametrize(("name", "keys"), [("joint_candidates", JOINT_KEYS), ("magia", MAGIA_KEYS)])
def test_the_known_keys_are_those_of_the_config_that_explains_them(root, name, keys):
    """Each has a comment there, or is one of Breaching's."""
    ours = OmegaConf.load(root / "config" / "attack" / f"{name}.yaml")
    del ours["defaults"]
    check_keys(OmegaConf.merge(attack_config(name), ours), keys)
    told = {section: set(part) for section in keys for part in (ours.get(section) if section else ours,)}
    stock = resources.files("breaching.config.attack") / "_default_optimization_attack.yaml"
    base = OmegaConf.create(stock.read_text())
    for section, known in keys.items():
        of_breaching = set(base.get(section, {}) if section else base)
        assert set(known) - told[section] - of_breaching <= ({"memory_budget"} if name == "magia" else set())


@pytest.mark.parametrize(
    "name", ["multiscale_ghiasi", "tag", "clsattack", "deepleakage", "seethroughgradients", "modern"]
)
def test_keys_of_breachings_own_configs_stay_valid(name):
    options = ["attack_type=joint-candidates", "+restarts.parallel_candidates=true"]
    built(JointCandidateAttacker, name, *options)
    if name == "tag":
        built(JointCandidateAttacker, name, *options, "objective.type=euclidean")  # tag_scale is left over


class Mine(JointCandidateAttacker):
    """Somebody's attack with keys of its own."""


class Strict(JointCandidateAttacker):
    """Another's, that says which."""

    config_keys: ClassVar = {
        **JOINT_KEYS,
        "": (*JOINT_KEYS[""], "mine"),
        "restarts": (*JOINT_KEYS["restarts"], "patience"),
        "mine": ("depth",),
    }


def test_attacks_of_others_may_have_keys_of_their_own():
    built(Mine, "joint_candidates", "+restarts.patience=3", "+mine.depth=2", "+impl.fast=true")
    built(Strict, "joint_candidates", "+restarts.patience=3", "+mine.depth=2")
    with pytest.raises(ConfigError, match=r"mine key='width'.*depth"):
        built(Strict, "joint_candidates", "+mine.width=2")


class Anything(torch.nn.Module):
    """Takes arguments by any name, as what somebody registers with Breaching may."""

    def __init__(self, setup=None, scale=1.0, **options):
        super().__init__()
        self.options = options


class TakesAny(Euclidean):
    """An objective with arguments of its own."""

    def __init__(self, scale=1.0, task_regularization=0.0, **options):
        super().__init__(scale, task_regularization)
        self.options = options


@pytest.mark.parametrize(
    ("table", "options"),
    [
        (regularizer_lookup, ["+regularization.any={scale: 1.0, own: 3}"]),
        (augmentation_lookup, ["+augmentations.any.own=3"]),
        (objective_lookup, ["objective.type=any", "+objective.own=3"]),
    ],
    ids=["regularizer", "augmentation", "objective"],
)
def test_what_others_register_with_breaching_may_take_any_argument(monkeypatch, table, options):
    monkeypatch.setitem(table, "any", TakesAny if table is objective_lookup else Anything)
    attacker = built(JointCandidateAttacker, "joint_candidates", *options)
    parts = [*attacker.regularizers, *attacker.augmentations, attacker.objective]
    (found,) = [part for part in parts if isinstance(part, (Anything, TakesAny))]
    assert found.options["own"] == 3


class Counting(torch.nn.Module):
    """Keeps running statistics, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.head = torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.head(self.drop(self.norm(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_looking_at_a_models_outputs_changes_nothing(training):
    model = Counting().train(training)
    before, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    assert output_of(model, torch.ones(2, 3, 4, 4)).shape == (2, 5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert model.calls == 0
    assert torch.equal(state, torch.get_rng_state())


def test_losses_of_others_take_what_they_take():
    """Such as one of K - 1 thresholds for K ordered classes; but their value must be one number."""

    def ordinal(output, labels):
        steps = torch.arange(output.shape[1])
        return torch.nn.functional.binary_cross_entropy_with_logits(output, (labels[:, None] > steps).to(output.dtype))

    check_labels_of_output(ordinal, torch.zeros(2, 4), torch.tensor([0, 4]))
    with pytest.raises(ConfigError, match=r"CrossEntropyLoss gives a value of shape \(2,\)"):
        check_labels_of_output(torch.nn.CrossEntropyLoss(reduction="none"), torch.zeros(2, 4), torch.tensor([0, 3]))


def test_an_augmentation_in_another_type_than_the_cases():
    """The case in float, the attack in double: Breaching leaves an augmentation's numbers in the case's."""
    options = ["+augmentations.antialias.width=3", "differentiable_augmentations=true", "restarts.num_trials=1"]
    cfg = attack_config("joint_candidates", options, 1)
    single = {**SETUP, "dtype": torch.float32}
    model = build_model("own")
    found, _ = JointCandidateAttacker(model, loss(), cfg, single).reconstruct(*observed(model)[:2])
    assert found["data"].isfinite().all()


def test_a_key_of_ones_own_at_the_top_may_be_what_others_refer_to(caplog):
    attacker = built(JointCandidateAttacker, "joint_candidates", "+n=2", "restarts.num_trials=${n}")
    assert attacker.cfg.restarts.num_trials == 2
    assert "attack.n is a key that this attack does not read" in caplog.text
    with pytest.raises(ConfigError, match=r"key='restart'.*restarts"):
        built(JointCandidateAttacker, "joint_candidates", "+restart.num_trials=2")


def test_sizes_of_augmentations_may_be_lists():
    options = ["+augmentations.median={kernel_size: [3, 3]}", "differentiable_augmentations=true"]
    built(JointCandidateAttacker, "joint_candidates", *options)


class TwoViews(torch.nn.Module):
    """Two rows an image; differentiates within, and takes no constant image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3 * 32 * 16, 8)

    def forward(self, x):
        if float(x.detach().std()) == 0:
            raise ValueError("a constant image")
        energies = torch.cat([self.head(view.flatten(1)).tanh() for view in (x[..., :16], x[..., 16:])])
        weights = self.head.weight
        (slope,) = torch.autograd.grad(weights.square().sum(), weights, create_graph=True)
        return energies + 0.01 * slope.mean()


def test_whatever_a_model_and_its_loss_agree_on_is_taken():
    def both_views(output, labels):
        return torch.nn.functional.cross_entropy(output, torch.cat([labels, labels]))

    torch.manual_seed(0)
    model, labels = TwoViews().double(), torch.tensor([1, 5])
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    gradients = torch.autograd.grad(both_views(model(images), labels), list(model.parameters()))
    payload, shared = observe(model, gradients, (3, 32, 32), 2, 8, labels)
    cfg = attack_config("joint_candidates", [], 1)
    found, _ = JointCandidateAttacker(model, both_views, cfg, SETUP).reconstruct(payload, shared)
    assert found["data"].isfinite().all()


def test_labels_beyond_the_outputs_that_a_loss_takes():
    class Shifted(torch.nn.CrossEntropyLoss):
        def forward(self, output, labels):
            return torch.nn.functional.cross_entropy(output, labels - 1)

    check_labels_of_output(Shifted(), torch.zeros(2, 4), torch.tensor([1, 4]))
    check_labels_of_output(torch.nn.CrossEntropyLoss(ignore_index=255), torch.zeros(2, 4), torch.tensor([0, 255]))
    with pytest.raises(SharedDataError, match=r"\[0, 4\] do not fit the model's 4 outputs"):
        check_labels_of_output(torch.nn.CrossEntropyLoss(), torch.zeros(2, 4), torch.tensor([0, 4]))


def test_rows_that_are_no_images_are_not_told_apart_by_local_steps():
    steps = {"steps": 1, "labels": [torch.tensor([0, 3])]}

    def never(output, labels):
        raise AssertionError

    check_labels_of_output(never, torch.zeros(4, 5), torch.tensor([0, 3]), steps)


@pytest.mark.parametrize(("kind", "name"), [(JointCandidateAttacker, "joint_candidates"), (MagiaAttacker, "magia")])
def test_a_config_that_says_what_ours_say_needs_none_of_breachings_files(monkeypatch, kind, name):
    """They are looked at for keys that are not known otherwise; no run should wait for that."""

    def read():
        raise AssertionError("Breaching's configs were read")

    monkeypatch.setattr(config_keys, "_of_breaching", read)
    built(kind, name)
    with pytest.raises(AssertionError, match="were read"):
        built(kind, name, "+optim.unknown=1")
