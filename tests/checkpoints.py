"""Writing a checkpoint in one go, for tests that are about something else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from llm_training_toolkit.checkpoint import Piece, Writing, finish, memory_for
from llm_training_toolkit.checkpoint.writer import Describe
from llm_training_toolkit.distributed.context import RunContext


def save(
    context: RunContext,
    directory: Path,
    pieces: Sequence[Piece],
    optimizer: torch.optim.Optimizer,
    describe: Describe,
) -> None:
    """Write the pieces of all ranks into `directory` and complete it. Collective."""
    finish(context, Writing(context.rank, directory, pieces, optimizer, memory_for(pieces)), describe)
