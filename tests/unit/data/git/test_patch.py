"""Patches: both sides of any change come back from what git prints."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_training_toolkit.data.git.patch import FileChange, UnusableChange, parse_patch

LINE = st.sampled_from(
    ["", "a", "- b", "+ c", "@@ -1 +1 @@", "diff --git a/x b/x", "\\ No newline", "ü 😀", "\t \r", "--- a/x"]
)
LINES = st.lists(LINE, min_size=1, max_size=12).map("\n".join)
TEXT = st.tuples(LINES, st.sampled_from(["", "\n"])).map("".join)


def print_patch(before: str, after: str) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("old", before), ("new", after)):
            Path(folder, name).write_bytes(text.encode())
        command = ["git", "diff", "--no-index", "--no-color", "--no-ext-diff", "--unified=1000", "old", "new"]
        environment = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False, env=environment)
    return [line + b"\n" for line in done.stdout.split(b"\n")[:-1]]


@settings(max_examples=40, deadline=None)
@given(TEXT, TEXT)
def test_both_sides_of_a_change_come_back(before: str, after: str) -> None:
    changes = list(parse_patch(print_patch(before, after), 1 << 20))
    if before == after:
        assert not changes
        return
    (change,) = changes
    assert isinstance(change, FileChange)
    (hunk,) = change.hunks
    assert (hunk.join_side("-"), hunk.join_side("+")) == (before, after)
    assert (change.old_path, change.new_path) == ("old", "new")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ([b"Binary files a/x and b/x differ\n"], "binary"),
        ([b"--- a/x\n", b"+++ b/x\n", b"@@ -1 +1 @@\n", b"-a\n", b"+\xff\n"], "not_utf8"),
        ([b"--- a/x\n", b"+++ b/x\n", b"@@ -1 +1 @@\n", b"-" + b"a" * 99 + b"\n", b"+b\n"], "too_large"),
    ],
)
def test_change_that_is_no_text_does_not_hide_the_next(body: list[bytes], reason: str) -> None:
    good = [b"diff --git a/y b/y\n", b"--- a/y\n", b"+++ b/y\n", b"@@ -1 +1 @@\n", b"-a\n", b"+b\n"]
    first, second = parse_patch([b"diff --git a/x b/x\n", *body, *good], 100)
    assert first == UnusableChange(reason)
    assert isinstance(second, FileChange)
    assert second.format_diff() == b"".join(good).decode()
