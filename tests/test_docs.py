"""What the pages say: links lead somewhere, code runs, commands compose, the index of names is the code's."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import pkgutil
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import breaching
import hydra
import pytest
import torch
from cases import OwnModule
from conftest import ROOT
from hydra.core.global_hydra import GlobalHydra
from hydra.plugins.search_path_plugin import SearchPathPlugin

from breaching_ext import registration, regularizers
from breaching_ext.attacks import JointCandidateAttacker, checks, observe
from breaching_ext.attacks.magia_options import MagiaOptions
from breaching_ext.run_checks import check_values

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
#: Hydra as the command uses it, but without files of its own
QUIET = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null", "hydra.run.dir=."]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


# -- links ---------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The names by which GitHub links headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found.read_text(encoding="utf-8")), target


def test_the_list_of_pages_is_complete():
    listed = set(re.findall(r"^\| \[[^]]+\]\((\w+\.md)\)", text_of("docs/README.md"), re.M))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert "(docs/README.md)" in text_of("README.md")


# -- code ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_parses_and_its_imports_exist(page):
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("breaching_ext"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


@pytest.fixture
def short_runs(monkeypatch) -> None:
    """Two iterations, whatever a page asks for, and two images of a simulated client."""
    in_attack = ["optim.max_iterations=2"]
    in_all = ["attack.optim.max_iterations=2", "case.user.num_data_points=2"]
    for function, few in (("get_attack_config", in_attack), ("get_config", in_all)):
        original = getattr(breaching, function)

        def short(*args, original=original, few=few, overrides=(), **kwargs):
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Breaching's own use of Hydra
                return original(*args, overrides=[*overrides, *few], **kwargs)

        monkeypatch.setattr(breaching, function, short)


@pytest.fixture
def own_project(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder in which scripts are written and run; what they register is taken back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    from breaching.attacks.auxiliaries.regularizers import regularizer_lookup

    tables = (regularizers.ALIGNERS, registration.REGULARIZERS, registration.ATTACK_TYPES, regularizer_lookup)
    with contextlib.ExitStack() as stack:
        for table in tables:
            stack.enter_context(mock.patch.dict(table))
        yield tmp_path
    sys.modules.pop("mine", None)
    GlobalHydra.instance().clear()


def what_a_client_sent() -> dict[str, object]:
    """The names that snippets take as given: four images, one gradient, and what two local steps change."""
    torch.manual_seed(0)
    model, loss_fn = OwnModule().eval(), torch.nn.CrossEntropyLoss()
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 2, 3, 5])
    before = list(model.parameters())
    gradients = torch.autograd.grad(loss_fn(model(images[:2]), labels[:2]), before)
    payload, shared = observe(model, gradients, (3, 32, 32), 2, 8, labels=labels[:2])
    changed = [p.detach() - 0.1 * g for p, g in zip(before, gradients, strict=True)]
    sent = {"model": model, "loss_fn": loss_fn, "gradients": gradients, "payload": payload, "shared": shared}
    return {**sent, "labels": labels, "server_parameters": before, "client_parameters": changed}


def write_named(text: str, language: str) -> None:
    """Write the blocks whose first line is a comment with a file's name."""
    for block in blocks(text, language):
        name = re.match(r"# ([\w/]+\.\w+)\n", block)
        if name:
            Path(name[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(name[1]).write_text(block, encoding="utf-8")


def run_nameless(text: str, **given: object) -> list[dict[str, object]]:
    """Run the other blocks one after another, each on top of what is given; returns the names that each leaves."""
    done = []
    for block in blocks(text, "python"):
        if not re.match(r"# [\w/]+\.py\n", block):
            names = {**given}
            exec(compile(block, "snippet", "exec"), names)
            done.append(names)
    return done


def run_script(monkeypatch, line: str) -> dict[str, object]:
    """Run `python script.py overrides` in this process."""
    arguments = shlex.split(line, comments=True)[1:]
    monkeypatch.setattr(sys, "argv", arguments)
    return runpy.run_path(arguments[0], run_name="__main__")


def test_the_readmes_snippets_run(own_project, short_runs):
    sent = what_a_client_sent()
    simulated, own = run_nameless(text_of("README.md"), **{**sent, "labels": sent["labels"][:2]})
    assert simulated["reconstruction"]["candidates"].shape == (4, 2, 3, 32, 32)
    assert own["reconstruction"]["candidates"].shape == (2, 2, 3, 32, 32)


def test_the_program_for_a_model_of_ones_own_runs(own_project, short_runs, monkeypatch):
    page = text_of("docs/own_project.md")
    write_named(page, "python")
    found = run_script(monkeypatch, "python audit.py")
    assert found["reconstruction"]["data"].shape == (2, 3, 32, 32)
    assert (own_project / "audit.png").exists()
    sent = what_a_client_sent()
    (steps,) = run_nameless(page, observe=observe, **sent)
    attacker = JointCandidateAttacker(sent["model"], sent["loss_fn"], breaching.get_attack_config("joint_candidates"))
    reconstruction, _ = attacker.reconstruct(steps["payload"], steps["shared"])
    assert reconstruction["data"].shape == (4, 3, 32, 32)


def test_a_hydra_application_of_ones_own_finds_the_attacks(own_project, short_runs, monkeypatch, capsys):
    page = text_of("docs/own_project.md")
    for language in ("python", "yaml"):
        write_named(page, language)
    lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line.startswith("python hydra")]
    assert len(lines) == 2
    for line in lines:
        command = [*shlex.split(line, comments=True), "attack.optim.max_iterations=2", *QUIET]
        run_script(monkeypatch, shlex.join(command))
    printed = capsys.readouterr().out
    assert "JointCandidateAttacker torch.Size([2, 3, 16, 16])" in printed
    assert "OptimizationBasedAttacker torch.Size([2, 3, 16, 16])" in printed


def test_what_extends_the_attacks_is_used(own_project, short_runs):
    page = text_of("docs/extending.md")
    write_named(page, "python")
    own, schedule = run_nameless(page, **what_a_client_sent())
    attacker, stats = own["attacker"], own["stats"]
    assert type(attacker).__name__ == "Sharpest"
    assert type(attacker.group).__name__ == "MedianConsensus"
    assert type(attacker.regularizers[-1]).__name__ == "Contrast"
    assert attacker.group.aligner == "half_turn"
    assert stats["alignments"] == 4 * 2
    assert stats["opt_value"] < 0  # minus the sharpness
    candidates = own["reconstruction"]["candidates"]
    median = candidates.median(dim=0).values
    assert torch.equal(attacker._consensus(candidates, {}), median)
    attacker.group.update(candidates, 1)
    assert torch.equal(attacker.group.consensus, median)
    image = candidates[0, 0]
    turned, found = regularizers.align(image.flip(-1, -2), image, "half_turn")
    assert found
    assert torch.allclose(turned, image)
    assert schedule["attacker"].options.schedule.size(3, 4, 8) == 2
    assert schedule["reconstruction"]["data"].isfinite().all()


def test_the_command_takes_what_extends_it(own_project, monkeypatch, capsys):
    page = text_of("docs/extending.md")
    write_named(page, "python")
    (line,) = (line for block in blocks(page, "bash") for line in block.splitlines() if "my_audit.py" in line)
    few = [
        "attack.optim.max_iterations=2",
        "case.user.num_data_points=1",
        "attack.restarts.num_trials=2",
        "dryrun=true",
    ]
    run_script(monkeypatch, shlex.join([*shlex.split(line, comments=True), *few, "base_dir=.", *QUIET]))
    assert "PSNR [dB]" in capsys.readouterr().out
    registration.ATTACK_TYPES.pop("sharpest")
    sys.modules.pop("mine")
    plugin = runpy.run_path("hydra_plugins/mine_plugin.py")["Mine"]
    assert issubclass(plugin, SearchPathPlugin)
    assert "sharpest" in registration.ATTACK_TYPES


def test_magia_on_a_gradient_of_ones_own_runs(own_project, short_runs):
    (found,) = run_nameless(text_of("docs/magia.md"))
    assert found["reconstruction"]["label_probabilities"].shape == (4, 8)


# -- the index of names --------------------------------------------------------------------------------------------

#: Names that code outside relies on, and the arguments that it gives them.
PROMISED = {
    "breaching_ext": {"register": "", "unregister": ""},
    "breaching_ext.attacks": {
        **dict.fromkeys(("JointCandidateAttacker", "MagiaAttacker", "KKTAttacker"), "model loss_fn cfg_attack setup"),
        ".reconstruct": "server_payload shared_data server_secrets initial_data dryrun",
    },
    "breaching_ext.regularizers": {"GroupRegularization": "scale warmup_iters aligner update_every"},
    "breaching_ext.selection": {"subset_size": "mode iteration batch_size n_iter k=2 l_iter=100 a=-0.1 b=200.0"},
    "breaching_ext.ssigd": {
        "StronglyConvexBilevelProblem": "dim seed=0 constraints='box'",
        ".upper_objective": "x y",
        ".lower_objective": "x y q",
        ".solve_lower_level": "x q=None",
        "implicit_gradient": "problem x q=None backend='kkt'",
        "QPLayer": "Q G",
        ".forward": "c h",
        **dict.fromkeys(("SSIGD", "DSBLO", "EnhancedSSIGD"), "problem"),
    },
    "breaching_ext.optimizer_study": {
        "VARIANTS": "",
        "create_optimizer": "variant_id params",
        "run_grid": "variant_id model train test lr_multipliers wd_multipliers epochs batch_size=128 seed=42 executor",
        "OptimizerExperiment": "optimizer_id",
    },
}


def index_sections() -> dict[str, str]:
    """Module -> its part of docs/api.md, every line break inside an entry undone."""
    page = re.sub(r"\n +(?! *-)", " ", text_of("docs/api.md"))
    _, *parts = re.split(r"^## `([\w.]+)`$", page, flags=re.M)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def public_modules() -> list[str]:
    import breaching_ext

    packages = pkgutil.walk_packages(breaching_ext.__path__, "breaching_ext.")
    found = [info.name for info in packages if info.ispkg and not info.name.startswith("breaching_ext.config")]
    return ["breaching_ext", "breaching_ext.selection", *found]


def test_the_index_is_what_the_code_says():
    make_api = runpy.run_path(str(ROOT / "docs" / "make_api.py"))
    assert make_api["page"]() == text_of("docs/api.md"), "python docs/make_api.py writes it anew"


def test_the_index_has_every_public_name_with_its_arguments():
    sections = index_sections()
    for module_name in public_modules():
        module = importlib.import_module(module_name)
        for name in module.__all__:
            entry = re.search(rf"^- `{re.escape(name)}(?=[(`])([^`]*)`", sections[module_name], re.M)
            assert entry, f"{module_name}.{name}"
            thing = getattr(module, name)
            if inspect.isfunction(thing):
                assert all(re.search(rf"\b{argument}\b", entry[1]) for argument in inspect.signature(thing).parameters)


@pytest.mark.parametrize("module_name", PROMISED)
def test_the_index_has_what_others_rely_on(module_name):
    section = index_sections()[module_name]
    for name, arguments in PROMISED[module_name].items():
        entries = re.findall(rf"^ *- `{re.escape(name)}(?=[(`])([^`]*)`", section, re.M)
        assert any(all(argument in entry for argument in arguments.split()) for entry in entries), name


# -- what was measured --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "first"), [("matching", 3), ("matching-avx2", 7)])
def test_the_table_of_speed_ups_is_what_was_measured(folder, first, monkeypatch):
    """Four columns a machine: vmap, compile, seconds of compiling, and what `auto` takes with its share of the best."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    report = importlib.import_module("matching_report")
    content = report.load_rows(ROOT / "benchmarks" / "results" / folder)
    measured = {(row["model"], str(row["batch"])): row for row in content["rows"] if row["candidates"] == 8}
    section = text_of("docs/speed.md").split("### Speed-up")[1].split("### ")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    shown = {(cells[0], cells[1]): cells[first : first + 4] for cells in lines if cells[1].isdigit()}
    assert len(shown) == 20
    for name, cells in shown.items():
        row = measured.get(name)
        if row is None:
            assert cells == ["-"] * 4, name
            continue
        engines = [f"{report.speedup(e)(row):.2f}" if e in row["ms"] else "-" for e in ("vmap", "compile")]
        seconds = f"{row['setup_seconds']['compile']:.0f}" if "compile" in row["ms"] else "-"
        auto = f"{row['auto']['engine']}, {report.auto_share(row):.2f}"
        assert [cell.strip("*") for cell in cells] == [*engines, seconds, auto], name
        if cells[1].startswith("**"):
            asked = next(line[2] for line in lines if (line[0], line[1]) == name)
            assert report.speedup("compile")(row) >= float(asked)


# -- commands ------------------------------------------------------------------------------------------------------


def documented_commands() -> list[str]:
    """The options of every documented line that starts a run, each on one line and without comments."""
    commands = re.compile(r"^ *(?:breaching-ext|torchrun \S+ -m breaching_ext)(?= |$)(.*)$", re.M)
    found = []
    for page in PAGES:
        for line in commands.findall(page.read_text(encoding="utf-8").replace("\\\n", " ")):
            found.append(" ".join(shlex.split(line, comments=True)))
    return sorted(set(found))


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_compose_and_pass_the_checks(line, own_project):
    options = line.split()
    overrides = [option for option in options if "=" in option and not option.startswith("-")]
    if "--config-dir" in options:
        write_named(text_of("docs/own_project.md"), "yaml")
        overrides.append(f"hydra.searchpath=[file://{own_project / 'conf'}]")
    if "-m" in options:  # a sweep: its first job
        overrides = [re.sub(r"=([^,\[]+),.*", r"=\1", override) for override in overrides]
    with hydra.initialize_config_module("breaching.config", version_base="1.3"):
        cfg = hydra.compose("breaching_ext", overrides, return_hydra_config=True)
    cfg.case.impl.setdefault("dtype", "float")
    check_values(cfg)
    if cfg.attack.attack_type == "joint-candidates":
        checks.check_config(cfg.attack)
    elif cfg.attack.attack_type == "magia":
        MagiaOptions.from_config(cfg.attack)
