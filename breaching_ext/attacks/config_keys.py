"""Names of an attack's config keys: a slip of the pen is refused instead of being ignored; each error is one line."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import Any

import yaml
from omegaconf import OmegaConf

from ..errors import ConfigError, unknown
from ..values import check_number, check_switch, is_number

log = logging.getLogger(__name__)

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

#: Section of an attack's config ("" is its top) -> keys that are valid there. Sections that are not named are free.
ConfigKeys = Mapping[str, tuple[str, ...]]

_TOP = (
    *("type", "attack_type", "label_strategy", "text_strategy", "token_recovery", "objective", "restarts", "init"),
    *("normalize_gradients", "optim", "augmentations", "differentiable_augmentations", "regularization", "impl"),
)
_OPTIM = (
    *("optimizer", "signed", "step_size", "boxed", "max_iterations", "step_size_decay", "langevin_noise", "warmup"),
    *("grad_clip", "callback"),
)
_RESTARTS = ("num_trials", "parallel_candidates", "candidate_batching", "scoring", "output", "seed")
_IMPL = ("dtype", "mixed_precision", "JIT", "progress", "checkpoint_every", "checkpoint_path", "memory_budget")

#: Those of the joint attack.
JOINT_KEYS: ConfigKeys = {"": _TOP, "restarts": _RESTARTS, "optim": _OPTIM, "impl": _IMPL}
#: Those of MAGIA.
MAGIA_KEYS: ConfigKeys = {
    **JOINT_KEYS,
    "": (*_TOP, "subset", "image_prior", "pyramid"),
    "optim": (*_OPTIM, "inner_iterations", "history_size", "line_search", "label_scale"),
    "subset": (*("term", "alpha", "rescaling", "sel_mode", "sel_k", "sel_l_iter", "sig_a", "sig_b"), "redraw"),
    "image_prior": ("kind", "weight", "anneal_from", "relative", "chroma", "eps"),
    "pyramid": ("factors", "shares"),
}
#: Those of the attack on weights; `extraction` is checked where it is read.
KKT_KEYS: ConfigKeys = {
    "": (*_TOP, "extraction"),
    "restarts": ("num_trials", "scoring", "seed"),
    "optim": ("optimizer", "max_iterations"),
    "impl": ("dtype", "progress", "checkpoint_every", "checkpoint_path"),
}


def own_keys(attacker: Any) -> ConfigKeys | None:
    """Return the keys that an attack's class itself says; a subclass that says none may have any."""
    return vars(type(attacker)).get("config_keys")


def check_keys(cfg: Any, valid: ConfigKeys) -> None:
    """Check the names of an attack's keys; those that a config of Breaching's has are valid, too, wherever it has them.

    Args:
        cfg: an attack's config.
        valid: the keys.

    Raises:
        ConfigError: for the first that is unknown, or a section that is none. At the top, only names that are near a
            valid one are refused, and the log tells of others: values may refer to keys of one's own.
    """
    for section, keys in valid.items():
        part = cfg.get(section) if section else cfg
        if part is None and section not in JOINT_KEYS:
            continue  # all of it has defaults
        if not is_section(part):
            raise ConfigError(f"{section}={part} is not possible; valid: its keys {', '.join(keys)}.")
        for key in part:
            if key in keys or key in keys_of_breaching(section):
                continue
            if section or get_close_matches(str(key), keys, 1):
                raise unknown(f"{section} key".strip(), key, keys)
            log.warning("attack.%s is a key that this attack does not read.", key)  # others may refer to it: ${..n}


def is_section(part: Any) -> bool:
    """Whether a part of a config has keys of its own."""
    return OmegaConf.is_dict(part) or isinstance(part, Mapping)


def keys_of_breaching(section: str) -> set[str]:
    """Return the keys that any of Breaching's own attack configs has in a section ("": at its top)."""
    return _of_breaching().get(section, set())


@cache
def _of_breaching() -> dict[str, set[str]]:
    """Return the keys of all of Breaching's own attack configs, section by section."""
    found: dict[str, set[str]] = {"": set()}
    for file in resources.files("breaching.config.attack").iterdir():
        if file.name.endswith(".yaml"):
            content = yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER)  # OmegaConf's takes seconds for all
            found[""] |= {str(key) for key in content}
            for section, part in content.items():
                found.setdefault(str(section), set()).update(part if isinstance(part, dict) else ())
    return found


def check_option(key: str, value: Any, valid: Iterable[Any]) -> None:
    """Raise ConfigError where a value is none of the valid ones."""
    if value not in valid:
        raise unknown(key, value, valid)


def check_arguments(name: str, kind: Any, options: Mapping[str, Any], lists: bool = False) -> None:
    """Check a part of a config that a class takes as its keyword arguments: their names, and values by their defaults.

    Breaching's classes swallow every name (`**kwargs`) and ignore it; somebody else's that take any may read it.

    Args:
        name: the part's, for the error.
        kind: the class.
        options: the part.
        lists: whether a list may stand for a number, such as a size each way.

    Raises:
        ConfigError: for an unknown name, a value that is no number where the default is one, or no switch likewise.
    """
    known = {key: p for key, p in inspect.signature(kind.__init__).parameters.items() if key not in ("self", "setup")}
    named = {k: p.default for k, p in known.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    takes_any = len(named) < len(known) and not kind.__module__.startswith("breaching.")
    for key, value in options.items():
        if not takes_any:
            check_option(f"{name} key", key, named)
        if isinstance(named.get(key), bool):
            check_switch(f"{name}.{key}", value)
        elif is_number(named.get(key)) and not (lists and OmegaConf.is_list(value)):
            check_number(f"{name}.{key}", value)
