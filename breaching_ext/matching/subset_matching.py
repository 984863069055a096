"""Values and gradients of MAGIA's objective for a whole stack of candidates, by vmap or one after another."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch

from ..errors import first_line
from ..out_of_memory import is_out_of_memory
from .build import BATCHING_MODES
from .client import draws
from .compilation import compiled
from .evaluation import Evaluate
from .magia_problem import SubsetTerm, Target
from .randomness import CandidateStreams
from .subset_objective import Evaluated, ImagePrior, SubsetObjective
from .tracing import SpecialisationError, replayed

log = logging.getLogger(__name__)

__all__ = ["SubsetMatching", "SubsetTerm", "Target"]

#: Largest batch for which 'auto' stacks candidates. On one CPU core (LeNet, 32×32, five candidates) stacking takes
#: 0.7 of the loop's time at B = 8 and 1.6 of it at B = 64, where convolutions with a kernel a candidate dominate.
STACK_UP_TO = 16

#: 'auto' compiles for at least this many evaluations, of all candidates together, where there is no subset term.
#: Compiling takes 10 to 25 s, and saves about a quarter of a stacked evaluation and a third to a half of a single one
#: (docs/magia.md). A fixed rule, so that a run can be repeated.
COMPILE_FROM = 16_000


class SubsetMatching:
    """The objective of N candidates, and its gradients in pixels and label logits.

    Args:
        target: what is matched.
        term: the subset term.
        prior: image prior of one candidate's pixels (B, C, H, W), to be weighted by the call's `prior_weight`.
        extra: a further term of one candidate's pixels that need not be transformable (group consistency).
        method: 'vmap' (all candidates at once; falls back to list with a warning where torch.func cannot transform the
            model or the loss), 'compile' (the same, compiled; falls back to vmap), 'list' (one after another with plain
            autograd) or 'auto'.
        evaluations: evaluations that the run will make, about; 'auto' compiles for long runs.
        first_size: size of the subsets at the run's first step, the one that is compiled for (each takes a while): a
            run that goes on at another size then takes the same form as the one it continues. None: the first to come.
    """

    def __init__(
        self,
        target: Target,
        term: SubsetTerm,
        prior: ImagePrior,
        extra: ImagePrior | None = None,
        method: str = "auto",
        evaluations: int = 0,
        first_size: int | None = None,
    ) -> None:
        if method not in BATCHING_MODES:
            raise ValueError(f"method={method!r} is unknown; valid: {', '.join(BATCHING_MODES)}.")
        self.target, self.term, self.extra, self.method = target, term, extra, method
        self._objective = SubsetObjective(target, term, prior)
        self.evaluations, self.first_size = evaluations, first_size
        self._compiles, self._stacks, self._has_compiled = True, True, False
        self._evaluations: dict[tuple, Evaluate] = {}
        self._may_draw = any(module.training for module in target.model.modules())
        if draws(target.model):
            self._one_by_one_because("the model's dropout is on, and every candidate needs random numbers of its own")

    def __call__(
        self,
        pixels: torch.Tensor,
        logits: torch.Tensor,
        subsets: torch.Tensor | None,
        prior_weight: float,
        streams: CandidateStreams | None = None,
    ) -> Evaluated:
        """Evaluate all candidates.

        Args:
            pixels: (N, B, C, H, W) in [0, 1].
            logits: (N, B, K).
            subsets: indices of each candidate's subset, (N, S); None where the term is 'none'.
            prior_weight: weight of the image prior.
            streams: what each candidate's model draws from (dropout that is on); None: the global generator.

        Returns:
            Values (N,), what points are ranked by (N,), which is the value without subset term and rescaling, and
            gradients in the pixels (N, B, C, H, W) and in the logits (N, B, K).
        """
        arguments = (pixels.detach(), logits.detach(), subsets, prior_weight, streams)
        values, rankings, in_pixels, in_logits = self._evaluate(*arguments)
        if self.extra is not None:
            added = torch.zeros_like(values)
            for n, candidate in enumerate(pixels.detach()):
                leaf = candidate.clone().requires_grad_()
                value = self.extra(leaf)
                if value.requires_grad:
                    in_pixels[n] += torch.autograd.grad(value, leaf)[0]
                    added[n] = value.detach()
            values, rankings = values + added, rankings + added
        return values, rankings, in_pixels, in_logits

    def _evaluate(self, *arguments: Any) -> Evaluated:
        method = self.chosen_method(arguments[0])
        if method == "list":
            return self._one_by_one(*arguments)
        try:
            return self._stacked(*arguments[:4])  # no model that draws is stacked
        except Exception as error:  # whatever a user's model or loss throws under torch.func
            if self._evaluations or is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {first_line(error)}"
        self._one_by_one_because(f"torch.func cannot transform this model or loss ({reason})")
        return self._one_by_one(*arguments)

    def _one_by_one_because(self, reason: str) -> None:
        self._stacks = False
        if self.method == "list":
            return
        level = logging.INFO if self.method == "auto" else logging.WARNING
        wording = "candidate_batching=%s: stepping the candidates one by one (list), because %s."
        log.log(level, wording, self.method, reason)

    def chosen_method(self, pixels: torch.Tensor) -> str:
        """'vmap', 'compile' or 'list' for a stack of that shape; 'auto' goes by what is faster on a CPU."""
        if not self._stacks:
            return "list"
        if self.method != "auto":
            return "vmap" if self.method == "compile" and not self._compiles else self.method
        alone, small = len(pixels) == 1, pixels.shape[1] <= STACK_UP_TO or pixels.device.type != "cpu"
        if not alone and not small:
            return "list"
        if len(pixels) * self.evaluations >= COMPILE_FROM and self.term.kind == "none":
            return "compile" if self._compiles else "vmap"
        return "list" if alone else "vmap"

    def _stacked(
        self, pixels: torch.Tensor, logits: torch.Tensor, subsets: torch.Tensor | None, prior_weight: float
    ) -> Evaluated:
        unused = pixels.new_zeros(len(pixels), 1, dtype=torch.long)
        index = unused if subsets is None or self.term.kind == "none" else subsets
        use = index is subsets
        weight = pixels.new_tensor(prior_weight)  # a tensor, so that one graph serves the whole annealing
        inputs = [pixels, logits, index, weight]
        key = (use, pixels.dtype, *(stack.shape for stack in inputs))
        evaluate = self._evaluations.get(key) or self._specialised(use, inputs)
        (in_pixels, in_logits), values, rankings = evaluate(*inputs)
        self._evaluations[key] = evaluate  # what has worked once
        return values, rankings, in_pixels, in_logits

    def _specialised(self, use: bool, inputs: list[torch.Tensor]) -> Evaluate:
        """The recorded form; for 'compile' the compiled one, of `first_size` alone."""
        evaluate = self._objective.evaluation(use)
        due = not self._has_compiled and (not use or inputs[2].shape[1] == (self.first_size or inputs[2].shape[1]))
        if due and self.chosen_method(inputs[0]) == "compile":
            self._has_compiled = True
            try:
                return compiled(evaluate, inputs)
            except SpecialisationError as error:
                self._compiles = False
                level = logging.INFO if self.method == "auto" else logging.WARNING
                log.log(level, "candidate_batching=%s: stepping by vmap, because %s.", self.method, error)
        return replayed(evaluate, inputs)

    def _one_by_one(
        self,
        pixels: torch.Tensor,
        logits: torch.Tensor,
        subsets: torch.Tensor | None,
        prior_weight: float,
        streams: CandidateStreams | None,
    ) -> Evaluated:
        results = []
        for n in range(len(pixels)):
            index = subsets[n] if subsets is not None and self.term.kind != "none" else None
            with streams.use(n) if streams is not None and self._may_draw else nullcontext():
                results.append(self._objective.of_candidate(n, pixels[n], logits[n], index, prior_weight))
        values, rankings, in_pixels, in_logits = (torch.stack(column) for column in zip(*results, strict=True))
        return values, rankings, in_pixels, in_logits
