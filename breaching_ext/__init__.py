"""Plugin package for Breaching: joint-candidate, label-free and weight-based reconstruction attacks.

Importing this package imports neither torch nor Breaching; both come with the first name that needs them.

    import breaching_ext
    breaching_ext.register()     # Breaching's prepare_attack and lookups now know the attacks of this package
    breaching_ext.unregister()   # and now they do not

With the package installed, `register()` happens by itself as soon as Breaching reads a config through Hydra.
"""

from __future__ import annotations

import importlib
from typing import Any

from .registration import register, unregister

__version__ = "0.1.0"

_LAZY = {
    "JointCandidateAttacker": "attacks",
    "KKTAttacker": "attacks",
    "MagiaAttacker": "attacks",
    "GroupRegularization": "regularizers",
    "subset_size": "selection",
}

__all__ = [
    "GroupRegularization",
    "JointCandidateAttacker",
    "KKTAttacker",
    "MagiaAttacker",
    "__version__",
    "register",
    "subset_size",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
