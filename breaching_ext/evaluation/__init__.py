"""How good a reconstruction is: metrics with one-to-one assignment, figures, and the files of a run."""

from .metrics import Evaluation, assign, evaluate, psnr, ssim, to_images

__all__ = ["Evaluation", "assign", "evaluate", "psnr", "ssim", "to_images"]
