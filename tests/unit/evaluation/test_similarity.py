"""Edit similarity, against its definition."""

from __future__ import annotations

from difflib import SequenceMatcher
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.evaluation.infill import compute_edit_similarity

TEXTS = st.text(alphabet="ab \né", max_size=12) | st.text(max_size=12)


def by_definition(first: str, second: str) -> float:
    @cache
    def common(i: int, j: int) -> int:
        if i == len(first) or j == len(second):
            return 0
        if first[i] == second[j]:
            return 1 + common(i + 1, j + 1)
        return max(common(i + 1, j), common(i, j + 1))

    total = len(first) + len(second)
    return 2 * common(0, 0) / total if total else 1.0


@given(TEXTS, TEXTS)
def test_it_is_the_longest_common_subsequence_over_both_lengths(first: str, second: str) -> None:
    assert compute_edit_similarity(first, second) == by_definition(first, second)
    assert compute_edit_similarity(second, first) == compute_edit_similarity(first, second)


@given(TEXTS, TEXTS)
def test_difflib_finds_no_more(first: str, second: str) -> None:
    assert (
        SequenceMatcher(None, first, second, autojunk=False).ratio() <= compute_edit_similarity(first, second) + 1e-12
    )


@given(TEXTS)
def test_equal_texts_are_wholly_alike(text: str) -> None:
    assert compute_edit_similarity(text, text) == 1.0


@pytest.mark.parametrize(
    ("first", "second", "similarity"),
    [
        ("", "", 1.0),
        ("", "a", 0.0),
        ("abc", "xyz", 0.0),
        ("kitten", "sitting", 2 * 4 / 13),
        ("return a + b", "return a - b", 2 * 11 / 24),
        ("abcd" * 50, "abcd" * 100, 2 / 3),
    ],
)
def test_by_hand(first: str, second: str, similarity: float) -> None:
    assert compute_edit_similarity(first, second) == pytest.approx(similarity)
    if len(first) < 20:
        assert SequenceMatcher(None, first, second).ratio() == pytest.approx(similarity)
