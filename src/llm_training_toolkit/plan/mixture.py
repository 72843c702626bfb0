"""The order in which several streams of sequences become one: a pure function of their weights.

The k-th sequence of a stream (k from 0) with the share s of the whole is due at (k + 1/2) / s; sequences come in the
order in which they are due, of two due at once the earlier stream's first. So after any number of sequences a stream
is less than one sequence away from its share for two streams, and from half their number for more; what comes later
never changes what came before. Shares are whole numbers here, and everything is computed in whole numbers, so that no
rounding can part two machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_PARTS = 1 << 20
"""Shares are rounded to millionths of the whole."""


class StreamPosition(NamedTuple):
    """A sequence of the mixture: which stream, and its number in that stream."""

    stream: int
    number: int


def compute_integer_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights, all above 0, as whole numbers in the same proportions; none becomes 0."""
    total = sum(weights)
    return tuple(max(1, round(_PARTS * weight / total)) for weight in weights)


def merge_streams(shares: Sequence[int], first: int, stop: int) -> list[StreamPosition]:
    """The sequences at the places [first, stop) of the mixture; costs the same wherever they lie."""
    found = [
        (place, StreamPosition(stream, number))
        for stream in range(len(shares))
        for number in _find_candidates(shares, stream, first, stop)
        if first <= (place := _compute_position(shares, stream, number)) < stop
    ]
    return [due for _, due in sorted(found)]


def count_per_stream(shares: Sequence[int], stop: int) -> tuple[int, ...]:
    """How many of the first `stop` sequences of the mixture each stream gives."""
    found = []
    for stream in range(len(shares)):
        near = _find_candidates(shares, stream, stop, stop)
        found.append(near.start + sum(_compute_position(shares, stream, number) < stop for number in near))
    return tuple(found)


def _find_candidates(shares: Sequence[int], stream: int, first: int, stop: int) -> range:
    """Numbers among which all of a stream's sequences at the places [first, stop) are.

    A place differs from the time at which its sequence is due by less than the number of streams.
    """
    total, reach = sum(shares), len(shares) + 1
    low = (first - reach) * shares[stream] // total - 1
    high = (stop + reach) * shares[stream] // total + 2
    return range(max(low, 0), max(high, 0))


def _compute_position(shares: Sequence[int], stream: int, number: int) -> int:
    """How many sequences of all streams come before this one."""
    own = shares[stream]
    before = number
    for other, share in enumerate(shares):
        if other != stream:
            # Those m of the other stream with (2m + 1) / share < (2 number + 1) / own, or = if it goes first.
            ahead = (2 * number + 1) * share - own
            before += ahead // (2 * own) + 1 if other < stream else -(-ahead // (2 * own))
    return before
