"""`breaching-ext-collect`: the metrics of a sweep as one CSV, one table with intervals and one plot.

    breaching-ext --multirun seed=0,10,20 attack=joint_candidates,seethroughgradients_group
    breaching-ext-collect multirun-or-outputs-folder

A run is a folder with a metrics.json. Runs that differ only in seed and client belong to one group. A run that failed
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
from typing import Any

from matplotlib.figure import Figure

from .evaluation.statistics import mean_interval, plus_minus
from .files import write_atomically

COLUMNS = (
    "folder", "attack", "case", "model", "num_data_points", "labels_known", "seed", "candidate_seed", "user_idx",
    "psnr", "worst_psnr", "ssim", "lpips", "mse", "label_acc", "opt_value", "seconds", "gradient_evaluations", "engine",
    "device", "overrides", "error",
)  # fmt: skip
CONFIG_NAME = "breaching_ext"  # of the application, see cli.py
_REPEATED = ("seed", "candidate_seed", "user_idx")
_REPEATS = ("seed", "case.user.user_idx", "attack.restarts.seed")


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Return one row a run found below `folder`, in path order, with the keys of :data:`COLUMNS`."""
    homes = {path.parent for path in folder.rglob("metrics.json")}
    homes |= {path.parent for path in folder.rglob(".hydra") if _is_of_a_run(path)}
    rows = (_row(home, folder) for home in sorted(homes))
    return [row for row in rows if row is not None]


def _is_of_a_run(hydra: Path) -> bool:
    """Whether Hydra made a folder for a run of ours; studies and other programs write no metrics.json."""
    try:
        return f"config_name: {CONFIG_NAME}\n" in (hydra / "hydra.yaml").read_text(encoding="utf-8")
    except FileNotFoundError:
        return True  # killed before it was written


def _row(home: Path, root: Path) -> dict[str, Any] | None:
    """Return a run's row; None for a metrics.json of another program."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row["folder"] = str(home.relative_to(root))
    row["overrides"] = " ".join(sorted(_overrides(home)))
    failure = home / "error.json"
    file = failure if failure.exists() else home / "metrics.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {**row, "error": "no metrics.json: the run was killed or is still running"}
    except json.JSONDecodeError as error:
        return {**row, "error": f"{file.name} is damaged: {error}"}
    if not isinstance(record, dict) or not {"error", "attack"} & set(record):
        return None
    row.update({key: record[key] for key in COLUMNS if key in record})
    row["candidate_seed"] = ((record.get("config", {}).get("attack") or {}).get("restarts") or {}).get("seed")
    if record.get("interrupted"):  # also for want of memory
        row["error"] = "interrupted: its files hold the best so far"
    if "error" not in record and record.get("psnr") is None:
        row["error"] = row["error"] or "its PSNR is not finite"
    elif record.get("per_image", {}).get("psnr"):
        row["worst_psnr"] = min(record["per_image"]["psnr"])
    return row


def _overrides(home: Path) -> list[str]:
    """Return what the user changed, without what only repeats a run (seed, client)."""
    file = home / ".hydra" / "overrides.yaml"
    if not file.exists():
        return []
    lines = [line[2:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("- ")]
    return [line for line in lines if line.split("=")[0] not in _REPEATS]


def groups(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the finished runs by what they have in common: attack, case, model, batch size and overrides.

    Of runs with the same seeds and client, which say nothing new, the last one in path order counts: the newest.
    """
    found: dict[str, dict[tuple, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["error"] is None:
            name = f"{row['attack']}, {row['case']}, {row['model']}, B={row['num_data_points']}"
            name = f"{name} ({row['overrides']})" if row["overrides"] else name
            found[name][tuple(row.get(key) for key in _REPEATED)] = row
    return {name: list(members.values()) for name, members in found.items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a markdown table of means with 95 % intervals, and the failed runs below it."""
    lines = ["| runs | n | PSNR [dB] | worst image [dB] | SSIM | LPIPS | label acc. | seconds |", "|" + "---|" * 8]
    digits = {"psnr": 2, "worst_psnr": 2, "ssim": 3, "lpips": 3, "label_acc": 2, "seconds": 1}
    for name, members in groups(rows).items():
        cells = []
        for metric, places in digits.items():
            values = [m[metric] for m in members if m[metric] is not None]
            cells.append(plus_minus(values, places) if values else "-")
        lines.append(f"| {name} | {len(members)} | {' | '.join(cells)} |")
    failed = [row for row in rows if row["error"] is not None]
    again = len(rows) - len(failed) - sum(map(len, groups(rows).values()))
    lines += [f"\n{again} runs repeat another (same seeds and client) and do not count again."] if again else []
    lines += [f"\n{len(failed)} of {len(rows)} runs failed or were interrupted:"] if failed else []
    lines += [f"- {row['folder']}: {row['error']}" for row in failed]
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the PSNR of every run and each group's mean with its 95 % interval."""
    found = groups(rows)
    names = [textwrap.fill(name, 60) for name in found]
    lines = sum(max(2, 1 + name.count("\n")) for name in names)
    figure = Figure(figsize=(9, 1.2 + 0.25 * max(2, lines)), layout="constrained")
    axis = figure.subplots()
    for position, members in enumerate(found.values()):
        values = [m["psnr"] for m in members]
        mean, half = mean_interval(values)
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
    writer = csv.DictWriter(text, fieldnames=COLUMNS)
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
    rows = collect(folder)
    if not rows:
        print(f"No runs below {folder}: nothing there has a metrics.json or a .hydra folder.", file=sys.stderr)
        return 1
    print(table(rows))
    print(f"\nSaved to {folder}: runs.csv, table.md, psnr.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
