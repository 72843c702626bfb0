"""Packing of examples into sequences of fixed length: no token lost, every example whole in one sequence."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_training_toolkit.data.prepare.arrow_store import read_columns, write_columns
from llm_training_toolkit.errors import DataError

IntArray = NDArray[np.int64]

# Tokens packed together: best fit wastes almost nothing at this size, and a node that reads ahead needs 300 MB.
_WINDOW_TOKENS = 1 << 26


@dataclass(frozen=True)
class PackingPlan:
    """Assignment of examples to sequences, in training order.

    order (examples,): numbers of the examples, sequence after sequence.
    offsets (sequences + 1,): sequence s holds order[offsets[s]:offsets[s + 1]].
    targets (sequences,): labels other than -100 in each sequence.
    """

    order: IntArray
    offsets: IntArray
    targets: IntArray

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.offsets) - 1

    def get_examples(self, sequence: int) -> IntArray:
        """Return the numbers of the examples in a sequence."""
        return self.order[self.offsets[sequence] : self.offsets[sequence + 1]]

    def take_first(self, sequences: int) -> PackingPlan:
        """Return the plan of the first sequences; they are in random order, so that it is a sample."""
        ends = self.offsets[: sequences + 1]
        return PackingPlan(self.order[: ends[-1]], ends, self.targets[:sequences])

    def write(self, directory: Path) -> None:
        """Write the plan as two Arrow files into an existing directory."""
        write_columns(directory / "order.arrow", {"example": self.order})
        write_columns(directory / "sequences.arrow", {"end": self.offsets[1:], "targets": self.targets})

    @classmethod
    def read(cls, directory: Path) -> PackingPlan:
        """Open a written plan; order and targets stay memory-mapped."""
        sequences = read_columns(directory / "sequences.arrow")
        offsets = np.concatenate([np.zeros(1, np.int64), sequences["end"]])
        return cls(read_columns(directory / "order.arrow")["example"], offsets, sequences["targets"])


def pack_in_windows(
    shards: NDArray[Any],
    lengths: NDArray[Any],
    sequence_length: int,
    *,
    targets: NDArray[Any],
    seed: int = 0,
    epoch: int = 0,
) -> PackingPlan:
    """Pack shards in random order, one window of shards at a time, so that a reader needs only one window at once.

    shards (examples,), rising: the shard of each example. The other arguments are those of `pack_examples`, which packs
    each window.
    """
    lengths, targets = np.asarray(lengths), np.asarray(targets)
    starts = np.flatnonzero(np.diff(shards, prepend=-1))
    members = np.split(np.arange(len(lengths)), starts[1:]) if len(starts) else []
    order = np.argsort(_draw_random_uint64(len(members), seed, epoch, "shards"), kind="stable")
    plans = []
    for number, window in enumerate(_split_into_windows(order, np.array([lengths[each].sum() for each in members]))):
        # Sorted by shard: a plan of one window depends on the examples alone.
        examples = np.concatenate([np.zeros(0, np.int64), *(members[i] for i in np.sort(window).tolist())])
        plan = pack_examples(
            lengths[examples], sequence_length, targets=targets[examples], seed=seed, epoch=epoch, window=number
        )
        plans.append(PackingPlan(examples[plan.order], plan.offsets, plan.targets))
    return _join_plans(plans)


def _split_into_windows(order: IntArray, tokens: IntArray) -> list[IntArray]:
    """Split shards, in their order, into as few windows as needed, of about equal numbers of tokens."""
    ends = np.cumsum(tokens[order])
    count = max(-(-int(ends[-1]) // _WINDOW_TOKENS), 1) if len(ends) else 1
    cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) // count, side="left") + 1 if count > 1 else []
    return np.split(order, cuts)


def pack_examples(
    lengths: NDArray[Any],
    sequence_length: int,
    *,
    targets: NDArray[Any],
    seed: int = 0,
    epoch: int = 0,
    window: int = 0,
) -> PackingPlan:
    """Pack by best-fit decreasing: the longest example first, each into the fullest sequence with room for it.

    lengths (examples,) in tokens, 1 to sequence_length; targets (examples,): labels each example yields.
    Examples of equal length are shuffled, to mix sources, and so are the sequences, both by (seed, epoch, window)
    alone. Raises DataError for a length outside the limits.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= sequence_length:
        raise DataError(
            f"packing: example lengths go from {lengths.min()} to {lengths.max()} tokens, and must lie within 1 and "
            f"the sequence length {sequence_length}. Remove the cache directory and prepare the data again."
        )
    sorted_examples = np.lexsort((_draw_random_uint64(len(lengths), seed, epoch, f"ties {window}"), -lengths))
    placed = _place_best_fit(lengths, sequence_length)
    shuffled = np.argsort(_draw_random_uint64(placed.sequences, seed, epoch, f"sequences {window}"), kind="stable")
    return _assemble_plan(placed, shuffled, sorted_examples, np.asarray(targets, dtype=np.int64))


class _ExamplePlacements(NamedTuple):
    """Placements of examples in sequences as rows (sequence, first, count), in placement order.

    A row puts the examples [first, first + count), sorted by falling length, into a sequence.
    """

    rows: IntArray
    sequences: int


def _place_best_fit(lengths: IntArray, capacity: int) -> _ExamplePlacements:
    """Place examples, sorted by falling length, by best fit.

    Equal lengths are placed together: after one example, its sequence is still the fullest with room for the next, so
    it takes as many as fit. All sequences with equal room are filled at once, so millions of examples take seconds.
    """
    rows: list[IntArray] = []
    opened = _OpenSequences()
    sequences = start = 0
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = count
        while left:
            room = opened.find_fullest(length) or capacity
            each = room // length
            wanted = -(-left // each)
            if room < capacity:
                chosen = opened.take_sequences(room, wanted)
            else:
                chosen = np.arange(sequences, sequences + wanted)
                sequences += wanted
            taken = np.full(len(chosen), each)
            taken[-1] = min(each, left - each * (len(chosen) - 1))
            first = start + each * np.arange(len(chosen))
            rows.append(np.stack([chosen, first, taken], axis=1))
            opened.add_sequences(room - each * length, chosen[:-1])
            opened.add_sequences(room - int(taken[-1]) * length, chosen[-1:])
            placed = int(taken.sum())
            start, left = start + placed, left - placed
    return _ExamplePlacements(np.concatenate([np.zeros((0, 3), np.int64), *rows]), sequences)


class _OpenSequences:
    """Sequences with free room, grouped by room; last in, first out within a group."""

    def __init__(self) -> None:
        self._by_room: dict[int, list[IntArray]] = {}
        self._rooms: list[int] = []  # the keys, sorted

    def find_fullest(self, length: int) -> int | None:
        """Return the smallest room that fits a length, or None."""
        where = bisect_left(self._rooms, length)
        return self._rooms[where] if where < len(self._rooms) else None

    def take_sequences(self, room: int, wanted: int) -> IntArray:
        """Remove and return one to `wanted` sequences with a room."""
        stack = self._by_room[room]
        last = stack.pop()
        taken, rest = last[::-1][:wanted], last[: max(len(last) - wanted, 0)]
        if len(rest):
            stack.append(rest)
        if not stack:
            del self._by_room[room]
            self._rooms.remove(room)
        return taken

    def add_sequences(self, room: int, sequences: IntArray) -> None:
        """Add sequences, unless they are full."""
        if not room or not len(sequences):
            return
        if room not in self._by_room:
            self._by_room[room] = []
            insort(self._rooms, room)
        self._by_room[room].append(sequences)


def _join_plans(plans: list[PackingPlan]) -> PackingPlan:
    starts = np.cumsum([0, *(len(plan.order) for plan in plans[:-1])])
    offsets = [plan.offsets[1:] + start for plan, start in zip(plans, starts.tolist(), strict=True)]
    return PackingPlan(
        np.concatenate([plan.order for plan in plans]),
        np.concatenate([np.zeros(1, np.int64), *offsets]),
        np.concatenate([plan.targets for plan in plans]),
    )


def _assemble_plan(
    placed: _ExamplePlacements, shuffled: IntArray, examples: IntArray, targets: IntArray
) -> PackingPlan:
    """Build the plan: sequences in the order `shuffled`, `examples` sorted by falling length."""
    sequence, first, count = placed.rows.T
    position = np.empty(placed.sequences, np.int64)
    position[shuffled] = np.arange(placed.sequences)
    by_position = np.argsort(position[sequence], kind="stable")
    sequence, first, count = position[sequence[by_position]], first[by_position], count[by_position]
    # Expand each row into first, first + 1, ...
    ends = np.cumsum(count)
    order = examples[np.repeat(first - (ends - count), count) + np.arange(len(examples))]
    sizes = np.bincount(np.repeat(sequence, count), minlength=placed.sequences)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(targets[order])])
    return PackingPlan(order, offsets, np.diff(sums[offsets]))


def shuffle_partitions(partitions: int, seed: int, epoch: int) -> list[int]:
    """Return the partitions of an epoch in training order."""
    order: list[int] = np.argsort(_draw_random_uint64(partitions, seed, epoch, "partitions"), kind="stable").tolist()
    return order


def _draw_random_uint64(count: int, seed: int, epoch: int, purpose: str) -> NDArray[np.uint64]:
    """Return raw output of a counter-based generator: unlike numpy's shuffle, it is the same in all numpy versions."""
    key = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=16, person=b"ltt-packing").digest()
    raw = np.random.Philox(key=np.frombuffer(key, dtype="<u8")).random_raw(count)
    return np.asarray(raw, dtype=np.uint64)
