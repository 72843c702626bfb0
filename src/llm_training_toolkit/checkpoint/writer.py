"""Checkpoint writing: each rank its own fragments in the background, rank 0 the manifest last.

    AsyncWrite           copies the fragments out of the device; a thread writes, hashes and syncs them
    commit_checkpoint    once every rank's thread is done: gathers the results, rank 0 writes the manifest

Threads use no collectives, which would interleave with those of training. If one rank fails, all ranks raise, the
incomplete checkpoint is deleted, and earlier ones are untouched.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple, Protocol

from llm_training_toolkit.checkpoint.host_buffer import HostBuffer, compute_serialized_size, serialize_to_buffer
from llm_training_toolkit.checkpoint.layout import (
    FragmentIndex,
    build_layout,
    find_incomplete_parameters,
    index_fragments,
)
from llm_training_toolkit.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs.storage.storage import LocalStorage, Storage

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CHUNK_BYTES = 1 << 23  # written at a time
_DIRECT_IO_BLOCK_BYTES = mmap.PAGESIZE  # O_DIRECT takes only whole blocks, in memory and in the file


class ParameterShard(Protocol):
    """Consecutive range of a flattened parameter, such as the engine's `Fragment`."""

    @property
    def name(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def count(self) -> int: ...
    def get_tensors(self, optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]: ...


class WriteResult(NamedTuple):
    """Result of a rank's write: its file, or the failure."""

    entry: FileEntry | None
    failure: str = ""


def allocate_host_buffer(pieces: Sequence[ParameterShard], device: torch.device | None = None) -> HostBuffer:
    """Reserve memory for copies of these fragments, used by one `AsyncWrite` after another. Raises MemoryError.

    `device`: the GPU that holds them, or None.
    """
    keys = ("weights", "exp_avg", "exp_avg_sq")
    size = compute_serialized_size({_get_tensor_name(piece, key): piece.count for piece in pieces for key in keys})
    return HostBuffer(size, device)


class AsyncWrite:
    """Background write of this rank's part of a checkpoint."""

    def __init__(
        self,
        rank: int,
        directory: Path,
        pieces: Sequence[ParameterShard],
        optimizer: torch.optim.Optimizer,
        memory: HostBuffer,
        *,
        storage: Storage | None = None,
    ) -> None:
        """Copy the fragments into `memory`, which is in use until the result is known. Raises MemoryError."""
        self.directory, self.storage = directory, storage or LocalStorage()
        self._sent = 0
        self._path = directory / _get_file_name(rank)
        self.fragments = [(piece.name, piece.start, piece.count) for piece in pieces]
        """Parameter or slice, first index and length of each fragment."""
        tensors = {
            _get_tensor_name(piece, key): each for piece in pieces for key, each in piece.get_tensors(optimizer).items()
        }
        image, self._memory = serialize_to_buffer(tensors, memory), memory
        self._outcome: Future[WriteResult] = Future()
        # Daemon: a process that must end does not wait for a checkpoint that stays incomplete.
        Thread(target=self._run_write, args=(rank, image), daemon=True, name="checkpoint").start()

    @property
    def is_done(self) -> bool:
        """True once this rank's part is written or has failed."""
        return self._outcome.done()

    @property
    def bytes_written(self) -> int:
        """Bytes of this rank's file written so far, plus those uploaded so far if it goes to a store."""
        try:
            return self._path.stat().st_size + self._sent
        except OSError:
            return self._sent

    def wait_for_result(self) -> WriteResult:
        """Wait for the end of the write and return its result."""
        return self._outcome.result()

    def _run_write(self, rank: int, image: memoryview) -> None:
        try:
            self._memory.wait_for_copies()
            entry = _write_file(self._path, image)
            self.storage.upload_checkpoint_file(self._path, self._add_sent_bytes)
            self._outcome.set_result(WriteResult(entry))
        except MemoryError:
            self._outcome.set_result(WriteResult(None, f"rank {rank}: the memory of its machine is full"))
        except OSError as error:
            self._outcome.set_result(WriteResult(None, f"rank {rank}: {error}"))
        except Exception as error:  # noqa: BLE001 - the edge of a thread: raised again where the outcome is asked for
            self._outcome.set_exception(error)

    def _add_sent_bytes(self, count: int) -> None:
        self._sent += count


def commit_checkpoint(context: RunContext, writing: AsyncWrite, manifest: Manifest) -> None:
    """Wait for every rank's part and commit the checkpoint with the manifest, given without files. Collective.

    Raises CheckpointError on every rank when any rank could not write (a full disk, for example).
    """
    directory, storage = writing.directory, writing.storage
    mine = (writing.wait_for_result(), index_fragments(writing.fragments, manifest.stored_shapes))
    written = context.gather_object(mine)
    failures = context.broadcast_object(_commit_manifest(writing, manifest, written) if written else [])
    if failures:
        if context.is_rank_zero:
            _delete_incomplete(directory, storage)
        raise CheckpointError(
            f"checkpoint {storage.get_uri(directory)} could not be written: {'; '.join(failures)}. "
            "The checkpoints before it are whole: remove the cause (free some space on a full disk), "
            "then give the same command again"
        )


def _delete_incomplete(directory: Path, storage: Storage) -> None:
    if not (directory / MANIFEST_NAME).exists():
        with suppress(OSError):  # a store that refuses writes also refuses deletes; the next start deletes
            storage.delete_checkpoint(directory)


def _get_file_name(rank: int) -> str:
    return f"fragments_{rank:05d}.safetensors"


def _get_tensor_name(piece: ParameterShard, key: str) -> str:
    return f"{piece.name}@{piece.start}/{key}"


def _write_file(path: Path, image: memoryview) -> FileEntry:
    """Write and hash in one pass: the checksum is of the bytes meant to be written, and needs no second read."""
    summed = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    if (path.parent / MANIFEST_NAME).exists():
        raise FileExistsError(f"{path.parent} is a complete checkpoint")
    with path.open("wb", buffering=0) as file:
        _set_direct_io(file.fileno(), on=True)
        while image:
            written = _write_chunk(file.fileno(), image)
            summed.update(image[:written])
            image = image[written:]
        os.fsync(file.fileno())
        return FileEntry(path.name, file.tell(), summed.hexdigest())


def _write_chunk(file: int, image: memoryview) -> int:
    """Write up to `_CHUNK_BYTES` and return the number of bytes written."""
    piece = image[:_CHUNK_BYTES]
    if len(piece) % _DIRECT_IO_BLOCK_BYTES == 0:
        try:
            return os.write(file, piece)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL = larger blocks needed, or the last write ended inside one
                raise
    _set_direct_io(file, on=False)
    return os.write(file, piece)


def _set_direct_io(file: int, *, on: bool) -> None:
    """Switch O_DIRECT on or off; a file system without it stays as it is.

    For 1.2 GB on a virtual machine the page cache cost 3 s of a processor, bypassing it nearly nothing. Bypassing it
    also keeps the training data in the cache.
    """
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    with suppress(OSError):
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)


def _commit_manifest(
    writing: AsyncWrite, manifest: Manifest, written: Sequence[tuple[WriteResult, FragmentIndex]]
) -> list[str]:
    """Check on rank 0 that the fragments cover every parameter, commit the manifest, and return the failures."""
    if failures := [result.failure for result, _ in written if result.failure]:
        return failures
    files = tuple(result.entry for result, _ in written if result.entry is not None)
    shapes = manifest.stored_shapes
    manifest = replace(manifest, files=files, layout=build_layout([index for _, index in written], shapes))
    if wrong := find_incomplete_parameters(manifest.layout, shapes):
        return [f"the pieces of {', '.join(wrong[:3])} do not add up ({len(wrong)} parameters)"]
    directory, storage = writing.directory, writing.storage
    try:
        sizes = storage.read_file_sizes(directory)
        for entry in files:  # every file must be visible to rank 0
            size = sizes.get(entry.name, 0)
            if size != entry.size:
                return [f"{entry.name} has {size} bytes on rank 0, {entry.size} were written: is the storage shared?"]
        storage.commit_manifest(directory / MANIFEST_NAME, manifest.to_json())
    except OSError as error:
        return [f"rank 0: {error}"]
    return []
