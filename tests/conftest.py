"""Shared test settings: one thread a process, so that timings and results do not depend on the machine."""

import torch

torch.set_num_threads(1)
