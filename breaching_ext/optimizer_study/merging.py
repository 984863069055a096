"""The results of a study, or of many machines, in one sheet and one table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .config import require
from .figures import panel_title, save_sheet
from .protocol import BEYOND, differences
from .records import OptimizerExperiment, saved_config
from .summary import data_of, merge_seeds, summarize, write_tables
from .variants import VARIANTS


def folders_to_merge(sources: str | Sequence[str] | None, out: str | Path) -> list[str | Path]:
    """The folders that a configuration's ``sources`` and ``out`` name; one source may stand without a list.

    Raises:
        ValueError: If a source is no folder: a study would be merged without it.
    """
    folders = [sources] if isinstance(sources, str) else sources or []
    require(isinstance(folders, Sequence), "sources", sources, "a folder, or a list of folders")
    for folder in folders:
        there = isinstance(folder, (str, Path)) and Path(folder).is_dir()
        require(there, "sources", folder, "a folder, or a list of folders")
    require(isinstance(out, (str, Path)) and str(out) != "", "out", out, "a folder, which need not be there")
    return [*folders, out]


def load_results(folders: Iterable[str | Path], beyond: bool = False) -> list[OptimizerExperiment]:
    """All grids below some folders, in the order of variants and seeds; the same file name counts once.

    Args:
        folders: Where to look.
        beyond: Load what was trained beyond the grids instead; there may be none.

    Raises:
        FileNotFoundError: If there is no grid.
        ValueError: If files of one name hold different studies.
    """
    folders = list(folders)
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(Path(folder).rglob("*_seed*.json")):
            if (path.parent.name == BEYOND) == beyond and not path.name.startswith("."):  # being written, or left so
                _same_study(found.setdefault(path.name, path), path)
    if not found and not beyond:
        raise FileNotFoundError(f"no results (*_seed*.json) below {', '.join(map(str, folders))}.")
    experiments = [OptimizerExperiment.load(path) for path in found.values()]
    order = list(VARIANTS)
    return sorted(experiments, key=lambda e: (order.index(e.optimizer_id), e.config["seed"]))


def _same_study(first: Path, other: Path) -> None:
    """Refuse two files of one name that hold different studies: only one of them could count."""
    if first == other:
        return
    a, b = ({**saved_config(path).get("study", {}), "device": None} for path in (first, other))
    require(a == b, "sources", str(other), f"folders without another study's {other.name} than {first}")


def merge_results(folders: Iterable[str | Path], out: str | Path) -> list[Path]:
    """Merge results, of one study or of many machines, into one sheet and one table.

    Args:
        folders: Where to look for results.
        out: Where ``heatmaps.png``, ``table.md`` and ``summary.json`` go.

    Returns:
        The three files.

    Raises:
        FileNotFoundError: If there is no grid.
        ValueError: If the files are of different studies, so that their losses do not compare.
    """
    folders = list(folders)
    experiments, beyond = load_results(folders), load_results(folders, beyond=True)
    by_variant: dict[str, list[OptimizerExperiment]] = {}
    for experiment in experiments:
        by_variant.setdefault(experiment.optimizer_id, []).append(experiment)
    _one_study(by_variant)
    merged = [merge_seeds(group) for group in by_variant.values()]
    rows = [summarize(group, beyond) for group in by_variant.values()]
    titles = [panel_title(one, row["coupling"], row["coupling_rows"]) for one, row in zip(merged, rows, strict=True)]
    sheet = save_sheet(merged, Path(out) / "heatmaps.png", titles=titles)
    return [sheet, *write_tables(rows, out)]


def _one_study(by_variant: Mapping[str, Sequence[OptimizerExperiment]]) -> None:
    """Refuse variants that were trained on other data or models: their losses share one sheet and one scale."""
    first_ones = ((name, group[0]) for name, group in by_variant.items() if "study" in group[0].config)
    studies = {name: one.config["study"] | data_of(one) for name, one in first_ones}
    for name, study in studies.items():
        first = next(iter(studies))
        differ = differences(study, studies[first])
        valid = f"results of one study: they differ in {', '.join(differ)} (take folders of one of them)"
        require(not differ, "sources", f"{first} and {name}", valid)
