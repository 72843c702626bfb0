"""Next edits: a region of a file with the cursor in it, and the region after the edit.

The markers are those of Zed's edit prediction model Zeta (zed-industries/zed, crates/zeta), plain text in every
tokenizer here. Edits above the region are done, those below are to come: so the file looks while it is being edited.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from llm_training_toolkit.data.git.patch import FileChange, PatchLine
from llm_training_toolkit.data.types import MarkedText

CURSOR = "<|user_cursor_is_here|>"
REGION_START, REGION_END = "<|editable_region_start|>", "<|editable_region_end|>"
_MARKERS = (CURSOR, REGION_START, REGION_END)
_REGION_LINES = 3  # unchanged lines of a region around its edit
_AROUND_LINES = 20  # lines shown in front of a region and behind it


def has_edit_markers(change: FileChange) -> bool:
    """Return whether a file holds a marker as text, so that its regions could not be told apart."""
    return any(marker in line.text for hunk in change.hunks for line in hunk.lines for marker in _MARKERS)


def iter_edit_segments(change: FileChange) -> Iterator[tuple[MarkedText, ...]]:
    """Yield each edit of a file that existed before and after: what is shown, without loss, and the region after."""
    if not (change.old_path and change.new_path):
        return
    for hunk in change.hunks:
        for start, stop in _find_regions(hunk.lines):
            yield _build_edit(change.path, hunk.lines, start, stop)


def _find_regions(lines: Sequence[PatchLine]) -> list[tuple[int, int]]:
    """Return the lines [start, stop) of each edit with its unchanged lines; edits that would overlap are one."""
    changed = [number for number, line in enumerate(lines) if line.kind != " "]
    if not changed:
        return []
    breaks = [(a, b) for a, b in pairwise(changed) if b - a > 2 * _REGION_LINES]
    starts, stops = [changed[0], *(b for _, b in breaks)], [*(a for a, _ in breaks), changed[-1]]
    return [
        (max(start - _REGION_LINES, 0), min(stop + 1 + _REGION_LINES, len(lines)))
        for start, stop in zip(starts, stops, strict=True)
    ]


def _build_edit(path: str, lines: Sequence[PatchLine], start: int, stop: int) -> tuple[MarkedText, ...]:
    done = [line.text for line in lines[:start] if line.kind != "-"][-_AROUND_LINES:]
    to_come = [line.text for line in lines[stop:] if line.kind != "+"][:_AROUND_LINES]
    before, after = (
        "".join(line.text for line in lines[start:stop] if line.kind in {" ", side}) for side in ("-", "+")
    )
    at = _count_common_characters(before, after)
    shown = f"{path}\n{''.join(done)}{REGION_START}\n{before[:at]}{CURSOR}{before[at:]}{REGION_END}\n{''.join(to_come)}"
    return (
        MarkedText((), shown, is_trained=False),
        MarkedText((), f"{REGION_START}\n{after}{REGION_END}\n"),
    )


def _count_common_characters(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
