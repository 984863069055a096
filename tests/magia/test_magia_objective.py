"""The objective against a straightforward version that adds up single images with plain autograd."""

from __future__ import annotations

import dataclasses
import functools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from breaching_ext.matching import subset_matching
from breaching_ext.matching.compiled_engine import compiled
from breaching_ext.matching.magia_objective import full_term, rescaling, subset_term
from breaching_ext.matching.subset_matching import SubsetMatching, SubsetTerm, Target
from breaching_ext.matching.tracing import SpecialisationError
from breaching_ext.regularizers.color_tv import anisotropic_total_variation, color_total_variation

B, K, S = 4, 5, 2
KINDS = ("none", "released", "mean", "residual")


class Net(torch.nn.Module):
    """Small, smooth, with a convolution and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, stride=2)
        self.head = torch.nn.Linear(4 * 9, K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.sigmoid(self.conv(x)).flatten(1))


def setting(seed: int = 0, n: int = 3, per_candidate: bool = False):
    """Target, true pixels and label logits, candidates (N, B, 3, 8, 8) and (N, B, K), subsets (N, S)."""
    torch.manual_seed(seed)
    models = [Net().double() for _ in range(n if per_candidate else 1)]
    x, labels = torch.rand(B, 3, 8, 8).double(), torch.randint(K, (B,))
    soft = torch.nn.functional.one_hot(labels, K).double() * 40  # softmax of it is one-hot to rounding
    loss_fn = torch.nn.CrossEntropyLoss()
    gradients = [torch.autograd.grad(loss_fn(m(x), soft.softmax(-1)), list(m.parameters())) for m in models]
    parameters = [{k: p.detach() for k, p in m.named_parameters()} for m in models]
    if per_candidate:
        stacked = {k: torch.stack([p[k] for p in parameters]) for k in parameters[0]}
        columns = [torch.stack(g) for g in zip(*gradients, strict=True)]
    else:
        stacked, columns = parameters[0], list(gradients[0])
    target = Target(models[0], loss_fn, stacked, columns, per_candidate)
    pixels, logits = torch.rand(n, B, 3, 8, 8).double(), torch.randn(n, B, K).double()
    subsets = torch.stack([torch.randperm(B)[:S] for _ in range(n)])
    return target, x, soft, pixels, logits, subsets


def single_gradients(target: Target, n: int, pixels: torch.Tensor, logits: torch.Tensor) -> list[list[torch.Tensor]]:
    """Gradient of the loss of every image by itself: [image][parameter tensor]."""
    parameters, _ = target.of(n)
    leaves = {k: p.clone().requires_grad_() for k, p in parameters.items()}
    found = []
    for x, y in zip(pixels, logits, strict=True):
        out = torch.func.functional_call(target.model, leaves, (x[None],))
        loss = -(y.softmax(-1) * out[0].log_softmax(-1)).sum()
        found.append(list(torch.autograd.grad(loss, list(leaves.values()), create_graph=True)))
    return found


def slow(target, n, pixels, logits, subset, term: SubsetTerm, prior_weight: float) -> torch.Tensor:
    """The objective of one candidate, written from the formulas in sums over images."""
    each = single_gradients(target, n, pixels, logits)
    _, shared = target.of(n)
    size, inside = len(subset), set(subset.tolist())
    full, sub = 0, 0
    for layer, goal in enumerate(shared):
        mean = sum(g[layer] for g in each) / B
        full = full + ((mean - goal) ** 2).sum()
        part = sum(each[i][layer] for i in inside)
        others = sum((each[i][layer].detach() for i in range(B) if i not in inside), torch.zeros_like(goal))
        if term.kind == "released":
            sub = sub + ((part / size / size - goal / B) ** 2).mean()
        elif term.kind == "mean":
            sub = sub + ((part / size - goal) ** 2).sum()
        elif term.kind == "residual":
            sub = sub + ((part / size - (B * goal - others) / size) ** 2).sum()
    prior = prior_weight * anisotropic_total_variation(pixels)
    if term.kind == "none":
        return full + prior
    factor = {"none": 1.0, "ratio": size / B, "variance": (B - size) / (size * (B - 1))}.get(term.rescaling)
    factor = term.rescaling if factor is None else factor
    return factor * (term.alpha * full + (1 - term.alpha) * sub) + prior


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch):
    """Trace and check as in a real compilation, without generating code."""
    monkeypatch.setattr(subset_matching, "compiled", functools.partial(compiled, backend="aot_eager"))


@pytest.mark.parametrize("candidates", [1, 2])
@pytest.mark.parametrize("method", ["vmap", "list"])
@pytest.mark.parametrize("per_candidate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_equal_the_slow_version(kind, per_candidate, method, candidates):
    target, _, _, pixels, logits, subsets = setting(n=candidates, per_candidate=per_candidate)
    # A factor is a number in the recorded graph; recording one for each would only take time.
    for factor in ("none", "ratio", "variance", 2.5) if method == "list" else ("ratio",):
        term = SubsetTerm(kind, alpha=0.3, rescaling=factor)
        matching = SubsetMatching(target, term, anisotropic_total_variation, method=method)
        values, _, in_pixels, in_logits = matching(pixels, logits, subsets, 0.07)
        for n in range(len(pixels)):
            x, y = pixels[n].clone().requires_grad_(), logits[n].clone().requires_grad_()
            value = slow(target, n, x, y, subsets[n], term, 0.07)
            expected = torch.autograd.grad(value, [x, y])
            torch.testing.assert_close(values[n], value.detach(), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(in_pixels[n], expected[0], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(in_logits[n], expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["vmap", "compile"])
def test_one_graph_serves_every_prior_weight_and_one_more_every_size_of_subset(method):
    target, _, _, pixels, logits, _ = setting()
    matching = SubsetMatching(target, SubsetTerm("residual", alpha=0.3), anisotropic_total_variation, method=method)
    plain = SubsetMatching(target, SubsetTerm("residual", alpha=0.3), anisotropic_total_variation, method="list")
    for size, weight in ((S, 0.5), (S, 0.01), (S - 1, 0.5)):
        subsets = torch.stack([torch.randperm(B)[:size] for _ in pixels])
        for one, other in zip(*(m(pixels, logits, subsets, weight) for m in (matching, plain)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert len(matching._evaluations) == 2


def test_what_cannot_be_compiled_is_stepped_by_vmap_with_one_warning(monkeypatch, caplog):
    def refuse(*_args):
        raise SpecialisationError("torch.compile failed (for the test)")

    monkeypatch.setattr(subset_matching, "compiled", refuse)
    target, _, _, pixels, logits, _ = setting()
    results = [
        SubsetMatching(target, SubsetTerm(), anisotropic_total_variation, method=method)(pixels, logits, None, 0.1)
        for method in ("compile", "vmap")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert next(r.message for r in caplog.records if "for the test" in r.message).startswith(
        "candidate_batching=compile"
    )


def gradient_lists(n_layers: int = 3) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, 3), (5,), (2, 2, 2)][:n_layers]
    return tuple([torch.randn(s, generator=generator).double() for s in shapes] for _ in range(3))


def test_subset_terms_at_full_size():
    """At S = B the subset is the batch: `mean` and `residual` are the full term, `released` a weighted one."""
    batch, _, goal = gradient_lists()
    full = full_term(batch, goal)
    torch.testing.assert_close(subset_term("mean", batch, batch, goal, B, B), full)
    torch.testing.assert_close(subset_term("residual", batch, batch, goal, B, B), full)
    weighted = sum(((g - t) ** 2).sum() / (g.numel() * B**2) for g, t in zip(batch, goal, strict=True))
    torch.testing.assert_close(subset_term("released", batch, batch, goal, B, B), weighted)


def test_residual_has_the_value_of_the_scaled_full_term():
    batch, subset, goal = gradient_lists()
    value = subset_term("residual", subset, batch, goal, S, B)
    torch.testing.assert_close(value, (B / S) ** 2 * full_term(batch, goal))


@pytest.mark.parametrize(("kind", "stationary"), [("residual", True), ("mean", False), ("released", False)])
def test_which_subset_terms_are_stationary_at_the_truth(kind, stationary):
    target, x, soft, _, _, subsets = setting()
    matching = SubsetMatching(target, SubsetTerm(kind, alpha=0.0), anisotropic_total_variation, method="list")
    _, _, in_pixels, _ = matching(x[None], soft[None], subsets[:1], 0.0)
    assert (in_pixels.abs().max() < 1e-12) == stationary


def test_residual_moves_only_the_subset():
    target, _, _, pixels, logits, subsets = setting(n=1)
    matching = SubsetMatching(target, SubsetTerm("residual", alpha=0.0), anisotropic_total_variation, method="list")
    _, _, in_pixels, _ = matching(pixels, logits, subsets, 0.0)
    moved = in_pixels[0].flatten(1).abs().amax(dim=1) > 0
    assert set(moved.nonzero().flatten().tolist()) == set(subsets[0].tolist())


@given(st.integers(2, 64).flatmap(lambda b: st.tuples(st.integers(1, b), st.just(b))))
def test_rescaling_formulas(sizes):
    s, b = sizes
    assert rescaling("none", s, b) == 1
    assert rescaling("ratio", s, b) == pytest.approx(math.comb(b - 1, s - 1) / math.comb(b, s))
    exact = Fraction(b - s, s * (b - 1)) if s < b else Fraction(1, b * (b - 1))
    assert rescaling("variance", s, b) == pytest.approx(float(exact))
    assert rescaling("variance", s, b) > 0
    assert rescaling(0.25, s, b) == 0.25


def test_rescaling_of_a_single_image_is_one():
    assert {rescaling(kind, 1, 1) for kind in ("none", "ratio", "variance")} == {1.0}


def test_variance_is_that_of_a_mean_without_replacement():
    """Over all subsets of size S, Var(mean) / Var(one) is the formula."""
    values, s = torch.tensor([0.3, -1.0, 2.2, 0.9, 4.0], dtype=torch.float64), 2
    pairs = torch.combinations(values, s).mean(dim=1)
    ratio = pairs.var(unbiased=False) / values.var(unbiased=False)
    assert ratio.item() == pytest.approx(rescaling("variance", s, len(values)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "quadratic"}, "released, mean, residual"),
        ({"alpha": 1.5}, r"alpha=1.5 .*0 to 1"),
        ({"alpha": -0.1}, r"alpha=-0.1"),
        ({"rescaling": "binomial"}, "none, ratio, variance"),
        ({"rescaling": 0.0}, "positive"),
        ({"rescaling": float("nan")}, "positive"),
    ],
)
def test_bad_options_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        SubsetTerm(**options)


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match="list, vmap, compile"):
        SubsetMatching(setting()[0], SubsetTerm(), anisotropic_total_variation, method="jit")


def test_color_tv_is_the_coupled_norm_when_colours_weigh_the_same():
    x = torch.rand(2, 3, 6, 7, dtype=torch.float64)
    down, across = torch.zeros_like(x), torch.zeros_like(x)
    down[..., :-1, :], across[..., :-1] = x.diff(dim=-2), x.diff(dim=-1)
    coupled = ((down.square() + across.square()).sum(dim=1) / 3 + 0.02**2).sqrt().mean()
    torch.testing.assert_close(color_total_variation(x, chroma=1.0, eps=0.02), coupled)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.floats(0, 10))
def test_total_variations_take_any_shape_and_vanish_on_flat_images(channels, height, width, chroma):
    flat = torch.full((2, channels, height, width), 0.3, dtype=torch.float64)
    assert color_total_variation(flat, chroma, eps=0.0).item() == 0
    assert anisotropic_total_variation(flat).item() == 0
    noisy = flat + torch.rand(flat.shape, dtype=torch.float64)
    edges = height > 1 or width > 1
    assert (anisotropic_total_variation(noisy).item() > 0) == edges
    assert (color_total_variation(noisy, chroma, eps=0.0).item() > 0) == edges


def test_color_tv_charges_colour_edges_more_than_grey_ones():
    step = torch.zeros(1, 3, 4, 4)
    grey, colour = step.clone(), step.clone()
    grey[..., 2:] = 1.0
    colour[:, 0, :, 2:], colour[:, 1, :, 2:] = 1.0, -1.0
    assert color_total_variation(colour, 5.0) > color_total_variation(colour, 1.0)
    assert color_total_variation(grey, 5.0) == color_total_variation(grey, 1.0)


@pytest.mark.parametrize(
    ("candidates", "batch", "evaluations", "kind", "expected"),
    [
        (1, 4, 10_000, "none", "list"),
        (8, 32, 10_000, "none", "list"),
        (8, 4, 100, "none", "vmap"),
        (2, 4, 7_000, "none", "vmap"),
        (8, 4, 10_000, "mean", "vmap"),  # sizes of subsets change, and each would be compiled
        (8, 4, 10_000, "none", "compile"),
        (1, 32, 16_000, "none", "compile"),  # no stack whose convolutions would have a kernel a candidate
    ],
)
def test_auto_follows_a_fixed_rule(candidates, batch, evaluations, kind, expected):
    made = SubsetMatching(setting()[0], SubsetTerm(kind), anisotropic_total_variation, evaluations=evaluations)
    assert made.chosen_method(torch.zeros(candidates, batch, 1, 1, 1)) == expected


def test_auto_that_cannot_compile_takes_vmap_without_a_warning(monkeypatch, caplog):
    def refuse(*_args):
        raise SpecialisationError("torch.compile failed (for the test)")

    monkeypatch.setattr(subset_matching, "compiled", refuse)
    target, _, _, pixels, logits, _ = setting(n=4)
    made = SubsetMatching(target, SubsetTerm(), anisotropic_total_variation, evaluations=10_000)
    assert made.chosen_method(pixels) == "compile"
    made(pixels, logits, None, 0.1)
    assert made.chosen_method(pixels) == "vmap"
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


class Looking(torch.nn.Module):
    """What it does depends on a number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum().item() > -1e9 else -x


@pytest.mark.parametrize(("method", "level"), [("auto", "INFO"), ("vmap", "WARNING"), ("compile", "WARNING")])
def test_a_model_that_torch_func_cannot_transform_goes_one_by_one(method, level, caplog):
    """One that looks at numbers, say."""
    target, _, _, pixels, logits, subsets = setting()
    drawn = dataclasses.replace(target, model=torch.nn.Sequential(Looking(), target.model))
    drawn = dataclasses.replace(drawn, parameters={f"1.{name}": p for name, p in target.parameters.items()})
    made = SubsetMatching(drawn, SubsetTerm(), anisotropic_total_variation, method=method)
    slow_one = SubsetMatching(drawn, SubsetTerm(), anisotropic_total_variation, method="list")
    with caplog.at_level("INFO", "breaching_ext"):
        for _ in range(2):
            torch.manual_seed(3)
            found = made(pixels, logits, subsets, 0.1)
            torch.manual_seed(3)
            for one, other in zip(found, slow_one(pixels, logits, subsets, 0.1), strict=True):
                assert torch.equal(one, other)
    said = [r for r in caplog.records if "one by one (list), because torch.func cannot" in r.message]
    assert [r.levelname for r in said] == [level]
    assert made.chosen_method(pixels) == "list"


def test_a_run_that_goes_on_compiles_what_the_first_process_compiled(monkeypatch):
    """With sizes that change, the one of the run's first step is compiled, not the first that a process sees."""
    made_for = []
    monkeypatch.setattr(
        subset_matching, "compiled", lambda evaluate, inputs: made_for.append(inputs[2].shape[1]) or evaluate
    )
    target, _, _, pixels, logits, subsets = setting()
    sizes = (1, subsets.shape[1])
    for order in (sizes, sizes[::-1]):
        made = SubsetMatching(
            target, SubsetTerm("residual"), anisotropic_total_variation, method="compile", first_size=sizes[0]
        )
        for size in order:
            made(pixels, logits, subsets[:, :size], 0.1)
    assert made_for == [1, 1]
