"""Keys and names from outside never become a path outside."""

from __future__ import annotations

import os.path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.runs.storage.object_keys import find_key_problem, find_name_problem, is_directory_marker

PARTS = st.sampled_from(["a", ".", "..", "", "b.json", "...", "x" * 255, "x" * 256, "ä", "\n", ".hidden"])


@given(st.lists(PARTS, max_size=6).map("/".join) | st.text(max_size=20))
def test_accepted_keys_stay_below_their_directory(key: str) -> None:
    if find_key_problem(key) is None:
        assert os.path.normpath(os.path.join("/run", key)) == f"/run/{key}"  # noqa: PTH118 - pathlib hides "." parts
        assert key
    if find_name_problem(key) is None:
        assert os.path.dirname(os.path.normpath(os.path.join("/run", key))) == "/run"  # noqa: PTH118, PTH120


@pytest.mark.parametrize("key", ["metrics.jsonl", "checkpoints/step_000000001_a1/manifest.json", ".rayignore", "a/..."])
def test_ordinary_keys_are_accepted(key: str) -> None:
    assert find_key_problem(key) is None


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "a//b", "../x", "a/../b", "a/./b", "a/", "a\n", "a\x1b[2J", "x" * 256]
)
def test_keys_that_lead_elsewhere_are_refused(key: str) -> None:
    assert find_key_problem(key)


def test_only_a_trailing_slash_makes_a_directory_marker() -> None:
    assert is_directory_marker("data/")
    assert not any(map(is_directory_marker, ("/", "../", "a//", "a")))
