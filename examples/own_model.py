"""An attack imported into a project of your own: your model, your loss, gradients that you observed. No simulation.

python examples/own_model.py
"""

import breaching
import torch
import torchvision

from breaching_ext.attacks import JointCandidateAttacker, observe
from breaching_ext.data import SamplePhotos
from breaching_ext.evaluation import evaluate
from breaching_ext.evaluation.figures import save_reconstruction

# Your model: the backbone is frozen, so clients send gradients of the rest only.
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 16, 3, padding=1),
    torch.nn.GELU(),
    torch.nn.Conv2d(16, 32, 3, stride=2, padding=1),
    torch.nn.GELU(),
    torch.nn.Flatten(),
    torch.nn.Linear(32 * 16 * 16, 8),
)
model[0].requires_grad_(False)
loss_fn = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

# What happens at the client, which the attacker never sees: two photos and their averaged gradient.
photos = SamplePhotos(transform=torchvision.transforms.ToTensor())
images, labels = torch.stack([photos[0][0], photos[2][0]]), torch.tensor([photos[0][1], photos[2][1]])
trainable = [p for p in model.parameters() if p.requires_grad]
gradients = torch.autograd.grad(loss_fn(model(images), labels), trainable)

# The attack: from the model and the gradients alone.
payload, shared = observe(model, gradients, shape=(3, 32, 32), num_data_points=2, classes=8, labels=labels)
options = ["optim.max_iterations=300", "restarts.num_trials=3", "regularization.group_regularization.warmup_iters=150"]
cfg = breaching.get_attack_config("joint_candidates", overrides=options)
attacker = JointCandidateAttacker(model, loss_fn, cfg)
reconstruction, stats = attacker.reconstruct(payload, shared)

result = evaluate(reconstruction["data"].double(), images.double(), reconstruction["labels"], labels)
save_reconstruction("own_model.png", images, reconstruction["data"][result.order].clamp(0, 1), result.per_image["psnr"])
print(f"mean PSNR {result.means['psnr']:.1f} dB; see own_model.png")
