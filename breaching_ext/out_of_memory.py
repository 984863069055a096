"""What running out of memory looks like: libraries raise it under many names."""

from __future__ import annotations

import torch

_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "api call failed",  # all that compiled code says when an operation fails that has worked before
    "cublas_status_alloc_failed",  # what follows is raised by CUDA's libraries in place of torch's own error
    "cudnn_status_alloc_failed",
    "unable to find an engine to execute this computation",
    "unable to find a valid cudnn algorithm",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device or the machine has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)
