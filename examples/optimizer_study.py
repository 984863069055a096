"""Adam + L2 against AdamW on a grid of learning rate and weight decay: two heat maps and a number.

    python examples/optimizer_study.py [--quick] [--out FOLDER]

Trains 2 × 144 small autoencoders on Fashion-MNIST, all 144 of a grid at once as one stacked model, and draws
the heat maps of Figure 2 of Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019). With
Adam + L2 a larger learning rate needs a smaller weight decay (coupling towards −1); with AdamW the two can be
chosen apart (near 0). About four minutes on one CPU core; ``--quick`` takes seconds and shows only how it is
used.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from breaching_ext.optimizer_study import run_grid
from breaching_ext.optimizer_study.coupling import coupling
from breaching_ext.optimizer_study.data import load_fashion_mnist
from breaching_ext.optimizer_study.figures import save_sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a 3 × 4 grid for a few epochs")
    parser.add_argument("--out", type=Path, default=Path("outputs/optimizer_study_example"))
    parser.add_argument("--data", default=None, help="folder with Fashion-MNIST's idx files")
    args = parser.parse_args()
    torch.set_num_threads(1)

    train, test = load_fashion_mnist(args.data, train_size=1024, test_size=512, pool=2)
    options = {"epochs": 100, "batch_size": 64}
    if args.quick:
        options |= {"epochs": 8, "lr_multipliers": [0.5, 1, 2], "wd_multipliers": [0, 1, 8, 32]}

    experiments = []
    for variant in ("A1", "B3"):  # both under the cosine schedule
        path = args.out / f"{variant}.json"
        experiment = run_grid(variant, "mlp", train, test, checkpoint=path.with_suffix(".partial"), **options)
        experiment.save(path)
        path.with_suffix(".partial").unlink(missing_ok=True)
        experiments.append(experiment)
        found = coupling(experiment)
        best = np.nanmin(experiment.get_heatmap_data()[0])  # chosen by the test images: a little too good
        print(f"{variant} {experiment.optimizer_name}: best final test loss {best:.4f}", end="; ")
        print(f"coupling {found.slope:+.2f} ± {found.standard_error:.2f} over {len(found.lr_multipliers)} rows")
    print("wrote", save_sheet(experiments, args.out / "heatmaps.png"))


if __name__ == "__main__":
    main()
