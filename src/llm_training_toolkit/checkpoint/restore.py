"""Restoring a run from its newest valid checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from llm_training_toolkit.checkpoint import (
    CheckpointReader,
    UnknownFormatError,
    find_latest_checkpoint,
    list_complete_checkpoints,
    read_manifest,
)
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import WarningEvent
from llm_training_toolkit.distributed.heartbeat import Heartbeat
from llm_training_toolkit.engine import Engine, Fragment
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs.directory import RunDirectory


def find_latest_valid_checkpoint(run: RunDirectory, context: RunContext) -> CheckpointReader | None:
    """Return the newest undamaged checkpoint; quarantine damaged ones with a warning. Collective.

    Raises CheckpointError if the only checkpoint is damaged, OSError if the storage cannot be read.
    """
    while True:
        found = find_latest_checkpoint(run.checkpoints_dir) if context.is_rank_zero else None
        # The name, because the path of a run in an object store differs between ranks.
        name = context.broadcast_object(found.name if found else None)
        if name is None:
            return None
        directory = run.checkpoints_dir / name
        faults = _find_damage(run, directory, context)
        if not faults:
            return CheckpointReader(directory, run.storage)
        if (
            context.broadcast_object(len(list_complete_checkpoints(run.checkpoints_dir)) if context.is_rank_zero else 0)
            < 2
        ):
            raise CheckpointError(
                f"{faults[0]}: the only checkpoint of this run is damaged, and there is none before it. "
                f"Bring the file back, or delete {run.uri} to start again from step 0"
            )
        if context.is_rank_zero:
            where = run.storage.quarantine_checkpoint(directory)
            message = f"checkpoint {directory.name} is damaged ({faults[0]}); {where}"
            context.report(WarningEvent(f"{message}, and the one before it is used"))
        context.barrier()


def _find_damage(run: RunDirectory, directory: Path, context: RunContext) -> list[str]:
    """Return a checkpoint's damage; each file is read by one rank, and again by rank 0 if that rank finds damage.

    Only damage that rank 0 confirms counts. An OSError propagates on the rank that meets it: new workers are the remedy
    for storage that fails for a moment, or that does not yet show a node the writes of another.
    """
    unreadable = context.broadcast_object(_find_manifest_error(directory) if context.is_rank_zero else None)
    if unreadable:
        return [unreadable]
    checkpoint = CheckpointReader(directory, run.storage)
    mine = {}
    for number in range(context.rank, len(checkpoint.manifest.files), context.world_size):
        context.heartbeat.keepalive(f"checking file {number} of {directory.name}")
        if fault := checkpoint.verify_file(number):
            mine[number] = fault
    suspected = sorted(number for found in context.all_gather_object(tuple(mine)) for number in found)
    checked = (
        [fault for number in suspected if (fault := checkpoint.verify_file(number))] if context.is_rank_zero else []
    )
    damage = context.broadcast_object(checked)
    if mine and not damage:
        raise OSError(f"{next(iter(mine.values()))}, but rank 0 finds it whole: is it the same storage on this node?")
    return damage


def _find_manifest_error(directory: Path) -> str | None:
    """Return the manifest's error; None if it parses, and if all ranks are to refuse its format."""
    try:
        read_manifest(directory)
    except UnknownFormatError:
        return None
    except CheckpointError as error:
        return str(error)
    return None


def restore_engine(
    engine: Engine, checkpoint: CheckpointReader, *, optimizer: bool = True, heartbeat: Heartbeat | None = None
) -> None:
    """Load weights, and with `optimizer` Adam's state, into an engine of any ZeRO stage and number of ranks.

    Each rank reads the ranges it holds. Hyperparameters come from the configuration, not from the file. Collective.
    Raises CheckpointError when the checkpoint is of another model.
    """
    stored, wanted = dict(checkpoint.manifest.shapes), dict(engine.shapes)
    if stored != wanted:
        differing = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
        first = differing[0]
        raise CheckpointError(
            f"{checkpoint.directory}: not a checkpoint of this model: {first} is {stored.get(first, 'absent')} "
            f"there and {wanted.get(first, 'absent')} here ({len(differing)} parameters differ)"
        )
    engine.create_optimizer_state(num_updates=checkpoint.manifest.update_count if optimizer else 0)
    for piece in engine.local_fragments():
        if heartbeat is not None:
            heartbeat.keepalive(f"loading {piece.name}")
        for key, tensor in piece.get_tensors(engine.optimizer).items():
            if optimizer or key == "weights":
                values = _read_fragment(checkpoint, piece, key)
                tensor.copy_(torch.from_numpy(np.ascontiguousarray(values)))
    checkpoint.storage.evict_checkpoint(checkpoint.directory)
    engine.sync_low_precision()


def _read_fragment(checkpoint: CheckpointReader, piece: Fragment, key: str) -> NDArray[np.float32]:
    if piece.columns is None:
        return checkpoint.read(piece.name, key, piece.start, piece.count)
    return checkpoint.read_columns(piece.columns, key, piece.start, piece.count)
