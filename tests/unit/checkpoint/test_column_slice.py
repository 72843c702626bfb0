"""Slices of columns have the values of the matrix they are of, however either is stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import build_manifest, save
from llm_training_toolkit.checkpoint import CheckpointReader
from llm_training_toolkit.checkpoint.manifest import read_manifest
from llm_training_toolkit.distributed.column_slice import ColumnSlice, list_stored_shapes
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import CheckpointError

OPTIMIZER = torch.optim.SGD([torch.zeros(1)])


class Part:
    """Piece of a stored slice, with the same values as weights and moments."""

    def __init__(self, name: str, start: int, values: torch.Tensor) -> None:
        self.name, self.start, self.count, self._values = name, start, len(values), values

    def get_tensors(self, optimizer: torch.optim.Optimizer) -> Mapping[str, torch.Tensor]:
        del optimizer
        return dict.fromkeys(("weights", "exp_avg", "exp_avg_sq"), self._values)


def write(directory: Path, whole: torch.Tensor, parts: int, cuts: list[int]) -> CheckpointReader:
    """A checkpoint of one matrix, in so many slices of columns, each in pieces that end at `cuts`."""
    pieces = []
    for index in range(parts):
        name = ColumnSlice("w", index, parts).name if parts > 1 else "w"
        flat = whole.chunk(parts, 1)[index].flatten()
        bounds = sorted({0, *(cut for cut in cuts if cut < len(flat)), len(flat)})
        pieces += [Part(name, start, flat[start:end]) for start, end in pairwise(bounds)]
    manifest = build_manifest(1, {"w": tuple(whole.shape)}, column_parts={"w": parts} if parts > 1 else {})
    save(RunContext(0, 1, torch.device("cpu")), directory, pieces, OPTIMIZER, manifest)
    return CheckpointReader(directory)


@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 3),
    stored=st.sampled_from([1, 2, 4]),
    wanted=st.sampled_from([2, 4]),
    cuts=st.lists(st.integers(1, 30), max_size=3),
    data=st.data(),
)
def test_any_range_is_that_of_the_matrix(
    rows: int, width: int, stored: int, wanted: int, cuts: list[int], data: st.DataObject
) -> None:
    whole = torch.arange(rows * width * 4, dtype=torch.float32).reshape(rows, width * 4)

    def draw_range(size: int) -> tuple[int, int]:
        start = data.draw(st.integers(0, size - 1))
        return start, data.draw(st.integers(1, size - start))

    with TemporaryDirectory() as directory:
        checkpoint = write(Path(directory) / "step_000000001_a1", whole, stored, cuts)
        start, count = draw_range(whole.numel())
        assert np.array_equal(checkpoint.read("w", "exp_avg", start, count), whole.flatten()[start:][:count])
        index = data.draw(st.integers(0, wanted - 1))
        own = whole.chunk(wanted, 1)[index].flatten()
        start, count = draw_range(len(own))
        found = checkpoint.read_columns(ColumnSlice("w", index, wanted), "weights", start, count)
        assert np.array_equal(found, own[start:][:count])


def test_stored_shapes_are_whole_ones_and_slices() -> None:
    shapes = {"w": (3, 8), "b": (3,)}
    assert list_stored_shapes(shapes, {"w": 2}) == {"b": (3,), "w[:, 0/2]": (3, 4), "w[:, 1/2]": (3, 4)}
    assert list_stored_shapes(shapes, {}) == shapes


@pytest.mark.parametrize("parts", [{"w": 3}, {"w": 0}, {"w": True}, {"b": 1}, {"x": 2}, {"w": 2.0}])
def test_slices_that_no_matrix_has_make_a_manifest_unreadable(tmp_path: Path, parts: dict[str, int]) -> None:
    write(tmp_path, torch.zeros(3, 8), 1, [])
    manifest = tmp_path / "manifest.json"
    text = manifest.read_text()
    assert '"column_parts": {}' in text
    manifest.write_text(text.replace('"column_parts": {}', f'"column_parts": {json.dumps(parts)}'))
    with pytest.raises(CheckpointError, match="not a readable manifest"):
        read_manifest(tmp_path)
