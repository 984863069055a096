"""Every bad input is refused before the loop starts, in one line that says what is wrong."""

from __future__ import annotations

import pytest
import torch
from cases import attack_config, build_model, loss, observed
from hydra import compose, initialize_config_module

from breaching_ext.attacks import JointCandidateAttacker, MagiaAttacker, observe
from breaching_ext.attacks.joint_loop import JointLoop
from breaching_ext.environment import resolve_device
from breaching_ext.errors import BreachingExtError, ConfigError, SharedDataError
from breaching_ext.registration import register, unregister
from breaching_ext.run import run

SETUP = {"dtype": torch.float64, "device": torch.device("cpu")}


@pytest.fixture(autouse=True)
def _no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self, dryrun=False):
        raise AssertionError("the loop was entered")

    monkeypatch.setattr(JointLoop, "run", never)


def attack(model, payload, shared, *overrides, **more):
    cfg = attack_config("joint_candidates", list(overrides))
    return JointCandidateAttacker(model, loss(), cfg, SETUP).reconstruct(payload, shared, **more)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["restarts.num_trials=0"], ["restarts.num_trials", "0"]),
        (["restarts.scoring=magic"], ["restarts.scoring", "magic", "cosine-similarity"]),
        (["restarts.output=worst"], ["restarts.output", "worst", "consensus"]),
        (["restarts.candidate_batching=fast"], ["candidate_batching", "fast", "vmap"]),
        (["optim.optimizer=sgd"], ["optim.optimizer", "sgd", "momgd"]),
        (["optim.step_size_decay=steps"], ["step_size_decay", "steps", "cosine-decay"]),
        (["optim.signed=very"], ["optim.signed", "very", "hard"]),
        (["optim.max_iterations=0"], ["max_iterations", "0"]),
        (["objective.type=l7"], ["objective.type", "l7", "euclidean"]),
        (["objective.type=pearlmutter-loss"], ["objective.type", "pearlmutter-loss", "euclidean"]),
        (["+regularization.magic.scale=1"], ["regularization", "magic", "total_variation"]),
        (["optim.callback=0"], ["optim.callback", "0"]),
        (["regularization.total_variation.scale=null"], ["regularization.total_variation.scale", "None"]),
        (["regularization.total_variation.scale=-1"], ["regularization.total_variation.scale", "-1"]),
        (["optim.langevin_noise=null"], ["optim.langevin_noise", "None"]),
        (["optim.warmup=null"], ["optim.warmup", "None"]),
        (["impl.dtype=float33"], ["impl.dtype", "float33"]),
        (["+regularization.group_regularization.warmup_iter=5"], ["warmup_iter", "warmup_iters"]),
        (["regularization.group_regularization.aligner=magic"], ["aligner", "magic", "ransac_flow"]),
        (
            ["regularization.group_regularization.aligner=magic", "regularization.group_regularization.scale=0"],
            ["aligner", "magic", "ransac_flow"],
        ),
        (["regularization.group_regularization.warmup_iters=null"], ["warmup_iters", "None"]),
        (["optim.step_size=null"], ["optim.step_size", "None"]),
        (["optim.step_size=-1"], ["optim.step_size", "-1"]),
        (["optim.grad_clip=-1"], ["optim.grad_clip", "-1"]),
        (["+augmentations.magic.p=1"], ["augmentations", "magic", "discrete_shift"]),
        (["label_strategy=magic"], ["label_strategy", "magic", "bias-corrected"]),
        (["init=magic"], ["init", "magic", "randn-trunc"]),
        (["init=patterned-0"], ["init", "patterned-0", "patterned-4"]),
        (["impl.progress=off"], ["impl.progress", "off", "auto, True, False"]),
        (["restarts.seed=abc"], ["restarts.seed", "abc"]),
        (["restarts.seed=1.5"], ["restarts.seed", "1.5"]),
        (["restarts.parallel_candidates=no"], ["restarts.parallel_candidates=no", "true, false"]),
        (["optim.boxed=off"], ["optim.boxed=off", "true, false"]),
        (["objective.scale=abc"], ["objective.scale", "abc"]),
        (["objective.task_regularization=abc"], ["objective.task_regularization", "abc"]),
        (["impl.JIT=foo"], ["impl.JIT", "foo", "trace"]),
        (["regularization.total_variation.inner_exp=abc"], ["total_variation.inner_exp", "abc"]),
        (["+regularization.total_variation.double_opponents=no"], ["double_opponents=no", "true, false"]),
        (["+regularization.total_variation.foo=1"], ["total_variation key", "foo", "outer_exp"]),
        (["regularization=0.1"], ["regularization=0.1 ", "total_variation.scale"]),
        (["regularization.total_variation=0.1"], ["regularization.total_variation=0.1", "total_variation.scale"]),
        (["optim.boxed=null"], ["optim.boxed=None", "true, false"]),
        (["restarts.parallel_candidates=null"], ["restarts.parallel_candidates=None", "true, false"]),
        (["+regularization.total_variation.double_opponents=null"], ["double_opponents=None", "true, false"]),
        (["+restarts.nonsense=1"], ["restarts key='nonsense'", "num_trials"]),
        (["+impl.foo=1"], ["impl key='foo'", "memory_budget"]),
        (["+optim.history_size=10"], ["optim key='history_size'", "langevin_noise"]),  # MAGIA's
        (["+restart.num_trials=1"], ["key='restart'", "restarts"]),
        (["+objective.foo=1"], ["objective key='foo'", "task_regularization"]),
        (["impl.checkpoint_path=7"], ["impl.checkpoint_path=7", "a file's name"]),
        (["objective=l1"], ["objective=l1", "objective.type=euclidean"]),
        (["restarts=null"], ["restarts=None", "num_trials"]),
        (["impl=fast"], ["impl=fast", "dtype"]),
        (["+augmentations.flip.q=1"], ["augmentations.flip key='q'", "p"]),
        (["+augmentations.flip.p=often"], ["augmentations.flip.p=often", "a number"]),
        (["+augmentations.colorjitter.shuffle_every=yes"], ["colorjitter.shuffle_every=yes", "true, false"]),
        (["augmentations=[flip]"], ["augmentations=['flip']", "augmentations.flip.p"]),
        (["+augmentations.flip=null"], ["augmentations.flip=None", "{}"]),
        (["+augmentations.antialias.width=9"], ["augmentations.antialias={'width': 9}", "KeyError: 9"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_configs(overrides, words):
    with pytest.raises(ConfigError) as error:
        JointCandidateAttacker(build_model("own"), loss(), attack_config("joint_candidates", overrides), SETUP)
    assert all(word in str(error.value) for word in words)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("jointly", [True, False])
@pytest.mark.parametrize(
    ("augmentation", "words"),
    [
        ("discrete_shift.lim=0", r"augmentations\.discrete_shift=\{'lim': 0\} does not take images of \(3, 32, 32\)"),
        ("antialias.channels=2", r"augmentations\.antialias=\{'channels': 2\} does not take images of \(3, 32, 32\)"),
        ("focus.size=24", r"\(3, 24, 24\) from \(3, 32, 32\)"),
    ],
)
def test_augmentations_that_cannot_be_applied(augmentation, words, jointly):
    model = build_model("own")
    options = (f"+augmentations.{augmentation}", f"restarts.parallel_candidates={jointly}")
    with pytest.raises(ConfigError, match=words) as error:
        attack(model, *observed(model)[:2], *options)
    assert len(str(error.value).splitlines()) == 1


def broken(what: str):
    model = build_model("own")
    payload, shared, images, _ = observed(model)
    data, more = shared[0], {}
    if what == "too few gradients":
        data["gradients"] = data["gradients"][:-1]
    elif what == "wrong shape":
        data["gradients"][0] = data["gradients"][0].flatten()
    elif what == "not finite":
        data["gradients"][2].view(-1)[0] = float("nan")
    elif what == "labels out of range":
        data["metadata"]["labels"] = torch.tensor([0, 8])
    elif what == "labels as a list":
        data["metadata"]["labels"] = [0, 1]
    elif what == "a negative label of unknown classes":
        payload[0]["metadata"]["classes"] = None
        data["metadata"]["labels"] = torch.tensor([0, -1])
    elif what == "soft labels that are not finite":
        data["metadata"]["labels"] = torch.full((2, 8), float("nan"))
    elif what == "gradients of NumPy":
        data["gradients"] = [g.numpy() for g in data["gradients"]]
    elif what == "nothing to match":
        model.requires_grad_(False)
        data["gradients"] = []
    elif what == "wrong number of labels":
        data["metadata"]["labels"] = torch.tensor([0])
    elif what == "soft labels of another number":
        data["metadata"]["labels"] = torch.rand(3, 8)
    elif what == "labels beyond the model's outputs":
        payload[0]["metadata"]["classes"] = 10
        data["metadata"]["labels"] = torch.tensor([0, 8])
    elif what == "soft labels of another number of classes":
        data["metadata"]["labels"] = torch.rand(2, 10, dtype=torch.float64)
    elif what == "images of another size":
        payload[0]["metadata"]["shape"] = [3, 8, 8]
    elif what in ("zeros", "nearly zeros"):
        data["gradients"] = [(0.0 if what == "zeros" else 1e-200) * g for g in data["gradients"]]
    elif what.startswith("local steps"):
        labels = [torch.tensor([0, 12 if "range" in what or "outputs" in what else 3]), torch.tensor([1, 2])]
        labels = labels[: 1 if "too few" in what else 2]
        labels[-1] = labels[-1][: 1 if "wrong number" in what else 2]
        payload[0]["metadata"]["classes"] = 13 if "outputs" in what else 8
        data["metadata"]["local_hyperparams"] = {"labels": labels, "steps": 2, "data_per_step": 2, "lr": 0.1}
    elif what == "unknown number of data points":
        data["metadata"]["num_data_points"] = None
    elif what == "two payloads":
        payload = payload * 2
    elif what == "start of the wrong shape":
        more["initial_data"] = images[:1]
    elif what == "start of NumPy":
        more["initial_data"] = images.numpy()
    elif what == "start that is not finite":
        more["initial_data"] = images * float("inf")
    return model, payload, shared, more


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("too few gradients", ["5", "6"]),
        ("wrong shape", ["conv.weight", "(450,)", "(6, 3, 5, 5)"]),
        ("not finite", ["mix.weight", "not finite"]),
        ("labels out of range", ["[0, 8]", "0 to 7"]),
        ("wrong number of labels", ["(1,)", "2 data points"]),
        ("soft labels of another number", ["(3, 8)", "2 data points"]),
        ("local steps with labels out of range", ["[0, 12]", "0 to 7"]),
        ("local steps with labels of too few", ["2 local steps", "1"]),
        ("local steps with labels of the wrong number", ["(1,)", "2 data points"]),
        ("unknown number of data points", ["None", "provide_num_data_points"]),
        ("two payloads", ["2", "1"]),
        ("start of the wrong shape", ["(1, 3, 32, 32)", "(2, 3, 32, 32)", "(4, 2, 3, 32, 32)"]),
        ("start that is not finite", ["not finite"]),
        ("start of NumPy", ["ndarray", "tensor"]),
        ("labels as a list", ["list", "tensor"]),
        ("a negative label of unknown classes", ["[0, -1]", "0 or more"]),
        ("soft labels that are not finite", ["not finite", "probabilities"]),
        ("gradients of NumPy", ["conv.weight", "ndarray"]),
        ("labels beyond the model's outputs", ["[0, 8]", "8 outputs", "0 to 7"]),
        ("soft labels of another number of classes", ["CrossEntropyLoss", "(2, 8)", "(2, 10)"]),
        ("local steps with labels beyond the outputs", ["[0, 12]", "8 outputs", "0 to 7"]),
        ("images of another size", ["does not take data of shape (2, 3, 8, 8)"]),
        ("zeros", ["0 in float64", "objective.type=cosine-similarity", "euclidean"]),
        ("nearly zeros", ["0 in float64", "objective.type=cosine-similarity", "euclidean"]),
        ("nothing to match", ["No parameter of the model requires a gradient"]),
    ],
)
def test_shared_data(what, words):
    model, payload, shared, more = broken(what)
    with pytest.raises(SharedDataError) as error:
        attack(model, payload, shared, **more)
    assert all(word in str(error.value) for word in words)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("objective", "scoring"), [("euclidean", "cosine-similarity"), ("angular", "euclidean")])
def test_a_gradient_of_zeros_has_no_direction(objective, scoring):
    model, payload, shared, _ = broken("zeros")
    key = f"restarts.scoring={scoring}" if objective == "euclidean" else f"objective.type={objective}"
    with pytest.raises(SharedDataError, match=key):
        attack(model, payload, shared, f"objective.type={objective}", f"restarts.scoring={scoring}")
    with pytest.raises(AssertionError, match="the loop was entered"):
        attack(model, payload, shared, "objective.type=euclidean", "restarts.scoring=euclidean")


def test_magia_cannot_score_a_gradient_of_zeros_by_its_direction():
    model, payload, shared, _ = broken("zeros")
    cfg = attack_config("magia", ["restarts.scoring=cosine-similarity"])
    with pytest.raises(SharedDataError, match=r"restarts\.scoring=cosine-similarity"):
        MagiaAttacker(model, torch.nn.CrossEntropyLoss(), cfg, SETUP).reconstruct(payload, shared)


def test_no_labels_at_all():
    model = build_model("own")
    payload, shared, *_ = observed(model, labels=None)
    with pytest.raises(SharedDataError, match="label_strategy"):
        attack(model, payload, shared, "label_strategy=null")


def test_a_device_that_does_not_exist():
    with pytest.raises(ConfigError, match="device=warp"):
        resolve_device("warp")


def test_a_dataset_that_cannot_be_downloaded(tmp_path, monkeypatch):
    import breaching
    from omegaconf import OmegaConf

    import breaching_ext

    breaching_ext.register()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there: fails at once, everywhere
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    cfg = OmegaConf.create(
        {"name": "CIFAR10", "path": str(tmp_path), "modality": "vision", "examples_from_split": "validation"}
    )
    with pytest.raises(BreachingExtError, match=r"CIFAR10.*sample_photos") as error:
        breaching.cases.data.construct_dataloader(cfg, OmegaConf.create({}))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.filterwarnings("ignore:.*pretrained", "ignore:.*weight enum")  # Breaching asks torchvision in its old way
def test_pretrained_weights_that_cannot_be_downloaded(tmp_path, monkeypatch):
    import breaching
    from omegaconf import OmegaConf

    import breaching_ext

    breaching_ext.register()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    cfg = OmegaConf.create({"name": "ImageNet", "modality": "vision", "classes": 1000, "shape": [3, 224, 224]})
    with pytest.raises(
        BreachingExtError, match=r"resnet18.*pretrained weights.*case\.server\.pretrained=false"
    ) as error:
        breaching.cases.models.model_preparation.construct_model("resnet18", cfg, pretrained=True)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "weights.pth"), r"cannot build.*PermissionError: .*weights\.pth"),
        (ConnectionResetError("reset by peer"), r"pretrained weights.*ConnectionResetError"),
    ],
    ids=["file", "network"],
)
def test_only_a_download_that_fails_is_taken_for_missing_weights(monkeypatch, error, words):
    import breaching

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch, initialize_config_module("breaching.config", version_base="1.3"):
        unregister()  # what finding the configs has registered
        patch.setattr(breaching.cases.models.model_preparation, "_construct_vision_model", fail)
        register()  # around that one
        with pytest.raises(BreachingExtError, match=words) as found:
            run(compose("breaching_ext", overrides=["device=cpu"]))
        unregister()
    register()
    assert len(str(found.value).splitlines()) == 1


def without_labels(bias_gradient=None, **more):
    model = build_model("own")
    payload, shared, *_ = observed(model)
    shared[0]["metadata"].update(labels=None, **more)
    if bias_gradient is not None:
        shared[0]["gradients"][-1] = torch.full_like(shared[0]["gradients"][-1], bias_gradient)
    return model, payload, shared


def test_statistics_inside_a_model_do_not_go_with_local_steps():
    model = build_model("ResNet20")
    labels = torch.tensor([1, 2])
    steps = {"labels": [labels, labels], "steps": 2, "data_per_step": 2, "lr": 0.1}
    payload, shared, *_ = observed(model, local_hyperparams=steps)
    with pytest.raises(ConfigError, match=r"DeepInversion compares.*deep_inversion.scale=0"):
        attack(model, payload, shared, "+regularization.deep_inversion={scale: 0.1, first_bn_multiplier: 10}")


def test_more_inferred_labels_than_images():
    """Noise on the gradient makes bias gradients of absent classes negative, and Breaching takes them all."""
    with pytest.raises(SharedDataError, match="label_strategy=bias-corrected found"):
        attack(*without_labels(-0.01), "label_strategy=bias-corrected")


def test_labels_of_another_last_layer():
    """A normalisation behind a frozen head: channels are no classes."""
    model, payload, shared = without_labels()
    payload[0]["metadata"].classes = 1
    with pytest.raises(SharedDataError, match="of 1 classes"):
        attack(model, payload, shared, "label_strategy=yin")


def test_a_folder_in_the_place_of_a_checkpoint(tmp_path):
    model, payload, shared = build_model("own"), *observed(build_model("own"))[:2]
    options = ("impl.checkpoint_every=1", f"impl.checkpoint_path={tmp_path}")
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        attack(model, payload, shared, *options)


def test_labels_of_a_model_without_a_last_bias():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5, bias=False)).double()
    images, labels = torch.rand(2, 3, 2, 2, dtype=torch.float64), torch.tensor([1, 3])
    gradients = torch.autograd.grad(loss()(model(images), labels), list(model.parameters()))
    payload, shared = observe(model, gradients, (3, 2, 2), 2, 5)
    with pytest.raises(SharedDataError, match="cannot infer labels"):
        attack(model, payload, shared, "label_strategy=bias-corrected")


def test_labels_that_came_with_the_local_steps_are_the_labels():
    model, payload, shared = without_labels()
    attacker = JointCandidateAttacker(model, loss(), attack_config("joint_candidates", []), SETUP)
    steps = {"labels": [torch.tensor([4, 2]), torch.tensor([4, 2])], "steps": 2, "data_per_step": 2, "lr": 0.1}
    shared[0]["metadata"].update(num_data_points=2, local_hyperparams=steps)
    assert attacker._recover_label_information(shared, payload, [model]).tolist() == [4, 2]


def test_observing_incomplete_or_training(caplog):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    gradients = [torch.zeros_like(p) for p in model.parameters()]
    with pytest.raises(SharedDataError, match="lacks data_per_step, labels"):
        observe(model, gradients, (2,), 2, 2, local_hyperparams={"steps": 2, "lr": 0.1})
    with pytest.raises(SharedDataError, match="mean and std belong together"):
        observe(model, gradients, (2,), 2, 2, mean=[0.5, 0.5])
    assert not caplog.records
    observe(model, gradients, (2,), 2, 2)
    assert "training mode" in caplog.text
    caplog.clear()
    observe(model.eval(), gradients, (2,), 2, 2)
    assert not caplog.records


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["case.impl.dtype=float33"], ["case.impl.dtype", "float33"]),
        (["seed=null"], ["seed", "None"]),
        (["seed=99999999999999999999"], ["seed", "99999999999999999999"]),
        (["device=null"], ["device", "None", "auto"]),
        (["dryrun=no"], ["dryrun=no", "true, false"]),
        (["case.user.provide_labels=null"], ["case.user.provide_labels=None", "true, false"]),
        (["case.user.provide_labels=no"], ["case.user.provide_labels=no", "true, false"]),
        (["case.user.user_idx=1.5"], ["case.user.user_idx", "1.5"]),
        (["case.model=foo"], ["cannot build", "case.model=foo"]),
        (["case.data.name=foo"], ["cannot build", "case.data.name=foo"]),
        (["case.data.partition=foo"], ["cannot build", "case.data.partition=foo"]),
        (["case.server.name=foo"], ["cannot build", "case.server.name=foo"]),
        (["case.user.user_type=foo"], ["cannot build", "case.user.user_type=foo"]),
        (["attack.attack_type=foo"], ["cannot build", "attack.attack_type=foo"]),
        (["case/user=trained_model"], ["case.training", "case=kkt_fashion_mnist"]),
        (["case.user.num_data_points=4.0"], ["num_data_points", "4.0"]),
        (["device=meta"], ["device=meta", "no values", "auto"]),
        (["case.data.default_clients=0"], ["case.data.default_clients=0", "1, 2"]),
        (["case.data.std=[0.1,0,0.1]"], ["case.data.std=0", "above 0"]),
        (["case.data.std=null"], ["case.data.std=None", "one number a channel"]),
        (["case.data.mean=[0.1,0.2]"], ["case.data.mean=[0.1, 0.2]", "one number a channel"]),
        (["case.data.shape=[3,17,17]"], ["case.model=cnn6", "case.data.shape=[3, 17, 17]", "RuntimeError"]),
        (["attack.impl.JIT=script", "case.model=lenet_zhu"], ["impl.JIT=script", "valid: empty"]),
        (["case.server.pretrained=no"], ["case.server.pretrained=no", "true, false"]),
        (["case.user=null"], ["case.user=None", "a part with its keys"]),
        (["case.data=7"], ["case.data=7", "a part with its keys"]),
        (["case.server.num_queries=0"], ["case.server.num_queries=0", "1, 2"]),
        (["case.user.local_diff_privacy.gradient_noise=-1"], ["gradient_noise=-1", "from 0"]),
        (["case.user.local_diff_privacy.per_example_clipping=null"], ["per_example_clipping=None", "from 0"]),
        (["case/user=local_updates", "case.user.num_local_updates=0"], ["num_local_updates=0", "1, 2"]),
        (["case/user=local_updates", "case.user.num_data_per_local_update_step=0"], ["local_update_step=0", "1, 2"]),
        (["case/user=local_updates", "case.user.local_learning_rate=-1"], ["local_learning_rate=-1", "above 0"]),
        (["attack=deepleakage"], ["case.user.provide_labels=true", "deep-leakage", "valid: false"]),
        (["case/user=local_updates", "case.user.provide_local_hyperparams=false"], ["provide_local_hyperparams"]),
        (["case/user=multiuser_aggregate", "case.user.user_range=[0,3]"], ["multiuser_aggregate", "local_update"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_full_configs(overrides, words):
    register()
    with initialize_config_module("breaching.config", version_base="1.3"):
        cfg = compose("breaching_ext", overrides=overrides)
    with pytest.raises(ConfigError) as error:
        run(cfg)
    assert all(word in str(error.value) for word in words)
    assert len(str(error.value).splitlines()) == 1


def test_one_gpu_named_for_all_processes(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="device=cuda:0 under torchrun"):
        resolve_device("cuda:0")


def test_a_strategy_for_the_labels_of_text():
    model = build_model("own")
    payload, shared, *_ = observed(model, labels=None)
    with pytest.raises(SharedDataError, match="label_strategy=bias-text infers the tokens of text"):
        attack(model, payload, shared, "label_strategy=bias-text")
