"""Batch normalisation written elementwise equals torch's operator, with all derivatives that matching needs."""

from __future__ import annotations

import pytest
import torch
from cases import build_model, photos
from torch.func import functional_call, grad, vmap

from breaching_ext.matching.normalization import AffineBatchNorm, affine_batch_norm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6)])
def test_equals_torchs_operator(shape, affine):
    torch.manual_seed(0)
    x, mean, var = torch.randn(shape).double(), torch.randn(3).double(), torch.rand(3).double()
    more = (torch.randn(3).double(), torch.randn(3).double()) if affine else (None, None)
    expected = torch.nn.functional.batch_norm(x, mean, var, *more, training=False, eps=1e-3)
    assert torch.allclose(affine_batch_norm(x, mean, var, *more, eps=1e-3), expected, rtol=1e-12, atol=1e-12)


def test_the_second_derivative_of_a_whole_model_is_the_same():
    model = build_model("ResNet20")
    images, labels = photos(2)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def norm_of_gradient(x, mode):
        def task_loss(weights):
            return torch.nn.functional.cross_entropy(functional_call(model, weights, (x,)), labels)

        if mode is None:
            return sum(g.pow(2).sum() for g in grad(task_loss)(parameters).values())
        with mode:
            return sum(g.pow(2).sum() for g in grad(task_loss)(parameters).values())

    stack = torch.stack([images, images * 0.5])
    plain, affine = (vmap(grad(lambda x: norm_of_gradient(x, mode)))(stack) for mode in (None, AffineBatchNorm()))  # noqa: B023
    assert (plain - affine).norm() / plain.norm() < 1e-10


def test_statistics_of_the_batch_are_left_to_torch():
    norm = torch.nn.BatchNorm2d(3).train()
    x = torch.randn(4, 3, 2, 2)
    with AffineBatchNorm():
        output = norm(x)
    assert output.mean().abs() < 1e-5
    assert norm.num_batches_tracked == 1
    without = torch.nn.BatchNorm2d(3, track_running_stats=False).eval()
    with AffineBatchNorm():
        assert without(x).mean().abs() < 1e-5
