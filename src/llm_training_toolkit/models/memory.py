"""Recognizing that a device ran out of memory."""

from __future__ import annotations

import torch

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 'out of memory'",
)
"""What torch, cuBLAS and NCCL say where there is no exception class for it: on CPU, and outside torch's allocator."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of the device is full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
