"""Group consistency: its gradient, its warm-up, and the aligners."""

from __future__ import annotations

import pytest
import torch
from cases import attack_config, build_model, loss, observed, photos
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from breaching_ext.attacks import JointCandidateAttacker
from breaching_ext.attacks.candidate_choice import Target
from breaching_ext.errors import ConfigError
from breaching_ext.regularizers import ALIGNERS, AnyChannelTotalVariation, GroupRegularization, align, aligners
from breaching_ext.regularizers.group import registered_consensus

SETUP = {"dtype": torch.float64, "device": torch.device("cpu")}


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 3, st.integers(1, 6), st.integers(1, 6)),
    scale=st.floats(1e-3, 10),
    seed=st.integers(0, 999),
)
def test_gradient_is_the_analytic_one_with_the_consensus_held_fixed(shape, scale, seed):
    candidates = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    candidates.requires_grad_()
    group = GroupRegularization(SETUP, scale=scale)
    group.update(candidates, 0)
    total = sum(group(candidate) for candidate in candidates)
    (gradient,) = torch.autograd.grad(total, candidates)
    consensus = candidates.detach().mean(dim=0)
    expected = 2 * scale * (candidates.detach() - consensus) / consensus.numel()
    assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-14)


def test_warm_up_and_update_every_are_exact():
    group = GroupRegularization(SETUP, scale=1.0, warmup_iters=3, update_every=2)
    values, consensus = [], []
    for iteration in range(7):
        stack = torch.full((2, 1, 1, 2, 2), float(iteration), dtype=torch.float64)
        group.update(stack, iteration)
        values.append(group(stack[0] + 1).item())
        consensus.append(group.consensus.mean().item() if group.active else None)
    assert values[:3] == [0, 0, 0]
    assert consensus == [None, None, None, 3, 3, 5, 5]
    assert values[3:] == [1, 4, 1, 4]


def test_a_new_attack_forgets_the_old_consensus():
    group = GroupRegularization(SETUP, scale=1.0)
    group.update(torch.ones(2, 1, 1, 2, 2), 0)
    group.initialize([], [], None)
    assert not group.active
    assert group(torch.zeros(1, 1, 2, 2)).item() == 0


@pytest.mark.parametrize("batching", ["list", "vmap"])
def test_warm_up_in_the_attack(batching):
    """Until the warm-up ends, a run with the group term equals one without; the next step differs."""
    model = build_model("own")
    payload, shared, *_ = observed(model)

    def run(scale: float, iterations: int) -> torch.Tensor:
        overrides = [
            f"regularization.group_regularization.scale={scale}",
            "regularization.group_regularization.warmup_iters=4",
            f"restarts.candidate_batching={batching}",
            "restarts.num_trials=3",
            "restarts.seed=0",
            "optim.signed=null",
            "optim.step_size_decay=null",
        ]
        cfg = attack_config("joint_candidates", overrides, iterations)
        return JointCandidateAttacker(model, loss(), cfg, SETUP).reconstruct(payload, shared)[0]["candidates"]

    run(0.0, 1)  # a process's first run may round its first step otherwise, by 2e-15: libraries settle on their kernels
    assert torch.equal(run(10.0, 4), run(0.0, 4))
    assert not torch.equal(run(10.0, 5), run(0.0, 5))
    # the term makes every value larger than those before it; what is kept is nevertheless a point that it has moved
    assert not torch.equal(run(10.0, 5), run(10.0, 4))
    assert not torch.equal(run(10.0, 6), run(10.0, 4))


def test_engines_agree_with_the_group_term_on():
    model = build_model("own")
    payload, shared, *_ = observed(model)
    results = []
    for batching in ("list", "vmap"):
        overrides = [
            "regularization.group_regularization.scale=0.5",
            "regularization.group_regularization.warmup_iters=2",
            "regularization.group_regularization.aligner=phase_correlation",
            "regularization.group_regularization.update_every=3",
            f"restarts.candidate_batching={batching}",
            "restarts.seed=0",
            "optim.signed=soft",
        ]
        attacker = JointCandidateAttacker(model, loss(), attack_config("joint_candidates", overrides, 12), SETUP)
        results.append(attacker.reconstruct(payload, shared))
    (listed, stats), (batched, batched_stats) = results
    assert (listed["candidates"] - batched["candidates"]).norm() / listed["candidates"].norm() < 1e-8
    for trial in range(4):
        assert stats[f"Trial_{trial}_Val"] == pytest.approx(batched_stats[f"Trial_{trial}_Val"], rel=1e-8)
    assert stats["alignments"] == 4 * 4 * 2  # iterations 2, 5, 8, 11; 4 candidates of 2 images


def large_photo(index: int) -> torch.Tensor:
    import numpy as np
    import skimage.data
    import skimage.transform

    photo = [skimage.data.astronaut, skimage.data.coffee][index]()
    small = skimage.transform.resize(photo[:400, 100:500], (64, 64), anti_aliasing=True)
    return torch.from_numpy(np.ascontiguousarray(small)).permute(2, 0, 1)


@pytest.mark.parametrize("aligner", [name for name in ALIGNERS if name != "none"])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("shift", [(3.0, -2.0), (-1.5, 2.5), (0.0, 0.0)])
def test_a_shifted_copy_is_aligned_to_within_half_a_pixel(aligner, index, shift):
    """Measured by what is left: the displacement field of the aligner against the true shift, away from the border."""
    image = large_photo(index)
    moved = torch.from_numpy(ndimage.shift(image.numpy(), (0, *shift), order=1, mode="nearest"))
    reference, moving = (x.permute(1, 2, 0).numpy() for x in (image, moved))
    coordinates = ALIGNERS[aligner](moving, reference)
    assert coordinates is not None
    import numpy as np

    rows, columns = np.mgrid[:64, :64]
    error = np.stack([coordinates[0] - rows - shift[0], coordinates[1] - columns - shift[1]])[:, 8:-8, 8:-8]
    assert np.median(np.hypot(*error)) < 0.5
    aligned, found = align(moved, image, aligner)
    assert found
    inner = (slice(None), slice(8, -8), slice(8, -8))
    if any(shift):
        assert (aligned - image)[inner].pow(2).mean() < 0.25 * (moved - image)[inner].pow(2).mean()


@pytest.mark.parametrize("aligner", [name for name in ALIGNERS if name != "none"])
def test_shifted_photos_of_the_default_size_are_aligned_to_within_half_a_pixel(aligner):
    """All eight photos at 32 pixels; SIFT may find too little in one, which then counts as not aligned."""
    import numpy as np

    images, _ = photos(8)
    rows, columns = np.mgrid[:32, :32]
    aligned = 0
    for index, image in enumerate(images.numpy()):
        shift = [(3.0, -2.0), (-1.5, 2.5)][index % 2]
        moved = ndimage.shift(image, (0, *shift), order=1, mode="nearest")
        found = ALIGNERS[aligner](moved.transpose(1, 2, 0), image.transpose(1, 2, 0))
        if found is None:
            assert aligner == "ransac"
            continue
        aligned += 1
        error = np.stack([found[0] - rows - shift[0], found[1] - columns - shift[1]])[:, 8:-8, 8:-8]
        assert np.median(np.hypot(*error)) < 0.5
    assert aligned >= 6


@pytest.mark.parametrize("aligner", list(ALIGNERS))
@pytest.mark.parametrize("size", [(1, 16), (16, 1), (1, 1), (2, 2), (3, 5)])
def test_images_of_any_size_are_aligned_or_stay(aligner, size):
    one, other = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    aligned, found = align(one, other, aligner)
    assert aligned.shape == one.shape
    assert aligned.isfinite().all()
    assert found or torch.equal(aligned, one)


@pytest.mark.parametrize(
    ("aligner", "follows"), [("phase_correlation", False), ("ransac", True), ("ransac_flow", True)]
)
def test_a_turned_copy_is_aligned_by_what_knows_more_than_shifts(aligner, follows):
    """Turned by six degrees: up to four pixels where it is measured, nowhere the same."""
    import numpy as np
    import skimage.transform

    image = large_photo(0)
    about = skimage.transform.SimilarityTransform(translation=(31.5, 31.5))
    turn = about.inverse + skimage.transform.SimilarityTransform(rotation=np.deg2rad(6)) + about  # (x, y)
    reference = image.permute(1, 2, 0).numpy()
    moving = skimage.transform.warp(reference, turn.inverse, order=1, mode="edge")
    coordinates = ALIGNERS[aligner](moving, reference)
    assert coordinates is not None
    rows, columns = np.mgrid[:64, :64]
    expected = turn(np.stack([columns.ravel(), rows.ravel()], axis=1)).reshape(64, 64, 2)
    error = np.hypot(coordinates[0] - expected[..., 1], coordinates[1] - expected[..., 0])[12:-12, 12:-12]
    assert bool(np.median(error) < 0.5) is follows


@pytest.mark.parametrize(
    ("aligner", "follows"), [("phase_correlation", False), ("optical_flow", True), ("ransac_flow", True)]
)
def test_a_bent_copy_is_aligned_by_dense_flow(aligner, follows):
    """Rows and columns bent into waves of two pixels, and shifted: flow goes on from where the shift ends."""
    import numpy as np

    shift = np.array([3.0, -2.0])[:, None, None]
    reference = large_photo(0).permute(1, 2, 0).numpy()
    pixels = np.stack(np.mgrid[:64, :64]).astype(float)

    def bend(points):
        return shift + 2 * np.sin(2 * np.pi * points[::-1] / 64)

    moving = aligners.resample(reference, pixels - bend(pixels))  # moving(x) = reference(x - bend(x))
    expected = pixels
    for _ in range(30):  # x = y - bend(y), solved for y
        expected = pixels + bend(expected)
    coordinates = ALIGNERS[aligner](moving, reference)
    assert coordinates is not None
    error = np.hypot(*(coordinates - expected))[12:-12, 12:-12]
    assert bool(np.median(error) < 0.5) is follows


@pytest.mark.parametrize("aligner", list(ALIGNERS))
def test_a_hopeless_image_stays_and_is_counted(aligner):
    candidates = torch.zeros(2, 1, 3, 32, 32, dtype=torch.float64)
    consensus, failures = registered_consensus(candidates, aligner)
    assert torch.equal(consensus, candidates[0])
    assert failures == (0 if aligner == "none" else 2)


def test_consensus_of_shifted_copies_is_sharper_when_aligned():
    images, _ = photos(1)
    stack = torch.stack([torch.roll(images, shift, dims=-1) for shift in (-2, 0, 2)])
    aligned, failures = registered_consensus(stack, "phase_correlation")
    assert failures == 0
    blurred, _ = registered_consensus(stack, "none")
    inner = (..., slice(6, -6))
    assert (aligned - images)[inner].pow(2).mean() < 0.5 * (blurred - images)[inner].pow(2).mean()


@pytest.mark.parametrize(
    "options",
    [
        {"aligner": "magic"},
        {"scale": -1.0},
        {"update_every": 0},
        {"warmup_iters": -1},
        {"warmup_iters": 2.5},
        {"update_every": float("inf")},
    ],
)
def test_bad_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        GroupRegularization(SETUP, **options)


def test_total_variation_equals_breachings_on_colour_and_works_on_any_channel_count():
    from breaching.attacks.auxiliaries.regularizers import TotalVariation

    images, _ = photos(2)
    for options in ({}, {"inner_exp": 2, "outer_exp": 0.5, "double_opponents": True}):
        theirs, ours = TotalVariation(SETUP, 0.3, **options), AnyChannelTotalVariation(SETUP, 0.3, **options)
        assert torch.equal(theirs(images), ours(images))
        assert torch.allclose(theirs(images), ours.by_differences(images), rtol=1e-14)
        left, right = (torch.func.grad(term)(images) for term in (theirs, ours.by_differences))
        assert torch.allclose(left, right, rtol=0, atol=1e-16)
    ours = AnyChannelTotalVariation(SETUP, 0.3)
    gray = images[:, :1]
    assert ours(gray).item() == pytest.approx(ours(gray.expand(-1, 3, -1, -1)).item(), rel=1e-12)
    with pytest.raises(ConfigError, match="double_opponents"):
        AnyChannelTotalVariation(SETUP, 0.3, double_opponents=True)(gray)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("aligner", ["none", "phase_correlation"])
def test_a_candidate_that_has_diverged_does_not_enter_the_consensus(bad, aligner):
    candidates = torch.rand(3, 2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, _ = registered_consensus(candidates[[0, 2]], aligner)
    candidates[1, 0, 0, 0, 0] = bad
    assert torch.equal(registered_consensus(candidates, aligner)[0], expected)
    assert registered_consensus(candidates[1:2], aligner)[0].isfinite().all()


def test_many_pixels_in_16_bits_are_no_divergence():
    """The sum of their squares is more than the type holds, and says nothing about them."""
    candidates = torch.ones(2, 1, 3, 200, 200, dtype=torch.half)
    assert torch.equal(registered_consensus(candidates)[0], candidates[0])


@pytest.mark.parametrize("works", [True, False])
def test_maps_are_estimated_by_older_scikit_image_too(works):
    """Before 0.26, and so with Python 3.10, a model estimates itself and says whether it could."""

    class Older:
        def estimate(self, source, target):
            self.given = source, target
            return works

    found = aligners._estimated(Older, "source", "target")
    assert (found.given == ("source", "target")) if works else found is None


def choice(*overrides: str, labels: torch.Tensor, candidates: torch.Tensor, local=None, stats=None):
    """What the attack would choose of these candidates, scored by their distance from the consensus."""
    options = ["restarts.scoring=registered-group-regularization", *overrides]
    attacker = JointCandidateAttacker(build_model("own"), loss(), attack_config("joint_candidates", options), SETUP)
    attacker.dm, attacker.ds = torch.zeros(()).double(), torch.ones(()).double()
    shared = [{"metadata": {"local_hyperparams": local}}]
    return attacker._conclude(
        candidates, Target([], shared, labels, list(candidates.shape[1:])), {} if stats is None else stats
    )


def test_images_of_one_label_are_averaged_in_one_order():
    """Which of two images with the same label is which, the averaged gradient does not say."""
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([2, 5, 2, 7])
    candidates = torch.stack([images, images[[2, 1, 0, 3]], images])
    found = choice("restarts.output=consensus", labels=labels, candidates=candidates)
    torch.testing.assert_close(found["data"], images)
    torch.testing.assert_close(found["candidate_scores"], torch.zeros(3).double(), atol=1e-20, rtol=0)
    fixed = choice("restarts.output=consensus", labels=torch.arange(4), candidates=candidates)  # all labels differ
    assert not torch.allclose(fixed["data"], images, atol=1e-2)


def test_local_steps_tell_images_of_one_label_apart_where_they_do():
    """Images 0 and 2 have one label; in one step they are interchangeable, in two they are not."""
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([2, 5, 2, 7])
    candidates = torch.stack([images, images[[2, 1, 0, 3]], images])
    for per_step, tells in ((4, False), (2, True)):
        steps = list(labels.split(per_step))
        local = {"lr": 0.1, "steps": len(steps), "data_per_step": per_step, "labels": steps}
        found = choice("restarts.output=consensus", labels=labels, candidates=candidates, local=local)
        assert torch.allclose(found["data"], images, atol=1e-2) is not tells


def test_where_nothing_is_finite_the_result_is_zeros_with_a_consensus_too():
    candidates = torch.full((3, 2, 3, 8, 8), float("nan")).double()
    found = choice("restarts.output=consensus", labels=torch.arange(2), candidates=candidates)
    assert not found["data"].any()


def test_the_aligner_holds_where_the_pull_is_off(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "breaching_ext.attacks.candidate_choice.registered_consensus",
        lambda candidates, aligner: (seen.append(aligner), registered_consensus(candidates))[1],
    )
    key = "regularization.group_regularization"
    options = ("restarts.output=consensus", f"{key}.scale=0", f"{key}.aligner=phase_correlation")
    choice(*options, labels=torch.arange(2), candidates=torch.rand(3, 2, 3, 8, 8).double())
    assert set(seen) == {"phase_correlation"}


def test_the_candidate_in_the_middle_and_the_smoothest_one_are_chosen():
    """Lower is better in every scoring."""
    images = 0.6 * torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()  # all within the box
    candidates = torch.stack([images, images + 0.01, images + 0.3])
    found = choice(labels=torch.arange(2), candidates=candidates)
    expected = (candidates - candidates.mean(dim=0)).pow(2).flatten(1).mean(dim=1)
    torch.testing.assert_close(found["candidate_scores"], expected)
    assert torch.equal(found["data"], candidates[1])
    flat = torch.stack([images, images * 0.1, images])
    found = choice("restarts.scoring=TV", labels=torch.arange(2), candidates=flat)
    assert torch.equal(found["data"], flat[1])
    torch.testing.assert_close(found["candidate_scores"][0], found["candidate_scores"][2])
    assert 0 < found["candidate_scores"][1] < found["candidate_scores"][0]


def test_alignments_that_fail_where_one_is_chosen_are_counted(monkeypatch):
    """Once to score by the consensus, once to return it; what the loop counted stays."""
    monkeypatch.setattr(
        "breaching_ext.attacks.candidate_choice.registered_consensus",
        lambda candidates, aligner: (registered_consensus(candidates)[0], 2),
    )
    stats = {"alignment_failures": 5, "alignments": 12}
    choice("restarts.output=consensus", labels=torch.arange(2), candidates=torch.rand(3, 2, 3, 8, 8), stats=stats)
    assert stats["alignment_failures"] == 5 + 2 * 2
    assert stats["alignments"] == 12 + 2 * 6


def test_what_may_mislead_is_said(caplog):
    model = build_model("own")
    payload, shared, *_ = observed(model, 2)
    shared[0]["metadata"]["labels"][1] = shared[0]["metadata"]["labels"][0]
    cfg = attack_config("joint_candidates", ["regularization.group_regularization.scale=0.1"], 1)
    JointCandidateAttacker(model, loss(), cfg, SETUP).reconstruct(payload, shared)
    assert "Labels repeat" in caplog.text
    caplog.clear()
    options = ["restarts.scoring=registered-group-regularization", "restarts.num_trials=2"]
    payload, shared, *_ = observed(model, 2)
    JointCandidateAttacker(model, loss(), attack_config("joint_candidates", options, 1), SETUP).reconstruct(
        payload, shared
    )
    assert "says nothing about 2 candidates" in caplog.text
    assert "Labels repeat" not in caplog.text


def test_text_has_no_images_to_align():
    cfg = attack_config("joint_candidates", ["regularization.group_regularization.aligner=ransac"])
    attacker = JointCandidateAttacker(build_model("own"), loss(), cfg, SETUP)
    with pytest.raises(ConfigError, match=r"aligner=ransac aligns images.*valid: none"):
        attacker._prepare_group(attacker.group, torch.zeros(4, 2, 16, 96))
