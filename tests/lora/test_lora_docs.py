"""What docs/lora.md says of a model, adapters and an update of one's own, done with them."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from breaching_ext.lora.decode import cosine
from breaching_ext.lora.models import SmallConv

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'breaching-ext[lora]'")


def client(folder, images, labels):
    """A project that knows nothing of this package: it trains adapters of rank 2 with peft, and files what it sent.

    Returns:
        The plain model, and the true gradients of the adapted layers' effective weights.
    """
    torch.manual_seed(0)
    model = SmallConv().eval()
    adapted = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["fc1", "fc2"])
    ).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # B is not zero after the first round
    adapted.save_pretrained(folder / "received")
    torch.nn.functional.cross_entropy(adapted(images), labels).backward()
    sent = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
    torch.save(sent, folder / "update.pt")
    merged = copy.deepcopy(adapted).merge_and_unload()
    weights = [merged.fc1.weight, merged.fc2.weight]
    for weight in weights:
        weight.requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(merged(images), labels)
    return model, torch.autograd.grad(loss, weights)


def test_the_snippet_attacks_what_a_project_filed(root, tmp_path, monkeypatch, capsys):
    images, labels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([3])
    model, true = client(tmp_path, images, labels)
    (code,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "lora.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "optim.max_iterations=1000" in code
    monkeypatch.chdir(tmp_path)
    names = {"model": model, "labels": labels, "classes": 8, "mean": None, "std": None}
    exec(compile(code.replace("max_iterations=1000", "max_iterations=3"), "docs/lora.md", "exec"), names)
    assert "gradients that are exact: ['fc1', 'fc2']" in capsys.readouterr().out
    assert cosine([names["decoded"]["fc1"], names["decoded"]["fc2"]], true) > 0.99999
    for found in ("matched", "inverted"):
        assert names[found].shape == images.shape
        assert names[found].isfinite().all()
