"""How alike two texts are."""

from __future__ import annotations


def edit_similarity(first: str, second: str) -> float:
    """1 for equal texts, 0 for texts without a common character: 2 x longest common subsequence / both lengths.

    As `fuzz.ratio` of the fuzzy-matching packages, which code completion benchmarks report, divided by 100.
    """
    total = len(first) + len(second)
    return 2 * _common(first, second) / total if total else 1.0


def _common(first: str, second: str) -> int:
    """Length of the longest common subsequence (Hyyrö 2004): a bit for each character of `first`, 0 where one ends."""
    places: dict[str, int] = {}
    for place, letter in enumerate(first):
        places[letter] = places.get(letter, 0) | 1 << place
    everywhere = (1 << len(first)) - 1
    row = everywhere
    for letter in second:
        matches = row & places.get(letter, 0)
        row = ((row + matches) | (row - matches)) & everywhere
    return len(first) - row.bit_count()
