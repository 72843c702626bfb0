"""Writing a checkpoint: each rank its own pieces behind the training, rank 0 the manifest last.

    begin     copies the pieces out of the device; a thread writes, syncs and sums them up
    finish    once every rank's thread is done: ranks tell each other, rank 0 writes the manifest

Threads never talk to other ranks, so they cannot get between the exchanges of the training. If one rank fails, all of
them raise, nothing half-written stays, and the checkpoints before are untouched.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, NamedTuple, Protocol

from safetensors import SafetensorError
from safetensors.numpy import save_file

from llm_training_toolkit.checkpoint.manifest import NAME, FileEntry, Manifest, digest
from llm_training_toolkit.checkpoint.reading import Array
from llm_training_toolkit.context import RunContext
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs import write_atomically

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Piece(Protocol):
    """A consecutive piece of a flattened parameter; the engine's Fragment is one."""

    @property
    def name(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def count(self) -> int: ...
    def tensors(self, optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]: ...


Describe = Callable[[tuple[FileEntry, ...], tuple[tuple[str, int, int, int], ...]], Manifest]
"""Makes the manifest once files and fragments are known."""


class Outcome(NamedTuple):
    """What became of a rank's part: its file and pieces, or why there is none."""

    entry: FileEntry | None
    pieces: list[tuple[str, int, int]]
    failure: str = ""


class Writing:
    """This rank's part of a checkpoint on its way to storage."""

    def __init__(self, rank: int, directory: Path, pieces: Sequence[Piece], optimizer: torch.optim.Optimizer) -> None:
        self.directory = directory
        self._path = directory / _name(rank)
        index = [(piece.name, piece.start, piece.count) for piece in pieces]
        arrays = {
            f"{piece.name}@{piece.start}/{key}": tensor.detach().to("cpu", copy=True).numpy()
            for piece in pieces
            for key, tensor in piece.tensors(optimizer).items()
        }
        self._outcome: Future[Outcome] = Future()
        # A daemon: a process that has to end does not wait for a part that nobody will complete.
        Thread(target=self._run, args=(rank, arrays, index), daemon=True, name="checkpoint").start()

    @property
    def is_done(self) -> bool:
        """Whether this rank's part is written, or has failed."""
        return self._outcome.done()

    @property
    def size(self) -> int:
        """Bytes of this rank's file so far."""
        try:
            return self._path.stat().st_size
        except OSError:
            return 0

    def outcome(self) -> Outcome:
        """Wait for the end and say what became of the part."""
        return self._outcome.result()

    def _run(self, rank: int, arrays: Mapping[str, Array], index: list[tuple[str, int, int]]) -> None:
        try:
            self._outcome.set_result(Outcome(_write(rank, self.directory, arrays), index))
        except MemoryError:
            self._outcome.set_result(Outcome(None, [], f"rank {rank}: the memory of its machine is full"))
        except (OSError, SafetensorError) as error:
            self._outcome.set_result(Outcome(None, [], f"rank {rank}: {error}"))
        except Exception as error:  # noqa: BLE001 - the edge of a thread: raised again where the outcome is asked for
            self._outcome.set_exception(error)


def finish(context: RunContext, writing: Writing, describe: Describe) -> None:
    """Wait for every rank's part and complete the checkpoint with the manifest. Collective.

    Raises CheckpointError on every rank when any rank could not write (a full disk, for example).
    """
    directory = writing.directory
    outcomes = context.gather(writing.outcome())
    failures = [outcome.failure for outcome in outcomes if outcome.failure]
    if not failures:
        failures = context.broadcast(_complete(context, directory, outcomes, describe))
    if failures:
        if context.is_first:
            _remove_unfinished(directory)
        raise CheckpointError(
            f"checkpoint {directory} could not be written: {'; '.join(failures)}. "
            "The checkpoints before it are whole: remove the cause (free some space on a full disk), "
            "then give the same command again"
        )


def _remove_unfinished(directory: Path) -> None:
    if not (directory / NAME).exists():
        shutil.rmtree(directory, ignore_errors=True)


def _name(rank: int) -> str:
    return f"fragments_{rank:05d}.safetensors"


def _write(rank: int, directory: Path, arrays: Mapping[str, Array]) -> FileEntry:
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / NAME).exists():
        raise FileExistsError(f"{directory} is a complete checkpoint")
    path = directory / _name(rank)
    save_file(dict(arrays), path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return FileEntry(path.name, path.stat().st_size, digest(path))


def _complete(context: RunContext, directory: Path, outcomes: Sequence[Outcome], describe: Describe) -> list[str]:
    """On rank 0, check that the pieces add up and write the manifest; what went wrong comes back."""
    if not context.is_first:
        return []
    files = tuple(outcome.entry for outcome in outcomes if outcome.entry is not None)
    fragments = tuple((*piece, number) for number, outcome in enumerate(outcomes) for piece in outcome.pieces)
    manifest = describe(files, fragments)
    held: dict[str, list[tuple[int, int]]] = {}
    for name, start, count, _ in fragments:
        held.setdefault(name, []).append((start, count))
    wrong = [name for name, shape in manifest.shapes.items() if not _cover(held.get(name, []), math.prod(shape))]
    if wrong:
        return [f"the pieces of {', '.join(wrong[:3])} do not add up ({len(wrong)} parameters)"]
    try:
        for entry in files:  # what a rank wrote where rank 0 does not see it is no checkpoint
            size = (directory / entry.name).stat().st_size
            if size != entry.size:
                return [f"{entry.name} has {size} bytes on rank 0, {entry.size} were written: is the storage shared?"]
        write_atomically(directory / NAME, manifest.to_json())
    except OSError as error:
        return [f"rank 0: {error}"]
    return []


def _cover(pieces: Sequence[tuple[int, int]], size: int) -> bool:
    """Whether pieces (start, count) lie end to end from 0 to `size`, without a gap or an overlap."""
    end = 0
    for start, count in sorted(pieces):
        if start != end:
            return False
        end += count
    return end == size
