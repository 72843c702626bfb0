"""Restoring a run from its newest sound checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from llm_training_toolkit.checkpoint import (
    Checkpoint,
    UnknownFormatError,
    complete,
    newest,
    set_aside,
)
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.heartbeat import Pulse
from llm_training_toolkit.engine import Engine
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.storage import storage_of


def newest_sound(run: RunDirectory, context: RunContext) -> Checkpoint | None:
    """The newest checkpoint whose files are what was written; damaged ones are set aside and named. Collective.

    Raises CheckpointError where the only one is damaged, OSError where the storage cannot be read.
    """
    while True:
        found = newest(run.checkpoints) if context.is_first else None
        name = context.broadcast(found.name if found else None)  # not the path: a store's run has one on every rank
        if name is None:
            return None
        directory = run.checkpoints / name
        faults = _damage(directory, context)
        if not faults:
            return Checkpoint(directory)
        if context.broadcast(len(complete(run.checkpoints)) if context.is_first else 0) < 2:
            raise CheckpointError(
                f"{faults[0]}: the only checkpoint of this run is damaged, and there is none before it. "
                f"Bring the file back, or delete {storage_of(run.path).address(run.path)} to start again from step 0"
            )
        if context.is_first:
            where = set_aside(directory)
            message = f"checkpoint {directory.name} is damaged ({faults[0]}); {where}"
            context.report({"kind": "warning", "message": f"{message}, and the one before it is used"})
        context.barrier()


def _damage(directory: Path, context: RunContext) -> list[str]:
    """What is wrong with a checkpoint; each file is read by one rank, and by rank 0 where that one finds a fault.

    Only what rank 0 finds as well is damage. An OSError goes out as it is, on the rank that meets it: storage that
    fails for a moment, or shows a node not yet what another one wrote, is a matter for new workers.
    """
    unreadable = context.broadcast(_unreadable(directory) if context.is_first else "")
    if unreadable:
        return [unreadable]
    checkpoint = Checkpoint(directory)
    mine = {}
    for number in range(context.rank, len(checkpoint.manifest.files), context.world_size):
        context.pulse.advance(f"checking file {number} of {directory.name}")
        if fault := checkpoint.fault(number):
            mine[number] = fault
    suspected = sorted(number for found in context.gather(tuple(mine)) for number in found)
    checked = [fault for number in suspected if (fault := checkpoint.fault(number))] if context.is_first else []
    damage = context.broadcast(checked)
    if mine and not damage:
        raise OSError(f"{next(iter(mine.values()))}, but rank 0 finds it whole: is it the same storage on this node?")
    return damage


def _unreadable(directory: Path) -> str:
    """Why the manifest cannot be understood; empty where it can, and where all ranks are to refuse its format."""
    try:
        Checkpoint(directory)
    except UnknownFormatError:
        return ""
    except CheckpointError as error:
        return str(error)
    return ""


def restore(engine: Engine, checkpoint: Checkpoint, *, optimizer: bool = True, pulse: Pulse | None = None) -> None:
    """Load weights, and with `optimizer` Adam's state, into an engine of any ZeRO stage and number of ranks.

    Each rank reads the ranges it holds. Hyperparameters come from the configuration, not from the file.
    Collective. Raises CheckpointError when the checkpoint is of another model.
    """
    stored, wanted = dict(checkpoint.manifest.shapes), dict(engine.shapes)
    if stored != wanted:
        differing = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
        first = differing[0]
        raise CheckpointError(
            f"{checkpoint.directory}: not a checkpoint of this model: {first} is {stored.get(first, 'absent')} "
            f"there and {wanted.get(first, 'absent')} here ({len(differing)} parameters differ)"
        )
    engine.create_optimizer_state(updates=checkpoint.manifest.updates if optimizer else 0)
    for piece in engine.fragments():
        if pulse is not None:
            pulse.advance(f"loading {piece.name}")
        for key, tensor in piece.tensors(engine.optimizer).items():
            if optimizer or key == "weights":
                values = checkpoint.read(piece.name, key, piece.start, piece.count)
                tensor.copy_(torch.from_numpy(np.ascontiguousarray(values)))
    storage_of(checkpoint.directory).let_go(checkpoint.directory)
    engine.refresh()
