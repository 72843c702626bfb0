"""Mixture of several streams of sequences into one: a pure function of their weights.

Sequence k (from 0) of a stream with share s is due at (k + 1/2) / s. Sequences are sorted by due time; on a tie the
earlier stream goes first. After any number of sequences a stream is less than one sequence off its share with two
streams, and less than half their number with more. Later sequences never change earlier ones. Shares are integers and
all arithmetic is in integers, so rounding cannot differ between machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_PARTS = 1 << 20  # shares are rounded to millionths of the whole


class StreamPosition(NamedTuple):
    """Sequence of the mixture: its stream, and its number in that stream."""

    stream: int
    number: int


def compute_integer_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Convert positive weights to integers in the same proportions, each at least 1."""
    total = sum(weights)
    return tuple(max(1, round(_PARTS * weight / total)) for weight in weights)


def merge_streams(shares: Sequence[int], first: int, stop: int) -> list[StreamPosition]:
    """Return the sequences at positions [first, stop) of the mixture; the cost does not grow with `first`."""
    found = [
        (position, StreamPosition(stream, number))
        for stream in range(len(shares))
        for number in _find_candidates(shares, stream, first, stop)
        if first <= (position := _compute_position(shares, stream, number)) < stop
    ]
    return [due for _, due in sorted(found)]


def count_per_stream(shares: Sequence[int], stop: int) -> tuple[int, ...]:
    """Return the number of sequences of each stream among the first `stop` of the mixture."""
    found = []
    for stream in range(len(shares)):
        near = _find_candidates(shares, stream, stop, stop)
        found.append(near.start + sum(_compute_position(shares, stream, number) < stop for number in near))
    return tuple(found)


def _find_candidates(shares: Sequence[int], stream: int, first: int, stop: int) -> range:
    """Return a range that contains the numbers of a stream's sequences at positions [first, stop).

    The position of a sequence differs from its due time by less than the number of streams.
    """
    total, reach = sum(shares), len(shares) + 1
    low = (first - reach) * shares[stream] // total - 1
    high = (stop + reach) * shares[stream] // total + 2
    return range(max(low, 0), max(high, 0))


def _compute_position(shares: Sequence[int], stream: int, number: int) -> int:
    """Return the number of sequences of all streams before this one."""
    own = shares[stream]
    before = number
    for other, share in enumerate(shares):
        if other != stream:
            # Count the m of the other stream with (2m + 1) / share < (2 number + 1) / own, or = if it goes first.
            ahead = (2 * number + 1) * share - own
            before += ahead // (2 * own) + 1 if other < stream else -(-ahead // (2 * own))
    return before
