"""Checkpoint layout: the file of every fragment, as runs of equal fragments instead of a list.

ZeRO 3 cuts every parameter over every rank: 963 parameters on 4,096 ranks are 3.9 million fragments. Listed one by one
they were 330 MB of JSON and two minutes a checkpoint; as runs they are some 2,000 lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Layout = Mapping[str, tuple["FragmentRun", ...]]


@dataclass(frozen=True)
class FragmentRun:
    """Fragments of one parameter that have the same length and lie in consecutive files, one in each.

    Raises ValueError for numbers that no layout has.
    """

    start: int
    """First index of the first fragment in the flattened parameter."""
    length: int
    """Values in each fragment."""
    count: int
    """Fragments."""
    first_file: int
    """Index of the first fragment's file."""

    def __post_init__(self) -> None:
        numbers = (self.start, self.length, self.count, self.first_file)
        if not all(type(number) is int for number in numbers) or self.length < 1 or self.count < 1 or min(numbers) < 0:
            raise ValueError(f"{list(numbers)} is no run of fragments")

    @property
    def end(self) -> int:
        """Index after the last value."""
        return self.start + self.length * self.count

    def find_fragments(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield (first index, file) of every fragment that overlaps [start, end), in order."""
        first = max(start - self.start, 0) // self.length
        last = min(math.ceil((end - self.start) / self.length), self.count)
        for number in range(first, last):
            yield self.start + number * self.length, self.first_file + number


class FragmentIndex(NamedTuple):
    """A rank's fragments, compact enough for rank 0 to receive thousands of them."""

    parameters: NDArray[np.int32]
    """Positions among the sorted names of the parameters."""
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]


def index_fragments(fragments: Sequence[tuple[str, int, int]], shapes: Mapping[str, tuple[int, ...]]) -> FragmentIndex:
    """Index fragments given as (parameter, first index, length). Every rank must have the same `shapes`."""
    position = {name: number for number, name in enumerate(sorted(shapes))}
    return FragmentIndex(
        np.array([position[name] for name, _, _ in fragments], dtype=np.int32),
        np.array([start for _, start, _ in fragments], dtype=np.int64),
        np.array([length for _, _, length in fragments], dtype=np.int64),
    )


def build_layout(indexes: Sequence[FragmentIndex], shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """Build the layout of a checkpoint from the fragments in each file, in the order of the files."""
    files = np.repeat(np.arange(len(indexes)), [len(index.starts) for index in indexes])
    parameters, starts, lengths = (np.concatenate(column) for column in zip(*indexes, strict=True))
    order = np.lexsort((files, starts, parameters))
    parameters, starts, lengths, files = (column[order] for column in (parameters, starts, lengths, files))
    continues = (
        (np.diff(parameters) == 0) & (np.diff(files) == 1) & (np.diff(lengths) == 0) & (np.diff(starts) == lengths[:-1])
    )
    firsts = np.flatnonzero(np.concatenate(([True], ~continues))[: len(starts)])
    counts = np.diff(np.append(firsts, len(starts)))
    columns = (parameters[firsts], starts[firsts], lengths[firsts], counts, files[firsts])
    names = sorted(shapes)
    layout: dict[str, list[FragmentRun]] = {name: [] for name in names}
    for parameter, *numbers in zip(*(column.tolist() for column in columns), strict=True):
        layout[names[parameter]].append(FragmentRun(*numbers))
    return {name: tuple(runs) for name, runs in layout.items()}


def find_incomplete_parameters(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the parameters whose fragments leave a gap or overlap."""
    return [name for name, shape in shapes.items() if not _is_exact_cover(layout.get(name, ()), math.prod(shape))]


def _is_exact_cover(runs: Sequence[FragmentRun], size: int) -> bool:
    end = 0
    for run in runs:
        if run.start != end:
            return False
        end = run.end
    return end == size
