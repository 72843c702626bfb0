"""Checkpoints in one go, and their manifests, for tests that are about something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def build_manifest(step: int = 1, shapes: Mapping[str, tuple[int, ...]] | None = None, **changes: Any) -> Manifest:
    """The manifest of one rank's checkpoint at a step, with one sequence of one token a step unless changed."""
    values: dict[str, Any] = {
        "tokens": step,
        "sequences": step,
        "attempt": 1,
        "parent": None,
        "world_size": 1,
        "zero": 0,
        "threads": 1,
        "config_fingerprint": "c",
        "data_fingerprint": "d",
        "versions": {},
    }
    return Manifest(step=step, shapes=shapes or {}, **(values | changes))
