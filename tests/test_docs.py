"""What the pages say: links lead somewhere, code has what it imports, commands compose, names and figures are right."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import runpy
import shlex

import hydra
import pytest
from conftest import ROOT
from pages import PAGES, blocks, name_of, text_of, write_named

from breaching_ext.attacks import checks
from breaching_ext.attacks.magia_options import MagiaOptions
from breaching_ext.run_checks import check_values

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
def test_documented_commands_compose_and_pass_the_checks(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = line.split()
    overrides = [option for option in options if "=" in option and not option.startswith("-")]
    if "--config-dir" in options:
        write_named(text_of("docs/own_project.md"), "yaml")
        overrides.append(f"hydra.searchpath=[file://{tmp_path / 'conf'}]")
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
