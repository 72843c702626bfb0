"""Layout of a checkpoint: every fragment is found, gaps and overlaps too, and thousands of ranks stay small."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import build_manifest
from llm_training_toolkit.checkpoint import FileEntry, read_manifest
from llm_training_toolkit.checkpoint.layout import (
    FragmentIndex,
    FragmentRun,
    build_layout,
    find_incomplete_parameters,
    index_fragments,
)

Fragments = list[tuple[str, int, int, int]]


@st.composite
def placed_fragments(draw: st.DrawFn) -> tuple[dict[str, tuple[int, ...]], Fragments, int]:
    """Parameters cut anywhere, each fragment in any file."""
    shapes: dict[str, tuple[int, ...]] = draw(
        st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1)
    )
    files = draw(st.integers(1, 5))
    fragments: Fragments = []
    for name, shape in shapes.items():
        size = math.prod(shape)
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=5))})
        fragments += [(name, low, high - low, draw(st.integers(0, files - 1))) for low, high in pairwise(cuts)]
    return shapes, fragments, files


def indexes_of(fragments: Fragments, shapes: dict[str, tuple[int, ...]], files: int) -> list[FragmentIndex]:
    return [index_fragments([piece[:3] for piece in fragments if piece[3] == file], shapes) for file in range(files)]


@given(placed_fragments())
def test_every_fragment_is_found_in_its_file(case: tuple[dict[str, tuple[int, ...]], Fragments, int]) -> None:
    shapes, fragments, files = case
    layout = build_layout(indexes_of(fragments, shapes, files), shapes)
    assert find_incomplete_parameters(layout, shapes) == []
    found = [
        (name, start, run.length, file)
        for name, runs in layout.items()
        for run in runs
        for start, file in run.find_fragments(run.start, run.end)
    ]
    assert sorted(found) == sorted(fragments)


@given(placed_fragments(), st.data())
def test_a_fragment_lost_or_doubled_is_found(
    case: tuple[dict[str, tuple[int, ...]], Fragments, int], data: st.DataObject
) -> None:
    shapes, fragments, files = case
    chosen = data.draw(st.sampled_from(fragments))
    lost = [piece for piece in fragments if piece != chosen]
    doubled = [*fragments, (*chosen[:3], data.draw(st.integers(0, files - 1)))]
    for wrong in (lost, doubled):
        assert find_incomplete_parameters(build_layout(indexes_of(wrong, shapes, files), shapes), shapes) == [chosen[0]]


@given(st.integers(0, 50), st.integers(1, 9), st.integers(1, 9), st.integers(0, 120), st.integers(0, 120))
def test_only_fragments_that_overlap_are_given(start: int, length: int, count: int, low: int, high: int) -> None:
    run = FragmentRun(start, length, count, first_file=3)
    expected = [
        (start + i * length, 3 + i)
        for i in range(count)
        if max(low, start + i * length) < min(high, start + (i + 1) * length)
    ]
    assert low >= high or list(run.find_fragments(low, high)) == expected


@pytest.mark.parametrize("numbers", [(0, 0, 1, 0), (0, 1, 0, 0), (-1, 1, 1, 0), (0, 1, 1, -1), (0, 1.5, 1, 0)])
def test_numbers_that_no_layout_has_are_refused(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="no run of fragments"):
        FragmentRun(*numbers)


def test_the_manifest_of_four_thousand_ranks_stays_below_a_megabyte(tmp_path: Path) -> None:
    ranks = 4096
    shapes = {f"model.layers.{i // 12}.self_attn.projection_{i % 12}.weight": (8192, 1000 + i) for i in range(963)}
    sizes = np.array([math.prod(shapes[name]) for name in sorted(shapes)])
    piece = -(-sizes // ranks)
    indexes = [
        FragmentIndex(np.arange(963, dtype=np.int32), rank * piece, np.minimum(piece, sizes - rank * piece))
        for rank in range(ranks)
    ]
    layout = build_layout(indexes, shapes)
    assert find_incomplete_parameters(layout, shapes) == []
    files = tuple(FileEntry(f"fragments_{rank:05d}.safetensors", 10**9, "a" * 64) for rank in range(ranks))
    manifest = build_manifest(shapes=shapes, world_size=ranks, zero=3, files=files, layout=layout)
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    assert (tmp_path / "manifest.json").stat().st_size < 1_000_000
    assert read_manifest(tmp_path) == manifest
