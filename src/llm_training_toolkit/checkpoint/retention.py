"""Which checkpoints stay. Deciding is a pure function; `clean` carries it out on rank 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_training_toolkit.checkpoint.manifest import MANIFEST_NAME, read_manifest
from llm_training_toolkit.checkpoint.reader import list_complete_checkpoints
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs.directory import parse_checkpoint_name
from llm_training_toolkit.runs.storage import find_storage


@dataclass(frozen=True)
class RetentionPolicy:
    """How many checkpoints stay."""

    keep_latest_k: int
    """The newest; at least 1."""
    keep_every: int = 0
    """And the multiples of this; 0 = none."""
    keep_best_k: int = 0
    """And those with the lowest held-out losses."""


def select_kept_steps(steps: Sequence[int], rule: RetentionPolicy, losses: Mapping[int, float]) -> set[int]:
    """Steps whose checkpoints stay, of those there are; `losses` are the held-out ones by step, where measured.

    Of equal losses the earlier step is the better one, so that a later one does not push it out.
    """
    recent = set(sorted(set(steps))[-rule.keep_latest_k :])
    best = sorted((loss, step) for step, loss in losses.items() if step in set(steps))[: rule.keep_best_k]
    multiples = {step for step in steps if rule.keep_every and step % rule.keep_every == 0}
    return recent | multiples | {step for _, step in best}


def apply_retention_policy(
    checkpoints: Path, rule: RetentionPolicy, *, attempt: int, losses: Mapping[int, float]
) -> None:
    """Delete what is not kept, and what attempts up to `attempt` never completed; none of their ranks is writing."""
    delete_incomplete_checkpoints(checkpoints, attempt=attempt)
    found = [
        (place[0], path) for path in list_complete_checkpoints(checkpoints) if (place := parse_checkpoint_name(path))
    ]
    stay = select_kept_steps([step for step, _ in found], rule, losses)
    for step, path in found:
        if step not in stay:
            find_storage(path).delete_checkpoint(path)


def delete_incomplete_checkpoints(checkpoints: Path, *, attempt: int) -> None:
    """Delete what attempts up to `attempt` never completed, none of whose ranks may be writing any more."""
    for path in checkpoints.glob("step_*"):
        place = parse_checkpoint_name(path)
        if place and place[1] <= attempt and not (path / MANIFEST_NAME).exists():
            find_storage(path).delete_checkpoint(path)


def held_out_losses(checkpoints: Path) -> dict[int, float]:
    """The held-out losses by step, of the complete checkpoints that were measured; one that is unreadable has none."""
    found = {}
    for path in list_complete_checkpoints(checkpoints):
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue
        if manifest.eval_loss is not None:
            found[manifest.step] = manifest.eval_loss
    return found
