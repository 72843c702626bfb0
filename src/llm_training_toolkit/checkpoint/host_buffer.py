"""Serialization of a rank's checkpoint file into host memory, the only part of a save that a step waits for.

The format is safetensors: length of the header, header in JSON, values of one tensor after another. From a GPU the
values are copied by a stream of their own into page-locked memory: the process continues, the GPU's next kernels wait.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for all devices of the process


class HostBuffer:
    """Host memory reused for one serialized checkpoint file after another.

    A thread touches its pages during the first steps, because the kernel clears fresh memory page by page at the first
    write. On a virtual machine 1.2 GB took 0.5 to 4 s while the step waited, the copy itself 0.2 s.
    """

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        """Reserve `size` bytes; larger requests grow the buffer. Raises MemoryError.

        `device`: a GPU that values are copied from, or None.
        """
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pages = _map_anonymous_memory(size)
        self._touching = Thread(target=self._prepare_pages, daemon=True, name="checkpoint memory")
        self._touching.start()

    def get_view(self, size: int) -> memoryview:
        """Return a view of `size` bytes; previous contents are lost. Raises MemoryError."""
        self._touching.join()
        if len(self._pages) < size:
            self._pages = _map_anonymous_memory(size)  # not page-locked: only a checkpoint of another size comes here
        return memoryview(self._pages)[:size]

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Let copies into the buffer inside the block follow earlier work of the device, and later work follow them."""
        if self._device is None:
            yield
            return
        import torch  # noqa: PLC0415 - whoever reads checkpoints needs no torch

        main = torch.cuda.current_stream(self._device)
        self._stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            yield
        main.wait_stream(self._stream)  # an update must not overwrite what is being copied

    def wait_for_copies(self) -> None:
        """Wait until the buffer holds what was copied."""
        if self._stream is not None:
            self._stream.synchronize()

    def _prepare_pages(self) -> None:
        _touch_pages(self._pages)
        if self._device is not None:
            self._locked_pages = self._pages  # must stay mapped while CUDA knows them
            _lock_pages(self._locked_pages, self._device)


def serialize_to_buffer(tensors: Mapping[str, Tensor], memory: HostBuffer) -> memoryview:
    """Serialize flat fp32 tensors as a safetensors file, whole after `memory.wait_for_copies`. Raises MemoryError."""
    import torch  # noqa: PLC0415 - whoever reads checkpoints needs no torch

    offsets, end = {}, 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        offsets[name] = (end, end + 4 * tensor.numel())
        end += 4 * tensor.numel()
    header = _build_header(offsets)
    image = memory.get_view(len(header) + end)
    image[: len(header)] = header
    with memory.copying():
        for name, tensor in tensors.items():
            at = len(header) + offsets[name][0]
            values = torch.frombuffer(image, dtype=torch.float32, count=tensor.numel(), offset=at)
            values.copy_(tensor.detach(), non_blocking=True)
    return image


def compute_serialized_size(names: Mapping[str, int]) -> int:
    """Return the bytes to reserve for a file of tensors with the given numbers of values."""
    largest = (2**40, 2**41)  # as many digits as any offset and shape below 2 TB has
    return len(_build_header(dict.fromkeys(names, largest))) + 4 * sum(names.values())


def _build_header(offsets: Mapping[str, tuple[int, int]]) -> bytes:
    """Build the beginning of the file, padded so that values begin at a multiple of eight bytes."""
    entries = {
        name: {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}
        for name, (start, end) in offsets.items()
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _map_anonymous_memory(size: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(str(error)) from error


def _touch_pages(pages: mmap.mmap) -> None:
    """Write to every page; numpy releases the GIL meanwhile."""
    np.frombuffer(pages, dtype=np.uint8)[:: mmap.PAGESIZE] = 0


def _lock_pages(pages: mmap.mmap, device: torch.device) -> None:
    """Page-lock memory for copies from a GPU. If the system refuses it, copies are only slower."""
    import torch  # noqa: PLC0415 - as above

    with torch.cuda.device(device):  # a new thread would create a context on the first GPU
        address = np.frombuffer(pages, dtype=np.uint8).ctypes.data
        torch.cuda.cudart().cudaHostRegister(address, len(pages), _PORTABLE)  # type: ignore[no-untyped-call]
