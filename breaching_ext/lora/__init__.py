"""The LoRA gradient bridge: what a client that shares adapter updates still gives away of its full gradient.

From the full gradient (Phase 0) over the factors' gradients (Phases 1 and 2) to the change over K local steps (Phase
3), with one attack throughout, :class:`~breaching_ext.attacks.JointCandidateAttacker`. See docs/lora.md. The formulas
(`decode`, `whitening`) need no peft; adapting a model does (`pip install 'breaching-ext[lora]'`). Names are imported
when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Batch": "observation",
    "Case": "case",
    "Cell": "settings",
    "FactorUpdate": "observation",
    "Factors": "decode",
    "MODELS": "models",
    "MissingPeftError": "adapters",
    "RidgeDecoder": "learned",
    "Settings": "settings",
    "SmallConv": "models",
    "SmallViT": "models",
    "adapt": "adapters",
    "as_weights": "observation",
    "build_model": "models",
    "completed": "decode",
    "determines": "decode",
    "factor_gradients": "decode",
    "factor_update": "observation",
    "factors_of": "adapters",
    "full_gradient": "observation",
    "is_determined": "decode",
    "low_rank_sketch": "decode",
    "local_steps": "observation",
    "minimum_norm": "decode",
    "only_weights_of": "adapters",
    "row_counts": "adapters",
    "run_ladder": "ladder",
    "whitened": "whitening",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
