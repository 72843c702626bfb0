"""Writing a checkpoint: each rank its own pieces, rank 0 the manifest last.

Called by the loop on all ranks. If one rank fails, all of them raise, nothing half-written stays,
and the checkpoints before are untouched.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from safetensors import SafetensorError
from safetensors.numpy import save_file

from llm_training_toolkit.checkpoint.manifest import NAME, FileEntry, Manifest, digest
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


def save(
    context: RunContext,
    directory: Path,
    pieces: Sequence[Piece],
    optimizer: torch.optim.Optimizer,
    describe: Describe,
) -> None:
    """Write the pieces of all ranks into `directory` and complete it with the manifest. Collective.

    Raises CheckpointError on every rank when any rank cannot write (a full disk, for example).
    """
    try:
        entry = _write_rank(context.rank, directory, pieces, optimizer)
        outcome: tuple[FileEntry | None, list[tuple[str, int, int]], str] = (entry, _index(pieces), "")
    except (OSError, SafetensorError) as error:
        outcome = (None, [], f"rank {context.rank}: {error}")
    outcomes = context.gather(outcome)
    failures = [text for _, _, text in outcomes if text]
    if not failures:
        failures = context.broadcast(_complete(context, directory, outcomes, describe))
    if failures:
        if context.is_first:
            shutil.rmtree(directory, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {directory} could not be written: {'; '.join(failures)}. "
            "The checkpoints before it are whole: remove the cause (free some space on a full disk), "
            "then give the same command again"
        )


def _write_rank(rank: int, directory: Path, pieces: Sequence[Piece], optimizer: torch.optim.Optimizer) -> FileEntry:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"fragments_{rank:05d}.safetensors"
    arrays = {
        f"{piece.name}@{piece.start}/{key}": tensor.cpu().numpy()
        for piece in pieces
        for key, tensor in piece.tensors(optimizer).items()
    }
    save_file(arrays, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return FileEntry(path.name, path.stat().st_size, digest(path))


def _index(pieces: Sequence[Piece]) -> list[tuple[str, int, int]]:
    return [(piece.name, piece.start, piece.count) for piece in pieces]


def _complete(
    context: RunContext,
    directory: Path,
    outcomes: Sequence[tuple[FileEntry | None, list[tuple[str, int, int]], str]],
    describe: Describe,
) -> list[str]:
    """On rank 0, check that the pieces add up and write the manifest; what went wrong comes back."""
    if not context.is_first:
        return []
    files = tuple(entry for entry, _, _ in outcomes if entry is not None)
    fragments = tuple((*piece, index) for index, (_, pieces, _) in enumerate(outcomes) for piece in pieces)
    manifest = describe(files, fragments)
    held: dict[str, list[tuple[int, int]]] = {}
    for name, start, count, _ in fragments:
        held.setdefault(name, []).append((start, count))
    wrong = [name for name, shape in manifest.shapes.items() if not _cover(held.get(name, []), math.prod(shape))]
    if wrong:
        return [f"the pieces of {', '.join(wrong[:3])} do not add up ({len(wrong)} parameters)"]
    try:
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
