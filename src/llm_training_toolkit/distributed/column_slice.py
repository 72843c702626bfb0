"""Slices of a matrix's columns, as a checkpoint stores them.

A rank of a tensor-parallel group holds some columns of a row-parallel matrix. In the flattened matrix they are a piece
for each row, far too many to be fragments. So the slice is stored as a matrix of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ColumnSlice:
    """One of several slices of a parameter, with equal numbers of columns."""

    parameter: str
    index: int
    parts: int

    @property
    def name(self) -> str:
        """Name of the slice in a checkpoint."""
        return f"{self.parameter}[:, {self.index}/{self.parts}]"


def list_stored_shapes(shapes: Mapping[str, Shape], parts: Mapping[str, int]) -> dict[str, Shape]:
    """Return the shapes of what a checkpoint stores: whole parameters, and slices of those with `parts`.

    Raises ValueError where the slices do not divide a matrix, KeyError where it is unknown.
    """
    stored = {name: shape for name, shape in shapes.items() if name not in parts}
    for name, count in parts.items():
        shape = shapes[name]
        if type(count) is not int or count < 1 or len(shape) != 2 or shape[1] % count:
            raise ValueError(f"{name}: {count!r} slices do not divide {list(shape)}")
        stored |= {ColumnSlice(name, index, count).name: (shape[0], shape[1] // count) for index in range(count)}
    return stored
