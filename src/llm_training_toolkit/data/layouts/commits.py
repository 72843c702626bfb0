"""Layout of commits: a file before, the message, the file after.

Source: StarCoder (Li et al. 2023), section 5.1, and bigcode-dataset, preprocessing/filtering_git_commits.ipynb:
`<commit_before>code<commit_msg>text<commit_after>code<|endoftext|>`, the text being the subject line.
StarCoder2 has no tokens for commits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from llm_training_toolkit.data.types import MarkedText
from llm_training_toolkit.families.document_layouts import COMMIT_AFTER, COMMIT_BEFORE, COMMIT_MESSAGE

ContextKind = Literal["whole", "window"]
# StarCoder showed the whole file in a fifth of its commits, and else fewer than 32 lines on either side of the change.
_WHOLE_SHARE = 0.2
_WINDOW_LINES = 32


def build_commit_segments(before: str, message: str, after: str, context: ContextKind) -> tuple[MarkedText, ...]:
    """Build the segments of one file's change; `window` shows as much of the file as StarCoder's data did."""
    if context == "window":
        before, after = _cut_to_window(before, after)
    return (
        MarkedText((COMMIT_BEFORE,), before),
        MarkedText((COMMIT_MESSAGE,), message),
        MarkedText((COMMIT_AFTER,), after),
    )


def _cut_to_window(before: str, after: str) -> tuple[str, str]:
    """Cut both texts to the changed lines and a drawn number of lines around them.

    The numbers are a hash of the texts, so a commit looks the same in every epoch and at any place of a source.
    """
    drawn = hashlib.sha256(f"{len(before)}\0{before}{after}".encode()).digest()
    if int.from_bytes(drawn[:8], "big") < _WHOLE_SHARE * 2**64:
        return before, after
    ahead, behind = drawn[8] % _WINDOW_LINES, drawn[9] % _WINDOW_LINES
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    start = _count_common(old, new)
    tail = _count_common(old[start:][::-1], new[start:][::-1])
    first, rest = max(start - ahead, 0), max(tail - behind, 0)
    return "".join(old[first : len(old) - rest]), "".join(new[first : len(new) - rest])


def _count_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Count the equal items at the beginning of two sequences."""
    pairs = zip(one, other, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
