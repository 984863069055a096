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
import math
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

COLUMNS = (
    "folder", "attack", "case", "model", "num_data_points", "labels_known", "seed", "candidate_seed", "user_idx",
    "psnr", "worst_psnr", "ssim", "lpips", "mse", "label_acc", "opt_value", "seconds", "gradient_evaluations", "engine",
    "device", "overrides", "error",
)  # fmt: skip
CONFIG_NAME = "breaching_ext"  # of the application, see cli.py
_REPEATED = ("seed", "candidate_seed", "user_idx")
_REPEATS = (
    "seed", "case.user.user_idx", "attack.restarts.seed", "name", "base_dir", "launch", "attack.impl.progress",
    "attack.impl.checkpoint_every", "attack.impl.checkpoint_path", "case.training.checkpoint_path",
    "case.training.cache_path",
)  # fmt: skip


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Return one row a run found below `folder`, in path order, with the keys of :data:`COLUMNS`."""
    homes = {path.parent for path in folder.rglob("metrics.json")}
    homes |= {path.parent for path in folder.rglob(".hydra") if _is_of_a_run(path)}
    rows = (_row(home, folder) for home in sorted(homes))
    return [row for row in rows if row is not None]


def _is_of_a_run(hydra: Path) -> bool:
    """Whether Hydra made a folder for a run of ours; studies and other programs write no metrics.json."""
    try:
        text = (hydra / "hydra.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return True  # killed before it was written, or damaged
    return f"config_name: {CONFIG_NAME}\n" in text or "config_name:" not in text  # killed while it was


def _row(home: Path, root: Path) -> dict[str, Any] | None:
    """Return a run's row; None for a metrics.json of another program."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row["folder"] = str(home.relative_to(root))
    row["overrides"] = _what_was_changed(_overrides(home))
    failure = home / "error.json"
    file = failure if failure.exists() else home / "metrics.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {**row, "error": "no metrics.json: the run was killed or is still running"}
    except (OSError, ValueError, RecursionError) as error:  # a folder, other bytes, other text, without end
        return {**row, "error": f"{file.name} is damaged: {first_line(error)}"}
    if not isinstance(record, dict) or not {"error", "attack"} & set(record):
        return None
    try:
        return _filled(dict(row), record)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:  # text where there should be a number
        return {**row, "error": f"{file.name} is damaged: {first_line(error)}"}


def _filled(row: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Put what a metrics.json says into its row."""
    row.update({key: record[key] for key in COLUMNS if key in record})
    if "overrides" in record:  # the file beside it may be that of a later run in this folder
        row["overrides"] = _what_was_changed(record["overrides"])
    config = record.get("config") or {}
    row["candidate_seed"] = ((config.get("attack") or {}).get("restarts") or {}).get("seed")
    values = flattened(config).items()
    row["settings"] = {key: value for key, value in values if value is not None and not _says_nothing(key)}
    if record.get("interrupted"):
        why = "out of memory" if record.get("out_of_memory") else "interrupted"
        row["error"] = f"{why}: its files hold the best so far"
    if record.get("no_reconstruction"):
        row["error"] = row["error"] or "no candidate stayed finite: the result is zeros"
    if "error" not in record and not _finite(record.get("psnr")):
        row["error"] = row["error"] or "its PSNR is not finite"
    elif record.get("per_image", {}).get("psnr"):
        row["worst_psnr"] = min(record["per_image"]["psnr"])
    return row


def _overrides(home: Path) -> list[str]:
    """Return the overrides of the last run in a folder, as Hydra wrote them."""
    try:
        text = (home / ".hydra" / "overrides.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # not there, or damaged
        return []
    return [line[2:].strip() for line in text.splitlines() if line.startswith("- ")]


def _finite(psnr: float | None) -> bool:
    return psnr is not None and math.isfinite(psnr)


def _what_was_changed(overrides: list[str]) -> str:
    """Return overrides as one text, without what only repeats a run (seed, client)."""
    return " ".join(sorted(line for line in overrides if not _says_nothing(line.lstrip("+").split("=")[0])))


def flattened(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a config's values by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, dict) and value
        flat.update(flattened(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value})
    return flat


def _says_nothing(key: str) -> bool:
    """Whether a key decides nothing, or only repeats a run (seed, client), so that runs that differ in it compare."""
    return key in _REPEATS or key.startswith(("hydra.", "hydra/"))


def groups(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the finished runs by what they have in common: the settings in metrics.json, without seeds and client.

    A group is named by attack, case, model, batch size and overrides; where that is not enough, by what differs.
    Of runs with the same seeds and client, which say nothing new, the last one in path order counts: the newest.
    """
    found: dict[str, dict[tuple, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["error"] is None:
            found[_experiment(row)][tuple(row.get(key) for key in _REPEATED)] = row
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
    rows = collect(folder)
    if not rows:
        print(f"No runs below {folder}: nothing there has a metrics.json or a .hydra folder.", file=sys.stderr)
        return 1
    print(table(rows))
    print(f"\nSaved to {folder}: runs.csv, table.md, psnr.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
