"""Shared test settings: one thread a process, so that timings and results do not depend on the machine."""

import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the engines that `auto` remembers out of the user's cache, and the user's out of the tests."""
    os.environ["BREACHING_EXT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace and differentiate as torch.compile does, but skip its code generator, which takes most of the time."""
    from breaching_ext.matching import engine_parts
    from breaching_ext.matching.compiled_engine import CompiledEngine

    monkeypatch.setattr(engine_parts, "CompiledEngine", partial(CompiledEngine, backend="aot_eager"))


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the root of the source tree."""
    return ROOT


@pytest.fixture
def lpips_backbone(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point torch at LPIPS's backbone beside the checkout, or skip."""
    home = ROOT.parent / "shared" / "torch_home"
    if not home.exists():
        pytest.skip("no AlexNet weights for LPIPS at ../shared/torch_home")
    monkeypatch.setenv("TORCH_HOME", str(home))
    return home
