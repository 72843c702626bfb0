"""Streams become one in proportion to their weights, and what comes later changes nothing of what came before."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.plan import compute_integer_shares, count_per_stream, merge_streams

SHARES = st.lists(st.integers(1, 1 << 20) | st.sampled_from([1, 2, 3]), min_size=1, max_size=6)


def by_definition(shares: list[int], length: int) -> list[tuple[int, int]]:
    """Sorted by when each is due: (k + 1/2) / share, of two at once the earlier stream first."""
    total = sum(shares)
    reach = length + len(shares) + 1
    due = [
        (Fraction((2 * k + 1) * total, 2 * share), stream, k)
        for stream, share in enumerate(shares)
        for k in range(reach * share // total + 2)
    ]
    return [(stream, k) for _, stream, k in sorted(due)][:length]


@given(shares=SHARES, length=st.integers(0, 120), cut=st.floats(0, 1))
def test_any_part_of_the_mixture_is_that_part_of_the_whole(shares: list[int], length: int, cut: float) -> None:
    whole, first = by_definition(shares, length), int(cut * length)
    assert merge_streams(shares, 0, length) == whole
    assert merge_streams(shares, first, length) == whole[first:]
    assert list(count_per_stream(shares, length)) == [
        sum(each == stream for each, _ in whole) for stream in range(len(shares))
    ]


@given(shares=SHARES, place=st.integers(0, 10**12))
def test_a_stream_never_strays_from_its_share(shares: list[int], place: int) -> None:
    total = sum(shares)
    for count, share in zip(count_per_stream(shares, place), shares, strict=True):
        assert abs(count - Fraction(place * share, total)) < max(len(shares) / 2, 1)
    assert sum(count_per_stream(shares, place)) == place


@given(shares=SHARES, place=st.integers(0, 10**12))
def test_far_out_it_costs_and_says_the_same(shares: list[int], place: int) -> None:
    found = merge_streams(shares, place, place + 20)
    before, after = count_per_stream(shares, place), count_per_stream(shares, place + 20)
    for stream in range(len(shares)):
        assert [due.number for due in found if due.stream == stream] == list(range(before[stream], after[stream]))


def test_written_out_by_hand() -> None:
    assert [due.stream for due in merge_streams([3, 1], 0, 8)] == [0, 0, 1, 0, 0, 0, 1, 0]
    assert [due.number for due in merge_streams([3, 1], 0, 8)] == [0, 1, 0, 2, 3, 4, 1, 5]


def test_weights_become_whole_numbers_in_their_proportions() -> None:
    assert compute_integer_shares([0.75, 0.25]) == compute_integer_shares([3, 1]) == (3 << 18, 1 << 18)
    assert min(compute_integer_shares([1e9, 1e-9])) == 1
