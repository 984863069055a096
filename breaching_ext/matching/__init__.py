"""The matching engine: one step of every candidate at once.

An engine owns the candidates and their optimizers and knows nothing of attacks, group terms or selection:

- `ListEngine` steps them one after another through Breaching's own closure: any model, any objective;
- `VmapEngine` evaluates the whole stack with torch.func, with the same values;
- `CompiledEngine` compiles that evaluation, and all that a step does after it, with torch.compile.

`choose_engine` picks one, checks it against the slow path on the first candidate, and says in the log why it falls
back.
"""

from .build import BATCHING_MODES, choose_engine
from .compiled_engine import CompiledEngine
from .engine import CandidateEngine, StepResult
from .list_engine import ListEngine
from .vmap_engine import VmapEngine

__all__ = [
    "BATCHING_MODES",
    "CandidateEngine",
    "CompiledEngine",
    "ListEngine",
    "StepResult",
    "VmapEngine",
    "choose_engine",
]
