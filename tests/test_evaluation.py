"""Metrics against independent computations."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from breaching_ext.evaluation import assign, evaluate, psnr, ssim, to_images
from breaching_ext.evaluation.figures import save_reconstruction
from breaching_ext.files import write_atomically, write_json


def images(number=4, channels=3, size=16, seed=0):
    return torch.rand(number, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(5)), noise=st.floats(0, 0.05), seed=st.integers(0, 99))
def test_assignment_finds_a_permutation(order, noise, seed):
    true = images(5, seed=seed)
    shuffled = true[list(order)] + noise * torch.randn(5, 3, 16, 16, dtype=torch.float64)
    found = assign(shuffled, true)
    assert [order[i] for i in found.tolist()] == list(range(5))


def test_assignment_is_one_to_one_where_the_nearest_is_not():
    true = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).double().expand(2, 1, 8, 8)
    reconstructed = torch.tensor([0.9, 0.8]).view(2, 1, 1, 1).double().expand(2, 1, 8, 8)
    assert assign(reconstructed, true).tolist() == [1, 0]


def test_psnr_is_scikit_images():
    true = images()
    noisy = (true + 0.1 * torch.randn_like(true)).clamp(0, 1)
    expected = [peak_signal_noise_ratio(t.numpy(), n.numpy(), data_range=1.0) for t, n in zip(true, noisy, strict=True)]
    assert psnr(noisy, true).tolist() == pytest.approx(expected, rel=1e-10)


def test_an_exact_image_does_not_make_the_mean_infinite():
    true = images()
    result = evaluate(true.clone(), true)
    assert result.means["psnr"] == 100
    assert result.means["ssim"] == pytest.approx(1)
    assert result.means["mse"] == 0


@pytest.mark.parametrize("size", [3, 6, 32])
def test_ssim_of_small_images(size):
    true = images(2, 1, size)
    assert ssim(true, true).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("size", [7, 32])
def test_ssim_is_scikit_images_for_values_from_0_to_1(size):
    true = images(3, 3, size)
    noisy = (true + 0.2 * torch.randn(true.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    expected = [
        structural_similarity(t.numpy(), n.numpy(), data_range=1.0, channel_axis=0)
        for t, n in zip(true, noisy, strict=True)
    ]
    assert ssim(noisy, true).tolist() == pytest.approx(expected, rel=1e-6)
    assert max(expected) < 0.95


def test_labels_follow_the_assignment():
    true = images(3)
    result = evaluate(true[[2, 0, 1]], true, torch.tensor([7, 5, 5]), torch.tensor([5, 6, 7]))
    assert result.per_image["label_acc"] == [1.0, 0.0, 1.0]
    assert result.means["label_acc"] == pytest.approx(2 / 3)
    exchanged = evaluate(true, true, torch.tensor([7, 5, 5]), torch.tensor([5, 5, 7]))
    assert exchanged.means["label_acc"] == pytest.approx(1 / 3)
    assert exchanged.means["label_overlap"] == 1


def test_without_the_backbone_lpips_is_null_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    result = evaluate(images(2, 3, 31), images(2, 3, 31, seed=1)).as_dict()
    assert result["lpips"] is None
    assert "alexnet-owt" in result["lpips_reason"]
    assert "lpips" not in result["per_image"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.filterwarnings("ignore")  # lpips's own, of torchvision
def test_lpips_with_the_real_backbone(lpips_backbone, channels):
    import lpips

    true = images(2, channels, 64)
    same, other = evaluate(true.clone(), true), evaluate(images(2, channels, 64, seed=5), true)
    assert same.means["lpips"] == pytest.approx(0, abs=1e-6)
    theirs = lpips.LPIPS(net="alex", verbose=False)
    pair = [x.expand(-1, 3, -1, -1).float() for x in (images(2, channels, 64, seed=5)[other.order], true)]
    with torch.no_grad():
        expected = theirs(*pair, normalize=True).flatten().tolist()  # of images in [0, 1]
    assert other.per_image["lpips"] == pytest.approx(expected, rel=1e-3)
    assert other.means["lpips"] > 0.01
    assert len(other.per_image["lpips"]) == 2


def test_images_too_small_for_the_backbone(lpips_backbone):
    result = evaluate(images(2, 3, 30), images(2, 3, 30, seed=1)).as_dict()
    assert result["lpips"] is None
    assert "31 pixels each way or more" in result["lpips_reason"]


def test_to_images_inverts_the_normalisation():
    raw = images()
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    normalised = (raw - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    assert torch.allclose(to_images(normalised, mean, std), raw, atol=1e-7)
    assert to_images(torch.tensor([[[[2.0]]]])).item() == 1


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="do not fit"):
        evaluate(images(2), images(3))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"x": 1})

    def fail(path):
        path.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_atomically(target, fail)
    assert json.loads(target.read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_is_strict(tmp_path):
    path = write_json(tmp_path / "a.json", {"x": [math.inf, math.nan, 1.5], "y": float(np.float64(2))})
    assert json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(c)) == {"x": [None, None, 1.5], "y": 2.0}


@pytest.mark.parametrize("size", [1, 2])
def test_tiny_images_have_no_similarity_and_all_else(size):
    true = images(2, 3, size)
    means = evaluate(true, true).means
    assert math.isnan(means["ssim"])
    assert means["psnr"] == 100


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_a_damaged_backbone_leaves_the_other_metrics(tmp_path, monkeypatch, content):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "alexnet-owt-7be5be79.pth").write_bytes(content)
    true = images(1, 3, 64)
    result = evaluate(true, true).as_dict()
    assert result["lpips"] is None
    assert "LPIPS failed" in result["lpips_reason"]
    assert result["ssim"] == pytest.approx(1)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_number_of_channels_can_be_shown(tmp_path, channels):
    true = images(2, channels, 8)
    save_reconstruction(tmp_path / "a.png", true, true, [1.0, 2.0], "title")
    assert (tmp_path / "a.png").stat().st_size > 1000
