"""Special tokens of StarCoder's document layouts."""

from __future__ import annotations

from collections.abc import Mapping

COMMIT_BEFORE, COMMIT_MESSAGE, COMMIT_AFTER = "<commit_before>", "<commit_msg>", "<commit_after>"
ISSUE_START, ISSUE_COMMENT, ISSUE_CLOSED = "<issue_start>", "<issue_comment>", "<issue_closed>"
JUPYTER_START, JUPYTER_TEXT, JUPYTER_CODE = "<jupyter_start>", "<jupyter_text>", "<jupyter_code>"
JUPYTER_OUTPUT, EMPTY_OUTPUT = "<jupyter_output>", "<empty_output>"
# StarCoder2 alone has it. StarCoder 1 was trained on scripts as on any code (Li et al. 2023, section 5.1).
JUPYTER_SCRIPT = "<jupyter_script>"

COMMIT_MARKERS = (COMMIT_BEFORE, COMMIT_MESSAGE, COMMIT_AFTER)
ISSUE_MARKERS = (ISSUE_START, ISSUE_COMMENT, ISSUE_CLOSED)
NOTEBOOK_MARKERS = (JUPYTER_START, JUPYTER_TEXT, JUPYTER_CODE, JUPYTER_OUTPUT, EMPTY_OUTPUT)

# By format and layout of a source. Other layouts are text, which every tokenizer has.
_REQUIRED: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("commits", "auto"): COMMIT_MARKERS,
    ("issues", "auto"): ISSUE_MARKERS,
    ("notebooks", "auto"): NOTEBOOK_MARKERS,
    ("notebooks", "structured"): NOTEBOOK_MARKERS,
    ("git", "commits"): COMMIT_MARKERS,
}


def get_required_markers(form: str, layout: str) -> tuple[str, ...]:
    """Return the special tokens that a source's format and layout need."""
    return _REQUIRED.get((form, layout), ())
