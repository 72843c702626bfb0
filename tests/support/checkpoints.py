"""Writing a checkpoint in one go, for tests that are about something else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from llm_training_toolkit.checkpoint import (
    AsyncWrite,
    Manifest,
    ParameterShard,
    allocate_host_buffer,
    commit_checkpoint,
)
from llm_training_toolkit.distributed.context import RunContext


def save(
    context: RunContext,
    directory: Path,
    pieces: Sequence[ParameterShard],
    optimizer: torch.optim.Optimizer,
    manifest: Manifest,
) -> None:
    """Write the pieces of all ranks into `directory` and complete it. Collective."""
    commit_checkpoint(
        context, AsyncWrite(context.rank, directory, pieces, optimizer, allocate_host_buffer(pieces)), manifest
    )
