"""Small cases for the tests: a model, its gradient for real photos, and an attack config, without a simulation."""

from __future__ import annotations

import contextlib
import io
import warnings

import breaching
import torch
from breaching.cases.models.model_preparation import _construct_vision_model
from omegaconf import OmegaConf

from breaching_ext.attacks import observe
from breaching_ext.data import SamplePhotos

MEAN, STD = [0.524, 0.373, 0.327], [0.297, 0.230, 0.227]


class OwnModule(torch.nn.Module):
    """Stands for a user's own model: any number of channels, a residual, no Breaching wrapper."""

    def __init__(self, channels: int = 3, classes: int = 8) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, 6, 5, stride=4)
        self.mix = torch.nn.Conv2d(6, 6, 1)
        self.head = torch.nn.Linear(6 * 7 * 7, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.conv(x))
        h = h + torch.nn.functional.gelu(self.mix(h))
        return self.head(h.flatten(1))


def build_model(name: str, dtype: torch.dtype = torch.float64, channels: int = 3) -> torch.nn.Module:
    """Return an untrained model in evaluation mode; `own` or any of Breaching's vision models."""
    torch.manual_seed(3)
    if name == "own":
        model: torch.nn.Module = OwnModule(channels)
    else:
        cfg_data = OmegaConf.create({"shape": [channels, 32, 32], "classes": 8, "name": "test"})
        model = _construct_vision_model(name, cfg_data, pretrained=False)
    model.name = name
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics that are not the trivial ones
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.to(dtype).eval()


def photos(number: int, dtype: torch.dtype = torch.float64, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Return normalised photos (B, C, 32, 32) and their labels."""
    import torchvision

    transform = torchvision.transforms.Compose(
        [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize(MEAN, STD)]
    )
    dataset = SamplePhotos(transform=transform)
    images = torch.stack([dataset[i][0] for i in range(number)]).to(dtype)
    return images[:, :channels], torch.tensor([dataset[i][1] for i in range(number)])


def observed(model: torch.nn.Module, batch: int = 2, channels: int = 3, **changes):
    """Return (server_payload, shared_data, images, labels) for a batch of photos."""
    dtype = next(model.parameters()).dtype
    images, labels = photos(batch, dtype, channels)
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(model(images), labels), trainable)
    known = {"labels": labels, "mean": MEAN[:channels], "std": STD[:channels], **changes}
    payload, shared = observe(model, gradients, (channels, 32, 32), batch, 8, **known)
    return payload, shared, images, labels


def attack_config(name: str = "joint_candidates", overrides: list[str] = (), iterations: int = 3):
    """Return one of the attack configs, with few iterations and in float64."""
    quiet = ["impl.dtype=double", f"optim.max_iterations={iterations}"]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Breaching's own use of Hydra
        return breaching.get_attack_config(name, overrides=[*quiet, *overrides])


def loss() -> torch.nn.Module:
    """Return the loss as Breaching makes it: a scripted cross-entropy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(torch.nn.CrossEntropyLoss())
