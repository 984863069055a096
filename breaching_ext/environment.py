"""What a result depends on besides its config: device, seed, kernels, versions. Set here, and named for the record."""

from __future__ import annotations

import platform
import random
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from .errors import ConfigError, first_line
from .ranks import local_device, local_processes

_made_deterministic = False


def resolve_device(name: str) -> torch.device:
    """Return the device for `auto` (CUDA, then the CPU) or a torch device name.

    Raises:
        ConfigError: when the device does not exist here.
    """
    if not isinstance(name, str):
        raise ConfigError(f"device={name} is not possible; valid: auto, cpu, cuda, cuda:N, mps.")
    if local_processes() > 1 and name.startswith("cuda:"):
        raise ConfigError(f"device={name} under torchrun is one GPU for all processes; valid: cuda, auto, cpu.")
    if name == "auto":
        return local_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = local_device(torch.device(name))
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it has shapes and no values")
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device={name} cannot be used here ({first_line(error)}); valid: auto, cpu, cuda, cuda:N, mps."
        ) from error
    return device


def choose_kernels(impl: Any) -> None:
    """Set what Breaching's own start sets: whether kernels are chosen by timing, and whether they are repeatable."""
    global _made_deterministic
    torch.backends.cudnn.benchmark = bool(impl.benchmark)
    _convolve_in_full_precision()
    if impl.deterministic:
        from breaching.utils import set_deterministic

        set_deterministic()
    elif _made_deterministic:  # for an earlier job of this process
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    _made_deterministic = bool(impl.deterministic)


def _convolve_in_full_precision() -> None:
    """Switch off the ten-bit products that CUDA takes for convolutions: objective and gradient would be 1e-3 off."""
    convolutions: Any = getattr(torch.backends.cudnn, "conv", None)
    if not torch.cuda.is_available():
        return
    torch.backends.cudnn.allow_tf32 = False  # the newer switch by itself makes reading this one an error
    if getattr(convolutions, "fp32_precision", "none") not in ("none", "ieee"):  # a setting for all of torch
        convolutions.fp32_precision = "ieee"


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("breaching-ext", "breaching", "torch", "torchvision", "hydra-core", "scikit-image", "lpips"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # breaching-ext run from a source tree
            found[package] = "source tree" if package == "breaching-ext" else "not installed"
    return found


def describe_device(device: torch.device) -> str:
    """Return the device with the hardware's name where torch knows it."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"


def overrides() -> list[str]:
    """Return what was changed on the command line of this Hydra job, as it was written; nothing outside of one."""
    if not HydraConfig.initialized():
        return []
    # unresolved: `seed=${attack.restarts.num_trials}` refers to the run's config, not to Hydra's own
    task = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return [str(override) for override in task or ()]
