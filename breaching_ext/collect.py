"""`breaching-ext-collect`: the metrics of a sweep as one CSV, one table with intervals and one plot.

    breaching-ext --multirun seed=0,10,20 attack=joint_candidates,seethroughgradients_group
    breaching-ext-collect multirun-or-outputs-folder

A run is a folder with a metrics.json. Runs that differ only in seed and client belong to one group. Where seeds and
clients are crossed, intervals are those of the means of seeds or of clients, whichever is wider. A run that failed
(also where an error.json lies beside the metrics of an earlier run) or was interrupted is a row that says why, and a
folder that Hydra made but that holds no metrics.json is a run that was killed.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from .errors import first_line
from .files import write_atomically
from .intervals import mean_interval, plus_minus
from .run_rows import COLUMNS, REPEATED, read_runs


def groups(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the finished runs by what they have in common: the settings in metrics.json, without seeds and client.

    A group is named by attack, case, model, batch size and overrides; where that is not enough, by what differs.
    Of runs with the same seeds and client, which say nothing new, the last one in path order counts: the newest.
    """
    found: dict[str, dict[tuple, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["error"] is None:
            found[_experiment(row)][tuple(row.get(key) for key in REPEATED)] = row
    members = [list(runs.values()) for runs in found.values()]
    alike: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for group in members:
        alike[_name(group[-1])].append(group)
    return {f"{name}{mark}": group for name, same in alike.items() for mark, group in _told_apart(same)}


def _experiment(row: dict[str, Any]) -> str:
    """What a run is one of: its settings, or, in files of other programs that hold none, its name."""
    return json.dumps(row["settings"], sort_keys=True) if row.get("settings") else _name(row)


def _name(row: dict[str, Any]) -> str:
    name = f"{row['attack']}, {row['case']}, {row['model']}, B={row['num_data_points']}"
    return f"{name} ({row['overrides']})" if row["overrides"] else name


def _told_apart(same: list[list[dict[str, Any]]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return groups of one name with what tells them apart, in brackets."""
    settings = [group[-1].get("settings") or {} for group in same]
    keys = sorted(set().union(*settings))
    differ = [key for key in keys if len({json.dumps(s.get(key), sort_keys=True) for s in settings}) > 1]
    marks = [", ".join(f"{key}={json.dumps(s.get(key))}" for key in differ) for s in settings]
    return [(f" [{mark}]" if mark else "", group) for mark, group in zip(marks, same, strict=True)]


def independent(members: Sequence[dict[str, Any]], metric: str) -> list[float]:
    """Return values of a metric whose t-interval is honest, from runs over seeds and clients.

    Runs of one client share its images, runs of one seed the model and the starts. Where runs cross both, they are no
    independent draws; so the means of clients and of seeds are taken, whichever spread wider as means.
    """
    known = [m for m in members if m[metric] is not None]
    ways = [[m[metric] for m in known]]
    for key in ("seed", "user_idx"):
        by: dict[Any, list[float]] = defaultdict(list)
        for member in known:
            by[member.get(key)].append(member[metric])
        if 1 < len(by) < len(known):
            ways.append([fmean(values) for values in by.values()])
    return max(ways, key=lambda values: mean_interval(values)[1]) if len(ways) > 1 else ways[0]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a markdown table of means with 95 % intervals, and the failed runs below it."""
    lines = ["| runs | n | PSNR [dB] | worst image [dB] | SSIM | LPIPS | label acc. | seconds |", "|" + "---|" * 8]
    digits = {"psnr": 2, "worst_psnr": 2, "ssim": 3, "lpips": 3, "label_acc": 2, "seconds": 1}
    for name, members in groups(rows).items():
        cells = []
        for metric, places in digits.items():
            values = independent(members, metric)
            cells.append(plus_minus(values, places) if values else "-")
        lines.append(f"| {_in_a_cell(name)} | {len(members)} | {' | '.join(cells)} |")
    failed = [row for row in rows if row["error"] is not None]
    again = len(rows) - len(failed) - sum(map(len, groups(rows).values()))
    lines += [f"\n{again} runs repeat another (same seeds and client) and do not count again."] if again else []
    lines += [f"\n{len(failed)} of {len(rows)} runs failed or were interrupted:"] if failed else []
    lines += [f"- {row['folder']}: {row['error']}" for row in failed]
    return "\n".join(lines)


def _in_a_cell(text: str) -> str:
    """Return text as a cell of a markdown table holds it: in one line, without its mark between cells."""
    return " ".join(text.split()).replace("|", "\\|")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the PSNR of every run and each group's mean with its 95 % interval."""
    found = groups(rows)
    names = [textwrap.fill(name, 60).replace("$", r"\$") for name in found]
    lines = sum(max(2, 1 + name.count("\n")) for name in names)
    figure = Figure(figsize=(9, 1.2 + 0.25 * max(2, lines)), layout="constrained")
    axis = figure.subplots()
    for position, members in enumerate(found.values()):
        values = [m["psnr"] for m in members]
        mean, half = mean_interval(independent(members, "psnr"))
        axis.plot(values, [position] * len(values), "o", color="tab:blue", alpha=0.4)
        axis.errorbar(mean, position, xerr=half, fmt="s", color="black", capsize=3)
    axis.set_yticks(range(len(found)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("PSNR [dB], mean with 95 % interval")
    write_atomically(path, lambda target: figure.savefig(target, dpi=150))


def collect(folder: Path) -> list[dict[str, Any]]:
    """Read all runs below a folder and write runs.csv, table.md and psnr.png into it; returns the rows."""
    rows = read_runs(folder)
    if not rows:
        return rows
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "runs.csv", lambda target: target.write_text(text.getvalue(), encoding="utf-8"))
    write_atomically(folder / "table.md", lambda target: target.write_text(table(rows) + "\n", encoding="utf-8"))
    plot(rows, folder / "psnr.png")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="breaching-ext-collect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs"), help="default: outputs")
    folder = parser.parse_args(arguments).folder
    try:
        rows = collect(folder)
    except OSError as error:
        print(f"{folder}: the files could not be written ({first_line(error)}).", file=sys.stderr)
        return 1
    if not rows:
        print(f"No runs below {folder}: nothing there has a metrics.json or a .hydra folder.", file=sys.stderr)
        return 1
    print(table(rows))
    print(f"\nSaved to {folder}: runs.csv, table.md, psnr.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
