"""Breaching's stock entry points find our attacks; everything can be undone; other applications see nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import breaching_ext
from breaching_ext import registration


def python(code: str, cwd: Path, path: Path | None, *arguments: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter; `path` is put on PYTHONPATH (None: only what is installed)."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    env["PYTHONPATH"] = str(path) if path else ""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def test_what_a_later_breaching_has_moved_is_skipped_with_a_warning(caplog):
    """A name, or a whole module."""
    before = list(registration._undo)
    for module, name in (("breaching.attacks", "nothing"), ("breaching.nowhere", "prepare_attack")):
        registration._wrap(module, name, lambda original: original)
        registration._add_entry(module, name, "key", object())
        assert caplog.text.count(f"This Breaching has no {module}.{name}") == 2
    assert registration._undo == before


def test_register_and_unregister_are_idempotent_and_undo_everything():
    import breaching
    from breaching.attacks.auxiliaries.regularizers import regularizer_lookup
    from breaching.cases.data import datasets_vision

    def state():
        return (
            breaching.attacks.prepare_attack,
            datasets_vision._build_dataset_vision,
            datasets_vision._split_dataset_vision,
            dict(regularizer_lookup),
        )

    breaching_ext.unregister()
    before = state()
    breaching_ext.register()
    registered = state()
    breaching_ext.register()
    assert state() == registered
    assert "group_regularization" in regularizer_lookup
    assert all(a is not b for a, b in zip(before[:3], registered[:3], strict=True))
    breaching_ext.unregister()
    breaching_ext.unregister()
    assert state() == before
    breaching_ext.register()


def test_undoing_keeps_what_somebody_else_has_put_there_since():
    import breaching

    breaching_ext.register()
    ours = breaching.attacks.prepare_attack

    def theirs(*args, **kwargs):
        return ours(*args, **kwargs)

    breaching.attacks.prepare_attack = theirs
    breaching_ext.unregister()
    assert breaching.attacks.prepare_attack is theirs
    breaching.attacks.prepare_attack = ours.__wrapped__
    breaching_ext.register()


def test_an_attack_of_breaching_still_goes_to_breaching():
    import breaching
    from cases import attack_config, build_model, loss

    breaching_ext.register()
    attacker = breaching.attacks.prepare_attack(build_model("own"), loss(), attack_config("invertinggradients"))
    assert type(attacker).__module__.startswith("breaching.")


STOCK = """
import sys
import breaching
cfg = breaching.get_attack_config("joint_candidates", overrides=["restarts.num_trials=8"])
assert cfg.attack_type == "joint-candidates" and cfg.restarts.num_trials == 8
case = breaching.get_case_config("sample_photos")
assert case.data.name == "sample_photos"
cfg = breaching.get_config(overrides=["case/data=sample_photos", "attack=seethroughgradients_group", "case.model=cnn6"])
cfg = breaching.get_config(overrides=["case=sample_photos", "attack=joint_candidates", "case.server.pretrained=False"])
user, server, model, loss_fn = breaching.cases.construct_case(cfg.case)
attacker = breaching.attacks.prepare_attack(server.model, server.loss, cfg.attack)
assert type(attacker).__name__ == "JointCandidateAttacker"
print(attacker)
print("FOUND", sys.modules["breaching_ext"].__file__)
"""


def test_stock_entry_points_find_us_without_an_import_from_a_source_tree(root, tmp_path):
    """PYTHONPATH has the checkout first, where there is no breaching_ext/config folder."""
    assert not (root / "breaching_ext" / "config").exists()
    done = python(STOCK, tmp_path, root)
    assert done.returncode == 0, done.stderr
    assert f"FOUND {root}" in done.stdout


def test_stock_entry_points_find_us_from_the_repository_root(root):
    done = python(STOCK, root, None)
    assert done.returncode == 0, done.stderr
    assert f"FOUND {root}" in done.stdout


def test_stock_entry_points_find_us_as_an_installed_package(tmp_path):
    """Run away from the source tree; skipped only where the package is not installed at all."""
    probe = python("import breaching_ext; print(breaching_ext.__file__)", tmp_path, None)
    if probe.returncode:
        pytest.skip("breaching_ext is not installed in this environment, only on the path")
    done = python(STOCK, tmp_path, None)
    assert done.returncode == 0, done.stderr


EDITABLE = """
import site, sys
sys.path += sys.argv[1:]  # as they are: this environment's own .pth files may install the package, too
site.addsitedir(sys.argv[1])
import breaching
cfg = breaching.get_config(overrides=["case=sample_photos", "attack=magia", "case/user=trained_model"])
from breaching_ext import registration
print(registration.__file__, registration.config_root())
"""


def test_stock_entry_points_find_us_in_an_editable_install(root, tmp_path):
    """As pip makes one: a finder that maps names to folders, so that config/ becomes breaching_ext.config."""
    pytest.importorskip("setuptools", minversion="68")
    installed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    if any((Path(path) / "breaching_ext").exists() for path in installed):
        pytest.skip("breaching_ext is installed as a wheel in this environment, which would be found first")
    source, folder = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "breaching_ext", "config", "hydra_plugins"):
        (source / name).symlink_to(root / name)  # what is built writes beside these
    build = "import sys, setuptools.build_meta; print(setuptools.build_meta.build_editable(sys.argv[1]))"
    done = python(build, source, None, str(tmp_path))
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        wheel.extractall(folder)
    command = [sys.executable, "-S", "-W", "ignore", "-c", EDITABLE, str(folder), *installed]
    env = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found, configs = done.stdout.split()[-2:]
    assert Path(found).is_relative_to(root)  # links are followed
    assert configs == "pkg://breaching_ext.config"


def test_configs_of_a_wheel_are_complete(root):
    """Every folder below config/ is a package that setup.cfg lists; a YAML outside of one would be left out."""
    import configparser

    parser = configparser.ConfigParser()
    parser.read(root / "setup.cfg")
    listed = set(parser["options"]["packages"].split())
    for folder in {path.parent for path in (root / "config").rglob("*.yaml")}:
        assert (folder / "__init__.py").exists(), folder
        assert ".".join(["breaching_ext", "config", *folder.relative_to(root / "config").parts]) in listed
    for init in (root / "breaching_ext").rglob("__init__.py"):
        assert ".".join(init.parent.relative_to(root).parts) in listed


def test_silent_and_light_in_other_hydra_applications(root, tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text("a: 1\n")
    code = """
import sys, hydra
from hydra.core.global_hydra import GlobalHydra
with hydra.initialize_config_dir(sys.argv[1], version_base="1.3"):
    cfg = hydra.compose("mine")
    sources = [s.path for s in GlobalHydra.instance().config_loader().get_sources()]
assert cfg.a == 1
assert not any("breaching" in s for s in sources), sources
assert "torch" not in sys.modules and "breaching" not in sys.modules
assert any(name.endswith("breaching_ext_searchpath") for name in sys.modules)
"""
    done = python(code, tmp_path, root, str(tmp_path / "conf"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_importing_the_package_imports_no_torch(root, tmp_path):
    done = python("import sys, breaching_ext; assert 'torch' not in sys.modules", tmp_path, root)
    assert done.returncode == 0, done.stderr


def test_breachings_own_script_runs_our_attack_unmodified(root, tmp_path, lpips_backbone):
    """The script that Breaching installs, beside its package as in a clone; its report needs LPIPS's backbone."""
    import breaching

    script = Path(sys.prefix) / "bin" / "simulate_breach.py"
    if not script.exists():
        pytest.skip("Breaching's simulate_breach.py is not installed in this environment")
    (tmp_path / "simulate_breach.py").write_text(script.read_text())
    (tmp_path / "breaching").symlink_to(Path(breaching.__file__).parent)
    overrides = ["attack=joint_candidates", "case=sample_photos", "attack.optim.max_iterations=2", "seed=1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "simulate_breach.py", *overrides], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "JointCandidateAttacker" in done.stdout
    assert "METRICS" in done.stdout
