"""Run one of the bilevel experiments from its config and leave a JSON file and a figure.

    python examples/ssigd_bilevel.py convex
    python examples/ssigd_bilevel.py dsblo_small iterations=200 'seeds=[0,1]' --output outputs/ssigd

The configs are in config/ssigd; any of their keys can be overridden on the command line.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import OmegaConf

from breaching_ext.ssigd.experiments import Report, run_experiment
from breaching_ext.ssigd.history import write_json
from breaching_ext.ssigd.plots import plot_runs, save_figure

ROOT = Path(__file__).resolve().parents[1]


def config_folder() -> Path:
    """Return the configs of this source tree, or those of the installed package."""
    local = ROOT / "config" / "ssigd"
    return local if local.is_dir() else Path(str(files("breaching_ext.config.ssigd")))


def main() -> None:
    folder = config_folder()
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", choices=names)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--output", type=Path, help="default: where the published results are, which a run of another"
                        " config does not replace: with overrides outputs/ssigd")  # fmt: skip
    arguments = parser.parse_args()
    published = ROOT / "examples" / "results" / "ssigd"
    arguments.output = arguments.output or (Path("outputs/ssigd") if arguments.overrides else published)
    torch.set_num_threads(1)
    config = OmegaConf.merge(
        OmegaConf.load(folder / f"{arguments.config}.yaml"), OmegaConf.from_dotlist(arguments.overrides)
    )
    report = run_experiment(OmegaConf.to_container(config, resolve=True))
    runs = {label: result.thinned() for label, result in report.runs.items()}
    write_json(arguments.output / f"{arguments.config}.json", {**report.summary, "histories": runs})
    figure = plot_runs(report.runs, report.reference, title=arguments.config)
    save_figure(figure, arguments.output / f"{arguments.config}.png")
    print_table(report)
    print(f"written: {arguments.config}.json and {arguments.config}.png in {arguments.output}")


def print_table(report: Report) -> None:
    """Print medians and worst values of the rows, grouped by what they differ in besides the seed."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    keys = [key for key in ("dim", "algorithm") if key in report.summary["rows"][0]]
    for row in report.summary["rows"]:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for group, rows in groups.items():
        print(", ".join(f"{key} {value}" for key, value in zip(keys, group, strict=True)), f"({len(rows)} runs)")
        for key, value in rows[0].items():
            if isinstance(value, float):
                values = [row[key] for row in rows]
                print(f"  {key:22s} median {median(values):.3e}   worst {max(values):.3e}")


if __name__ == "__main__":
    main()
