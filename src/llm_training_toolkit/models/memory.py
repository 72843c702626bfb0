"""Detection of out-of-memory errors, and the allocator setting that wastes less of a GPU's memory."""

from __future__ import annotations

import os
import re

import torch

# Messages of torch, CUDA's libraries and NCCL that have no exception class: on CPU, and outside torch's allocator.
# cuBLAS creates its handle at the first product, and says "not initialized" if that finds no memory. Growing segments
# ask the driver itself; Triton loads its kernels by the driver, too.
_OUT_OF_MEMORY = re.compile(
    "|".join(
        (
            "DefaultCPUAllocator: can't allocate memory",
            "DefaultCPUAllocator: not enough memory",
            "bad_alloc",
            "(CUDA|HIP)( driver)? error: out of memory",
            r"Triton Error \[(CUDA|HIP)\]: out of memory",
            "(CUDA|HIP) out of memory",
            "CUBLAS_STATUS_ALLOC_FAILED",
            "CUBLAS_STATUS_NOT_INITIALIZED",
            "CUDNN_STATUS_ALLOC_FAILED",
            "CUDNN_STATUS_INTERNAL_ERROR_(DEVICE|HOST)_ALLOCATION_FAILED",
            r"(Cuda|HIP) failure (\d+ )?'out of memory'",
        )
    )
)
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# Page-locked host memory is rounded up to powers of two otherwise (torch 2.13, CachingHostAllocator): an offloaded
# optimizer would take up to twice its size.
_ALLOCATOR_SETTINGS = "expandable_segments:True,pinned_max_round_threshold_mb:1"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that the memory of the device is full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def is_out_of_shared_memory(error: BaseException) -> bool:
    """Return whether a Triton kernel takes more of a multiprocessor than there is; smaller micro-batches do not help.

    The text is that of triton's `OutOfResources`, with its subject: shared memory, registers or tensor memory. Inductor
    writes a sentence of its own before it.
    """
    return "out of resource: " in str(error)


def set_allocator_options(device: torch.device) -> None:
    """Let a GPU's allocator grow its segments and round up little host memory, unless the environment has options.

    The number of loss tokens differs from step to step. Blocks of fixed size would leave gaps that fit no other step.
    """
    if device.type != "cuda" or any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        return
    os.environ[_ALLOCATOR_VARIABLES[0]] = _ALLOCATOR_SETTINGS  # for processes started from here
    # torch may have read the environment before: Ray Train chooses the GPU before this code runs.
    torch._C._accelerator_setAllocatorSettings(_ALLOCATOR_SETTINGS)  # noqa: SLF001 - its only name
