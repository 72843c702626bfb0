"""Which checkpoints stay. Deciding is a pure function; `clean` carries it out on rank 0."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from llm_training_toolkit.checkpoint.manifest import NAME
from llm_training_toolkit.checkpoint.reading import complete
from llm_training_toolkit.runs import checkpoint_place


def kept(steps: Sequence[int], keep: int, keep_every: int) -> set[int]:
    """Steps whose checkpoints stay: the newest `keep`, and the multiples of `keep_every` (0 = none)."""
    recent = set(sorted(set(steps))[-keep:])
    return recent | {step for step in steps if keep_every and step % keep_every == 0}


def clean(checkpoints: Path, keep: int, keep_every: int, *, attempt: int) -> None:
    """Delete what is not kept, and what attempts up to `attempt` never completed; none of their ranks is writing."""
    for path in checkpoints.glob("step_*"):
        place = checkpoint_place(path)
        if place and place[1] <= attempt and not (path / NAME).exists():
            shutil.rmtree(path, ignore_errors=True)
    found = [(place[0], path) for path in complete(checkpoints) if (place := checkpoint_place(path))]
    stay = kept([step for step, _ in found], keep, keep_every)
    for step, path in found:
        if step not in stay:
            # The manifest goes first: a deletion that is cut short leaves no checkpoint that looks whole.
            (path / NAME).unlink()
            shutil.rmtree(path, ignore_errors=True)
