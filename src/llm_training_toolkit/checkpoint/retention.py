"""Which checkpoints stay. Deciding is a pure function; `clean` carries it out on rank 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_training_toolkit.checkpoint.manifest import NAME, read_manifest
from llm_training_toolkit.checkpoint.reader import complete
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs.directory import checkpoint_place
from llm_training_toolkit.runs.storage import storage_of


@dataclass(frozen=True)
class Rule:
    """How many checkpoints stay."""

    keep: int
    """The newest; at least 1."""
    every: int = 0
    """And the multiples of this; 0 = none."""
    best: int = 0
    """And those with the lowest held-out losses."""


def kept(steps: Sequence[int], rule: Rule, losses: Mapping[int, float]) -> set[int]:
    """Steps whose checkpoints stay, of those there are; `losses` are the held-out ones by step, where measured.

    Of equal losses the earlier step is the better one, so that a later one does not push it out.
    """
    recent = set(sorted(set(steps))[-rule.keep :])
    best = sorted((loss, step) for step, loss in losses.items() if step in set(steps))[: rule.best]
    multiples = {step for step in steps if rule.every and step % rule.every == 0}
    return recent | multiples | {step for _, step in best}


def clean(checkpoints: Path, rule: Rule, *, attempt: int, losses: Mapping[int, float]) -> None:
    """Delete what is not kept, and what attempts up to `attempt` never completed; none of their ranks is writing."""
    clear_unfinished(checkpoints, attempt=attempt)
    found = [(place[0], path) for path in complete(checkpoints) if (place := checkpoint_place(path))]
    stay = kept([step for step, _ in found], rule, losses)
    for step, path in found:
        if step not in stay:
            storage_of(path).discard(path)


def clear_unfinished(checkpoints: Path, *, attempt: int) -> None:
    """Delete what attempts up to `attempt` never completed, none of whose ranks may be writing any more."""
    for path in checkpoints.glob("step_*"):
        place = checkpoint_place(path)
        if place and place[1] <= attempt and not (path / NAME).exists():
            storage_of(path).discard(path)


def held_out_losses(checkpoints: Path) -> dict[int, float]:
    """The held-out losses by step, of the complete checkpoints that were measured; one that is unreadable has none."""
    found = {}
    for path in complete(checkpoints):
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue
        if manifest.eval_loss is not None:
            found[manifest.step] = manifest.eval_loss
    return found
