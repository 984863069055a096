"""Config-driven: Breaching's own calls, one of our attacks. Runs in about a minute on a laptop.

python examples/quickstart.py
"""

import breaching
import torch

from breaching_ext.evaluation import evaluate, to_images
from breaching_ext.evaluation.figures import save_reconstruction

cfg = breaching.get_config(
    overrides=[
        "case=sample_photos",
        "attack=joint_candidates",
        "attack.optim.max_iterations=500",
        "attack.regularization.group_regularization.warmup_iters=250",  # the consensus counts from then on
    ]
)
torch.manual_seed(0)
setup = {"device": torch.device("cuda" if torch.cuda.is_available() else "cpu"), "dtype": torch.float}

user, server, model, loss_fn = breaching.cases.construct_case(cfg.case, setup)
attacker = breaching.attacks.prepare_attack(model, loss_fn, cfg.attack, setup)
shared_data, payloads, true_data = server.run_protocol(user)
reconstruction, stats = attacker.reconstruct(payloads, shared_data, server.secrets)

mean, std = cfg.case.data.mean, cfg.case.data.std
data, true = to_images(reconstruction["data"], mean, std), to_images(true_data["data"], mean, std)
result = evaluate(data, true, reconstruction["labels"], true_data["labels"])
save_reconstruction("quickstart.png", true, data[result.order], result.per_image["psnr"])
print(f"{stats['engine']} engine, mean PSNR {result.means['psnr']:.1f} dB, SSIM {result.means['ssim']:.2f}")
print("See quickstart.png")
