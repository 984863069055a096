"""The one place that changes Breaching: attack types, lookup entries, datasets, partitions and config roots.

Everything is applied by :func:`register` and taken back by :func:`unregister`; both are idempotent. Torch and
Breaching are imported only when `register` is called, because Hydra imports our search-path plugin (and with it
this module) in every Hydra application of the environment.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

#: attack type (the key `attack_type` of an attack config) -> "module:class"
ATTACK_TYPES: dict[str, str] = {
    "joint-candidates": "breaching_ext.attacks.joint_candidates:JointCandidateAttacker",
    "kkt": "breaching_ext.attacks.kkt:KKTAttacker",
    "magia": "breaching_ext.attacks.magia:MagiaAttacker",
}

#: key below `regularization` in an attack config -> "module:class"
REGULARIZERS: dict[str, str] = {
    "group_regularization": "breaching_ext.regularizers.group:GroupRegularization",
}

_MISSING = object()
_undo: list[Callable[[], None]] = []


def load(target: str) -> Any:
    """Import "module:name" and return the named object."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def register() -> None:
    """Make Breaching's own entry points know the attacks, regularizers and datasets of this package.

    Afterwards `breaching.attacks.prepare_attack` accepts our attack types, `regularization.group_regularization`
    is a known regularizer, `case.data.name=sample_photos` and `fashion_mnist_binary` with `partition=interleaved` are
    known datasets, `case.model=kkt-mlp-300` and its like known models, and `case.user.user_type=trained_model` a known
    user. Safe to call any number of times. A name that a later Breaching has moved is skipped with one warning.
    """
    if _undo:
        return
    _wrap("breaching.attacks", "prepare_attack", _with_our_attacks)
    _wrap("breaching.cases", "construct_user", _with_our_users)
    _wrap("breaching.cases.models.model_preparation", "_construct_vision_model", _with_our_models)
    _wrap("breaching.cases.data.datasets_vision", "_build_dataset_vision", _with_our_datasets)
    _wrap("breaching.cases.data.datasets_vision", "_split_dataset_vision", _with_our_partitions)
    for key, target in REGULARIZERS.items():
        _add_entry("breaching.attacks.auxiliaries.regularizers", "regularizer_lookup", key, load(target))


def unregister() -> None:
    """Take back everything that :func:`register` did. Safe to call any number of times."""
    while _undo:
        _undo.pop()()


def register_if_breaching_is_loaded() -> None:
    """Register only when the running program has already imported Breaching (used by the Hydra plugin)."""
    if "breaching.attacks" in sys.modules:
        register()


def config_root() -> str:
    """Return the Hydra search path of our configs.

    An installed package carries them as `breaching_ext.config`. In a source tree that package does not exist (the
    files live in the top-level `config/`), so the folder itself is returned.
    """
    if importlib.util.find_spec("breaching_ext.config") is not None:
        return "pkg://breaching_ext.config"
    return f"file://{Path(__file__).resolve().parent.parent / 'config'}"


def _module(name: str) -> Any:
    """Return a module of Breaching's; None where this Breaching has none of that name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there, and something that it needs is not
        return None


def _wrap(module_name: str, name: str, wrapper: Callable[[Callable], Callable]) -> None:
    module = _module(module_name)
    original = getattr(module, name, None)
    if original is None:
        log.warning("This Breaching has no %s.%s; what builds on it is not registered.", module_name, name)
        return
    replacement = functools.wraps(original)(wrapper(original))
    setattr(module, name, replacement)

    def undo() -> None:
        if getattr(module, name) is replacement:  # never throw away what somebody else has put there since
            setattr(module, name, original)

    _undo.append(undo)


def _add_entry(module_name: str, table_name: str, key: str, value: Any) -> None:
    table = getattr(_module(module_name), table_name, None)
    if table is None:
        log.warning("This Breaching has no %s.%s; %r is not registered.", module_name, table_name, key)
        return
    before = table.get(key, _MISSING)
    table[key] = value

    def undo() -> None:
        if table.get(key) is value:
            if before is _MISSING:
                del table[key]
            else:
                table[key] = before

    _undo.append(undo)


def _with_our_attacks(original: Callable) -> Callable:
    def prepare_attack(model: Any, loss: Any, cfg_attack: Any, *args: Any, **kwargs: Any) -> Any:
        target = ATTACK_TYPES.get(cfg_attack.attack_type)
        if target is None:
            return original(model, loss, cfg_attack, *args, **kwargs)
        return load(target)(model, loss, cfg_attack, *args, **kwargs)

    return prepare_attack


def _with_our_users(original: Callable) -> Callable:
    from .errors import ConfigError

    def construct_user(model: Any, loss_fn: Any, cfg_case: Any, setup: Any) -> Any:
        if cfg_case.user.user_type != "trained_model":
            if str(cfg_case.model).startswith("kkt-"):
                raise ConfigError(
                    f"case.user.user_type={cfg_case.user.user_type} is not possible for case.model={cfg_case.model}, "
                    "whose one output has no gradient of the cross-entropy; valid: trained_model."
                )
            return original(model, loss_fn, cfg_case, setup)
        from breaching.cases.data import construct_dataloader

        from .kkt.release import TrainedModelUser

        index = cfg_case.user.user_idx
        dataloader = construct_dataloader(cfg_case.data, cfg_case.impl, user_idx=index)
        return TrainedModelUser(model, loss_fn, dataloader, setup, index, cfg_case.user, cfg_case.training)

    return construct_user


def clean_data_of(user: Any, dtype: Any) -> dict[str, Any]:
    """Have a user keep its private data before a defence changes them; returns a dict that will hold `data`.

    Breaching's users with input noise write the noised images over the ones that they hand out as the truth, so a
    reconstruction would be compared with the defence's own output. Images also take the type of the model here, which
    Breaching leaves out.
    """
    kept: dict[str, Any] = {}
    load_data = getattr(user, "_load_data", None)
    if load_data is None:  # a user of users
        return kept

    def loaded(*args: Any, **kwargs: Any) -> Any:
        data = load_data(*args, **kwargs)
        key = user.data_key
        if data[key].is_floating_point():
            data[key] = data[key].to(dtype)
        kept["data"] = data[key].clone()
        return data

    user._load_data = loaded
    return kept


def _with_our_models(original: Callable) -> Callable:
    import ssl
    from http.client import HTTPException
    from urllib.error import URLError

    from .errors import unavailable_weights

    no_download = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)

    def failed(error: Exception) -> bool:  # other OSErrors, a full disk or a file of another owner, say what they are
        of_timm = type(error).__name__ == "LocalEntryNotFoundError"  # huggingface_hub's, which need not be there
        return isinstance(error, no_download) or of_timm

    def construct_vision_model(cfg_model: Any, cfg_data: Any, *args: Any, **kwargs: Any) -> Any:
        if not str(cfg_model).startswith("kkt-"):
            try:
                return original(cfg_model, cfg_data, *args, **kwargs)
            except Exception as error:
                if not failed(error):
                    raise
                raise unavailable_weights(cfg_model, error) from error
        from .kkt.models import build_network

        return build_network(str(cfg_model), cfg_data.shape)

    return construct_vision_model


def _with_our_datasets(original: Callable) -> Callable:
    def build_dataset_vision(cfg_data: Any, split: str, *args: Any, **kwargs: Any) -> Any:
        from .data import build_registered_dataset, is_registered_dataset, unavailable_dataset

        if is_registered_dataset(cfg_data.name):
            return build_registered_dataset(cfg_data, split)
        try:
            return original(cfg_data, split, *args, **kwargs)
        except (OSError, RuntimeError, ImportError) as error:  # URLError is an OSError, torchvision raises RuntimeError
            raise unavailable_dataset(cfg_data, error) from error

    return build_dataset_vision


def _with_our_partitions(original: Callable) -> Callable:
    def split_dataset_vision(
        dataset: Any, cfg_data: Any, user_idx: int | None = None, return_full_dataset: bool = False
    ) -> Any:
        from .data import PARTITIONS

        if cfg_data.partition in PARTITIONS and not return_full_dataset:
            return PARTITIONS[cfg_data.partition](dataset, cfg_data.default_clients, user_idx)
        return original(dataset, cfg_data, user_idx, return_full_dataset)

    return split_dataset_vision
