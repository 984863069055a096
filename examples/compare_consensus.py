"""Sequential best-of-N against joint candidates, with and without consensus, at equal gradient evaluations.

    python examples/compare_consensus.py                      # the committed study
    python examples/compare_consensus.py --seeds 2 --iterations 50 --out /tmp/short

Every arm gets N x iterations gradient evaluations on the same gradient. A seed fixes the model's weights, the client
and the starts. Nothing is chosen with the ground truth: the score of the attack decides which candidate is reported.
Results are kept in rows.json after every run, so the study can be stopped and resumed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import warnings
from pathlib import Path

import breaching
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from breaching_ext.environment import seed_everything, versions
from breaching_ext.evaluation import evaluate, to_images
from breaching_ext.files import write_atomically, write_json
from breaching_ext.intervals import mean_interval, plus_minus
from breaching_ext.registration import register

N, CLIENTS = 4, 16  # candidates; clients of case=sample_photos
GROUP = "attack.regularization.group_regularization"
#: arm -> overrides; the reference is the first one
ARMS = {
    "sequential best-of-N": ["attack.restarts.parallel_candidates=false", f"{GROUP}.scale=0"],
    "joint, no consensus": [f"{GROUP}.scale=0"],
    "joint, pixel-mean consensus": [f"{GROUP}.scale=0.01"],
    "joint, registered consensus": [f"{GROUP}.scale=0.01", f"{GROUP}.aligner=ransac_flow", f"{GROUP}.update_every=50"],
    "joint, consensus x10": [f"{GROUP}.scale=0.1"],
    "joint, output=consensus": [f"{GROUP}.scale=0.01", "attack.restarts.output=consensus"],
    "one candidate, N x iterations": ["attack.restarts.num_trials=1", f"{GROUP}.scale=0"],
}
METRICS = ("psnr", "worst_psnr", "ssim", "lpips")


def run_arm(arm: str, batch: int, seed: int, iterations: int) -> dict:
    """Return the metrics of one arm for one seed."""
    steps = iterations * N if "attack.restarts.num_trials=1" in ARMS[arm] else iterations
    overrides = [
        "case=sample_photos",
        "attack=joint_candidates",
        f"case.user.num_data_points={batch}",
        f"case.user.user_idx={seed}",
        f"attack.restarts.num_trials={N}",
        f"attack.restarts.seed={1000 * seed}",
        f"attack.optim.max_iterations={steps}",
        f"{GROUP}.warmup_iters={iterations // 2}",
        "attack.restarts.candidate_batching=vmap",  # not chosen by a clock: engines round differently
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        cfg = breaching.get_config(overrides=_merge(overrides, ARMS[arm]))
    seed_everything(seed)
    user, server, model, loss_fn = breaching.cases.construct_case(cfg.case)
    attacker = breaching.attacks.prepare_attack(model, loss_fn, cfg.attack)
    shared, payloads, true = server.run_protocol(user)
    result, run_stats = attacker.reconstruct(payloads, shared, server.secrets)
    if run_stats["interrupted"]:  # its best so far would stand among the finished runs, and not be made again
        raise KeyboardInterrupt
    mean, std = cfg.case.data.mean, cfg.case.data.std
    found = evaluate(to_images(result["data"], mean, std), to_images(true["data"], mean, std))
    return {
        "arm": arm,
        "batch": batch,
        "seed": seed,
        "psnr": found.means["psnr"],
        "worst_psnr": min(found.per_image["psnr"]),
        "ssim": found.means["ssim"],
        "lpips": found.means["lpips"],
        "score": float(result["candidate_scores"].min()),
        "engine": run_stats["engine"],
        "gradient_evaluations": run_stats["gradient_evaluations"],
        "alignment_failures": run_stats.get("alignment_failures", 0),
        "alignments": run_stats.get("alignments", 0),
    }


def _merge(overrides: list[str], more: list[str]) -> list[str]:
    """Hydra refuses a key that is given twice; the arm's value wins."""
    keyed = {item.split("=")[0]: item for item in [*overrides, *more]}
    return list(keyed.values())


def table(rows: list[dict]) -> str:
    """Return a markdown table: means with intervals, and the paired difference to the reference."""
    reference = next(iter(ARMS))
    lines = ["| B | arm | PSNR [dB] | against sequential [dB] | worst image [dB] | SSIM | LPIPS |", "|" + "---|" * 7]
    for batch in sorted({row["batch"] for row in rows}):
        base = {r["seed"]: r["psnr"] for r in rows if r["batch"] == batch and r["arm"] == reference}
        for arm in ARMS:
            mine = [r for r in rows if r["batch"] == batch and r["arm"] == arm]
            if not mine:
                continue
            cells = []
            for metric in METRICS:
                values = [r[metric] for r in mine if r[metric] is not None]
                digits = 2 if "psnr" in metric else 3
                cells.append(plus_minus(values, digits) if values else "-")
            differences = [r["psnr"] - base[r["seed"]] for r in mine if r["seed"] in base]
            gain = "reference" if arm == reference else plus_minus(differences, 2, sign=True)
            lines.append(f"| {batch} | {arm} | {cells[0]} | {gain} | {cells[1]} | {cells[2]} | {cells[3]} |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """Draw every arm's paired PSNR difference to the sequential arm, seed by seed, with its interval."""
    batches = sorted({row["batch"] for row in rows})
    figure = Figure(figsize=(6.2 * len(batches), 3.4), layout="constrained")
    reference, *others = ARMS
    for axis, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        base = {r["seed"]: r["psnr"] for r in rows if r["batch"] == batch and r["arm"] == reference}
        for position, arm in enumerate(others):
            gains = [r["psnr"] - base[r["seed"]] for r in rows if r["batch"] == batch and r["arm"] == arm]
            mean, half = mean_interval(gains)
            axis.plot(gains, [position] * len(gains), "o", color="tab:blue", alpha=0.4, markersize=4)
            axis.errorbar(mean, position, xerr=half, fmt="s", color="black", capsize=3, markersize=4)
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set_yticks(range(len(others)), others)
        axis.invert_yaxis()
        axis.set_xlabel(f"PSNR gain over {reference} [dB]\nB = {batch}, bars: 95 % interval")
    write_atomically(path, lambda target: figure.savefig(target, dpi=150))


def main() -> None:
    """Run what is missing, then write the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4])
    parser.add_argument("--iterations", type=int, default=400, help="iterations of each of the N candidates")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compare_consensus")
    args = parser.parse_args()
    if not 1 <= args.seeds <= CLIENTS:
        parser.error(f"--seeds {args.seeds} is not possible: a seed is a client; valid: 1 to {CLIENTS}")
    warnings.filterwarnings("ignore")
    register()
    file = args.out / "rows.json"
    known = json.loads(file.read_text()) if file.exists() else {"iterations": args.iterations, "rows": []}
    if known["iterations"] != args.iterations:
        parser.error(f"{file} has runs of {known['iterations']} iterations; choose another --out")
    rows = known["rows"]
    done = {(r["arm"], r["batch"], r["seed"]) for r in rows}
    jobs = [(arm, b, s) for b in args.batch_sizes for s in range(args.seeds) for arm in ARMS if (arm, b, s) not in done]
    if jobs and not all("engine" in row for row in rows):
        parser.error(f"{file} has runs of an earlier version, whose engine a clock chose; choose another --out")
    for job in tqdm(jobs, desc="runs"):
        rows.append(run_arm(*job, args.iterations))
        write_json(file, {"iterations": args.iterations, "candidates": N, "versions": versions(), "rows": rows})
    write_atomically(args.out / "table.md", lambda target: target.write_text(table(rows) + "\n"))
    plot(rows, args.out / "gain.png")
    print(table(rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
