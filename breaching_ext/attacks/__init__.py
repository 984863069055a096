"""Attacks, one a file; each is a subclass of Breaching's OptimizationBasedAttacker."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .observation import observe

if TYPE_CHECKING:
    from .joint_candidates import JointCandidateAttacker
    from .kkt import KKTAttacker
    from .magia import MagiaAttacker

_HOME = {"JointCandidateAttacker": "joint_candidates", "KKTAttacker": "kkt", "MagiaAttacker": "magia"}

__all__ = ["JointCandidateAttacker", "KKTAttacker", "MagiaAttacker", "observe"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
