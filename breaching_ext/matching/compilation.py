"""torch.compile for functions whose arguments never change their shapes, checked against the eager form."""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from ..errors import first_line
from ..out_of_memory import is_out_of_memory
from .compile_time import on_a_second_core
from .evaluation import Evaluate
from .tracing import TOLERANCE, SpecialisationError, between, results

log = logging.getLogger(__name__)

#: Compiled code calls torch's operators from C++, not from Python, and is two files instead of one a kernel: a step of
#: ResNet20 takes a tenth less, and compiling it a third less. The file with the calls is optimised less: quick.
_FROM_CPP = {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}
#: How everything is compiled: for one shape, and whole or not at all. Where a model makes torch break its graph, the
#: parts run one by one under torch.func, which takes longer than the replay.
_WHOLE: dict[str, Any] = {"dynamic": False, "fullgraph": True}
#: What compiled code need not look at in every call: its arguments are checked before.
_LEAN = {"size_asserts": False, "alignment_asserts": False}
#: Calls until a CUDA graph is replayed: torch runs the first as it is, records the second, and replays from the third.
UNTIL_REPLAYED = 3
#: Points a rounding away at which compiled and eager results are compared where they differ at the start.
BESIDE = 3
#: How many times what a rounding does results may differ, and to what they must agree however much it does.
MOVES, MOST_MOVED = 3.0, 0.05
#: Names under which compiled functions take what may come in another shape or layout.
ARGUMENTS = ("stacks", "gradients")


def compiled(evaluate: Evaluate, stacks: list[torch.Tensor], backend: str = "inductor") -> Evaluate:
    """Return an evaluation compiled for stacks of these shapes.

    Raises:
        SpecialisationError: when torch cannot compile it, or the result differs.
    """
    cuda_graphs = stacks[0].device.type == "cuda" and backend == "inductor"
    try:
        function = compile_once(evaluate, backend, stacks[0].device, cuda_graphs)
        if cuda_graphs:
            function = _with_own_results(function)
        difference, allowed = _checked(function, evaluate, stacks, UNTIL_REPLAYED if cuda_graphs else 1)
    except Exception as error:  # dynamo and inductor raise what they like; the eager engine still works
        raise SpecialisationError(f"torch.compile failed ({type(error).__name__}: {first_line(error)})") from error
    if difference > allowed:
        raise SpecialisationError(f"the compiled evaluation differs from the eager one by {difference:.1e}")
    return function


def _checked(function: Evaluate, evaluate: Evaluate, stacks: list[torch.Tensor], times: int) -> tuple[float, float]:
    """Return the worst of several calls, its difference and what that may be: each may run in another way, and fail."""
    calls = [_difference(function, evaluate, stacks) for _ in range(times)]
    return max(calls, key=lambda found: found[0] - found[1])


def _difference(function: Evaluate, evaluate: Evaluate, stacks: list[torch.Tensor]) -> tuple[float, float]:
    """Return how much a candidate's results differ at most, and how much they may.

    Beside a kink of the model (ReLU, maximum) a rounding changes the gradient, and compiled code rounds otherwise.
    Where candidates differ, they are compared at points a rounding away, too, of which the best counts. Models with
    many activations have kinks everywhere, so the difference may be a few times what such a rounding does to the
    eager form: compiled code rounds in every layer.
    """
    tolerance = TOLERANCE.get(stacks[0].dtype, 1e-2)
    expected = results(evaluate, stacks)
    least = between(results(function, stacks), expected)
    moves = torch.zeros_like(least)
    for draw in range(BESIDE):
        if bool((least <= tolerance).all()):
            break
        beside = [moved_by_rounding(stack, draw) for stack in stacks]
        expected_beside = results(evaluate, beside)
        least = torch.minimum(least, between(results(function, beside), expected_beside))
        moves = torch.maximum(moves, between(expected_beside, expected))
    return least.max().item(), max(tolerance, min(MOVES * moves.max().item(), MOST_MOVED))


def moved_by_rounding(stack: torch.Tensor, draw: int) -> torch.Tensor:
    """Return the stack with every entry moved up or down by one rounding; `draw` seeds the signs. Indices stay."""
    if not stack.is_floating_point():
        return stack
    generator = torch.Generator().manual_seed(draw)
    signs = torch.randint(0, 2, stack.shape, generator=generator).to(stack) * 2 - 1
    return stack * (1 + torch.finfo(stack.dtype).eps * signs)


def compile_once(
    function: Callable[..., Any],
    backend: str = "inductor",
    device: torch.device | None = None,
    cuda_graphs: bool = False,
) -> Callable:
    """Return torch.compile's form of a function that will see arguments of one shape and dtype only.

    torch keeps what it compiled with the function's code and compiles at most a handful of forms of it; then it gives
    up and runs eagerly. Every engine has closures of its own, so each gets a copy of the code. What the closures hold
    does not change while an engine lives, so only the arguments (`ARGUMENTS`) are looked at again in every call.
    """
    if backend != "inductor":
        return torch.compile(_with_own_code(function), backend=backend, **_WHOLE)
    if cuda_graphs:
        return torch.compile(_with_own_code(function), mode="reduce-overhead", **_WHOLE)
    plain: dict[str, Any] = {**_known(_LEAN), "guard_filter_fn": _arguments_only}
    forms = [plain]
    helped: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    if device is None or device.type == "cpu":
        options = options_on_a_cpu()
        forms.insert(0, {**plain, **options})
        helped = partial(on_a_second_core, options)

    def form(options: dict[str, Any]) -> Callable[..., Any]:
        return torch.compile(_with_own_code(function), options=options, **_WHOLE)

    return FirstThatWorks([partial(form, options) for options in forms], helped)


def options_on_a_cpu() -> dict[str, bool]:
    """Return what compiled code for a CPU is compiled with, as far as this torch knows it."""
    return _known(_FROM_CPP)


def _known(options: dict[str, bool]) -> dict[str, bool]:
    known = torch._inductor.list_options()
    return {name: value for name, value in options.items() if name in known}


class FirstThatWorks:
    """Forms of one function, of which the first call takes the first that does not fail; later calls take that one.

    Args:
        forms: each makes a form, in the order in which they are tried.
        helped: what a first call, which compiles, runs in.
    """

    def __init__(
        self,
        forms: Sequence[Callable[[], Callable[..., Any]]],
        helped: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self._forms, self._helped = forms, helped
        self._function: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Call it; the last form's error is raised where all fail."""
        if self._function is not None:
            return self._function(*arguments)
        *others, last = self._forms
        for form in others:
            try:
                return self._tried(form, arguments)
            except Exception as error:
                if is_out_of_memory(error):  # another form would take as much
                    raise
                log.debug("Compiling in another way (%s: %s).", type(error).__name__, first_line(error))
        return self._tried(last, arguments)

    def _tried(self, form: Callable[[], Callable[..., Any]], arguments: tuple) -> Any:
        function = form()
        with _without_advice(), self._helped():
            result = function(*arguments)
        self._function = function
        return result


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Keep to itself that no CUDA was found, which torch says when it compiles for a CPU where it expected a GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    if isinstance(function, types.MethodType):
        return types.MethodType(_with_own_code(function.__func__), function.__self__)
    if not isinstance(function, types.FunctionType):
        return function
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def _arguments_only(guards: Sequence[Any]) -> list[bool]:
    """Keep the checks of tensors that are handed in; drop those of the closures, which are fixed.

    Another shape, type or layout is compiled anew. A filter sees the names of arguments as they are written.
    """
    arguments = tuple(f"{name}[" for name in ARGUMENTS)
    return [guard.guard_type == "TENSOR_MATCH" and guard.name.startswith(arguments) for guard in guards]


def _with_own_results(function: Evaluate) -> Evaluate:
    """Copy the results out of a CUDA graph's memory, which its next replay overwrites."""

    def run(*stacks: torch.Tensor) -> tuple:
        torch.compiler.cudagraph_mark_step_begin()
        gradients, values, task_losses = function(*stacks)
        return [g.clone() for g in gradients], values.clone(), task_losses.clone()

    return run
