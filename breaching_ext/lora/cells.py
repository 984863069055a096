"""One cell of the ladder: what the server sees in it, what it makes of that, and what the attack makes of the result.

Every cell attacks the same client through the same function with the same starts; only what the server sees differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from .adapters import adapt, only_weights_of
from .case import Case
from .decode import Factors, completed, cosine, is_determined, minimum_norm, unseen
from .inversion import Inversion, invert
from .learned import RidgeDecoder
from .observation import FactorUpdate, Matrices, as_weights, factor_update, local_steps
from .settings import RANKLESS, Cell, Settings
from .whitening import whitened

__all__ = ["decode", "mean_public_gradient", "run_cell"]


def run_cell(cell: Cell, case: Case, settings: Settings, device: torch.device) -> tuple[dict[str, Any], torch.Tensor]:
    """Run one cell.

    Returns:
        Its row (the cell, the quality, and the gradient cosine after each stage), and the images (B, C, H, W).
    """
    attack = settings.attack
    if (cell.phase, cell.method) in RANKLESS:
        model = only_weights_of(case.model, case.adapted_layers)
        given = case.gradient if cell.phase == 0 else mean_public_gradient(case)
        found = invert(case, model, as_weights(model, given), attack, device=device)
        known = {"seen": 1.0} if cell.phase == 0 else {"seen": 0.0, "decoded": _cosine(given, case.gradient)}
        return _row(cell, found, known), found.images
    factors = case.factors(cell.rank, cell.start, settings.scale)
    seen = {name: gradient - unseen(gradient, factors[name]) for name, gradient in case.gradient.items()}
    cosines: dict[str, Any] = {"seen": _cosine(seen, case.gradient)}
    local = local_steps(settings.local_steps, settings.local_lr, case.client.labels) if cell.phase == 3 else None
    observed = factor_update(case.model, factors, case.client, local)
    if cell.method == "match":
        found = invert(case, observed.model, observed.tensors, attack, local, device)
    elif cell.method == "whiten":
        white = _whitened_update(case, observed)
        found = invert(case, white.model, white.tensors, attack, None, device)
    else:
        decoded, about = decode(case, observed, learned=cell.method == "learned")
        cosines |= {"decoded": _cosine(decoded, case.gradient), **about}
        cosines["layers"] = {name: cosine([decoded[name]], [case.gradient[name]]) for name in decoded}
        model = only_weights_of(case.model, case.adapted_layers)
        found = invert(case, model, as_weights(model, decoded), attack, None, device)
    return _row(cell, found, cosines), found.images


def decode(case: Case, observed: FactorUpdate, learned: bool = False) -> tuple[Matrices, dict[str, Any]]:
    """Return the estimate of every adapted layer's full gradient, (o, i), and what is known about it.

    Args:
        case: the model and the public photos; the client's data are not touched.
        observed: what the client sent.
        learned: predict what the closed form cannot determine.
    """
    factors, sent = observed.factors(case.adapted_layers), observed.matrices(case.adapted_layers)
    closed = {name: completed(*sent[name], factors[name], case.rows[name]) for name in sent}
    determined = {name: is_determined(factors[name], case.rows[name]) for name in sent}
    about: dict[str, Any] = {}
    if observed.local is None:  # the condition is one step's
        about["determined"] = sorted(name for name, yes in determined.items() if yes)
    if not learned or all(determined.values()):
        return closed, about
    gradients, held_out = case.public_gradients
    decoder = RidgeDecoder.fit(gradients, factors, held_out)
    predicted = decoder.complete({name: minimum_norm(*sent[name], factors[name]) for name in sent})
    about["decoder"] = {
        "kernel": decoder.kernel,
        "ridge": decoder.ridge,
        "public_cosine": decoder.held_out_cosine,
        "public_cosine_closed": decoder.closed_form_cosine,
    }
    return {name: closed[name] if determined[name] else predicted[name] for name in sent}, about


def mean_public_gradient(case: Case) -> Matrices:
    """Return the mean of the public gradients, each of unit norm: the estimate of a server that saw no update."""
    gradients, _ = case.public_gradients
    norms = torch.stack([stack.square().sum(dim=(1, 2)) for stack in gradients.values()]).sum(dim=0).sqrt()  # (n,)
    return {name: (stack / norms[:, None, None]).mean(dim=0) for name, stack in gradients.items()}


def _whitened_update(case: Case, observed: FactorUpdate) -> FactorUpdate:
    factors: Mapping[str, Factors] = observed.factors(case.adapted_layers)
    sent = observed.matrices(case.adapted_layers)
    white = {name: whitened(*sent[name], factors[name]) for name in sent}
    model = adapt(case.model, {name: parts[2] for name, parts in white.items()})
    tensors = {}
    for name, (grad_a, grad_b, _) in white.items():
        tensors[f"{name}.lora_A.default.weight"], tensors[f"{name}.lora_B.default.weight"] = grad_a, grad_b
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return FactorUpdate(model, [tensors[name].reshape(p.shape) for name, p in trainable], None)


def _cosine(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    return cosine([first[name] for name in second], list(second.values()))


def _row(cell: Cell, found: Inversion, cosines: dict[str, Any]) -> dict[str, Any]:
    quality = {key: value for key, value in asdict(found).items() if key != "images"}
    return {**asdict(cell), **quality, **{f"cosine_{k}" if isinstance(v, float) else k: v for k, v in cosines.items()}}
