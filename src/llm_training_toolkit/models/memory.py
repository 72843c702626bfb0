"""Detection of out-of-memory errors."""

from __future__ import annotations

import torch

# Messages of torch, cuBLAS and NCCL that have no exception class: on CPU, and outside torch's allocator.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 'out of memory'",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that the memory of the device is full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
