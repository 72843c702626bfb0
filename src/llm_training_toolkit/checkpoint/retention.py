"""Checkpoint retention: `select_kept_steps` decides (pure), `apply_retention_policy` deletes on rank 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_training_toolkit.checkpoint.manifest import MANIFEST_NAME, read_manifest
from llm_training_toolkit.checkpoint.reader import list_complete_checkpoints
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs.directory import RunDirectory, parse_checkpoint_name


@dataclass(frozen=True)
class RetentionPolicy:
    """Numbers of checkpoints to keep."""

    keep_latest_k: int
    """Newest checkpoints to keep; at least 1."""
    keep_every: int = 0
    """Also keep multiples of this step; 0 = none."""
    keep_best_k: int = 0
    """Also keep this many with the lowest held-out losses."""


def select_kept_steps(steps: Sequence[int], rule: RetentionPolicy, losses: Mapping[int, float]) -> set[int]:
    """Return the steps whose checkpoints to keep; `losses` are held-out losses by step, if measured.

    Of equal losses the earlier step wins, so that a later one does not evict it.
    """
    recent = set(sorted(set(steps))[-rule.keep_latest_k :])
    best = sorted((loss, step) for step, loss in losses.items() if step in set(steps))[: rule.keep_best_k]
    multiples = {step for step in steps if rule.keep_every and step % rule.keep_every == 0}
    return recent | multiples | {step for _, step in best}


def apply_retention_policy(
    run: RunDirectory, rule: RetentionPolicy, *, attempt: int, losses: Mapping[int, float]
) -> None:
    """Delete checkpoints that are not kept, and incomplete ones of attempts up to `attempt`.

    Ranks of those attempts must not be writing.
    """
    delete_incomplete_checkpoints(run, attempt=attempt)
    found = [
        (step_and_attempt[0], path)
        for path in list_complete_checkpoints(run.checkpoints_dir)
        if (step_and_attempt := parse_checkpoint_name(path))
    ]
    stay = select_kept_steps([step for step, _ in found], rule, losses)
    for step, path in found:
        if step not in stay:
            run.storage.delete_checkpoint(path)


def delete_incomplete_checkpoints(run: RunDirectory, *, attempt: int) -> None:
    """Delete incomplete checkpoints of attempts up to `attempt`, whose ranks must not be writing."""
    for path in run.checkpoints_dir.glob("step_*"):
        step_and_attempt = parse_checkpoint_name(path)
        if step_and_attempt and step_and_attempt[1] <= attempt and not (path / MANIFEST_NAME).exists():
            run.storage.delete_checkpoint(path)


def held_out_losses(checkpoints: Path) -> dict[int, float]:
    """Return the held-out losses by step of complete checkpoints; unmeasured and unreadable ones are left out."""
    found = {}
    for path in list_complete_checkpoints(checkpoints):
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue
        if manifest.eval_loss is not None:
            found[manifest.step] = manifest.eval_loss
    return found
