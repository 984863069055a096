"""Errors that name what is wrong and what to do. All are ValueErrors, so existing handlers keep working."""

from __future__ import annotations

from collections.abc import Iterable


class BreachingExtError(ValueError):
    """Base class of every error that this package raises on purpose."""


class ConfigError(BreachingExtError):
    """A configuration value that cannot work."""


class SharedDataError(BreachingExtError):
    """Gradients, labels or metadata that do not fit the model or the attack."""


class DatasetUnavailableError(BreachingExtError):
    """A dataset that is neither on disk nor downloadable."""


def unknown(key: str, value: object, valid: Iterable[object]) -> ConfigError:
    """Return the one error used for every unknown option: it names the key, the value and the valid ones."""
    return ConfigError(f"Unknown {key}={value!r}; valid: {', '.join(str(v) for v in valid)}.")


def first_line(error: BaseException) -> str:
    """Return the start of an error's message, for a line that names it."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else "no message"


def unavailable_weights(model: object, error: Exception) -> DatasetUnavailableError:
    """Return the error for a model's pretrained weights that cannot be downloaded."""
    return DatasetUnavailableError(
        f"case.model={model}: its pretrained weights are not at hand and not downloadable here "
        f"({type(error).__name__}: {first_line(error)}). Put them into $TORCH_HOME/hub/checkpoints, or set "
        "case.server.pretrained=false."
    )
