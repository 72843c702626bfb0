"""Checkpoint files: what was written reads back bit for bit, and what was not written whole is not there."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import Tensor

from checkpoints import build_manifest, save
from llm_training_toolkit.checkpoint import (
    AsyncWrite,
    CheckpointReader,
    FileEntry,
    allocate_host_buffer,
    commit_checkpoint,
    find_latest_checkpoint,
    list_complete_checkpoints,
)
from llm_training_toolkit.checkpoint.host_buffer import _build_header, compute_serialized_size
from llm_training_toolkit.checkpoint.manifest import read_manifest
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs.directory import RunDirectory
from machine_limits import no_file_beyond

ONE_RANK = RunContext(0, 1, torch.device("cpu"))
OPTIMIZER = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
KEYS = ("weights", "exp_avg", "exp_avg_sq")
Values = Mapping[str, Mapping[str, Tensor]]
"""Parameter to key to flat values."""


@dataclass(frozen=True)
class Part:
    """A piece cut by hand."""

    name: str
    start: int
    values: Mapping[str, Tensor]

    @property
    def count(self) -> int:
        return len(self.values["weights"])

    def get_tensors(self, optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:  # noqa: ARG002 - the protocol
        return self.values


def values_of(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Values:
    generator = torch.Generator().manual_seed(seed)
    return {name: {key: torch.randn(math.prod(s), generator=generator) for key in KEYS} for name, s in shapes.items()}


def cut(values: Values, cuts: Mapping[str, Sequence[int]]) -> list[Part]:
    """The values of each parameter, cut at the given places."""
    parts = []
    for name, tensors in values.items():
        ends = [0, *sorted(set(cuts.get(name, ()))), len(tensors["weights"])]
        for start, end in pairwise(ends):
            parts.append(Part(name, start, {key: tensor[start:end] for key, tensor in tensors.items()}))
    return parts


SHAPES: dict[str, tuple[int, ...]] = {"embed.weight": (16, 8), "norm.weight": (8,), "scale": ()}


def write(directory: Path, step: int = 1, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Values:
    values = values_of(shapes, seed=step)
    save(ONE_RANK, directory, cut(values, {}), OPTIMIZER, build_manifest(step, shapes, tokens=64 * step))
    return values


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


@st.composite
def cut_parameters(draw: st.DrawFn) -> tuple[dict[str, tuple[int, ...]], dict[str, list[int]]]:
    shape = st.lists(st.integers(1, 7), max_size=3).map(tuple)
    shapes = draw(st.dictionaries(st.sampled_from(["a.weight", "b@0.bias", "ü/c", "d"]), shape, min_size=1))
    places = {name: math.prod(shape) - 1 for name, shape in shapes.items()}
    cuts = {n: draw(st.lists(st.integers(1, last), max_size=4)) if last else [] for n, last in places.items()}
    return shapes, cuts


@settings(deadline=None, max_examples=60)
@given(cut_parameters(), st.data())
def test_any_range_of_any_parameter_reads_back_bit_for_bit(
    cut_at: tuple[dict[str, tuple[int, ...]], dict[str, list[int]]], data: st.DataObject
) -> None:
    shapes, cuts = cut_at
    values = values_of(shapes)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "step_000000001_a1"
        parts = data.draw(st.permutations(cut(values, cuts)))
        save(ONE_RANK, directory, parts, OPTIMIZER, build_manifest(shapes=shapes))
        checkpoint = CheckpointReader(directory)
        assert checkpoint.verify_files() == []
        for name, tensors in values.items():
            size = math.prod(shapes[name])
            start = data.draw(st.integers(0, size))
            count = data.draw(st.integers(0, size - start))
            for key in KEYS:
                got = checkpoint.read(name, key, start, count)
                assert got.dtype == np.float32
                assert got.tobytes() == tensors[key][start : start + count].numpy().tobytes()
            assert np.array_equal(checkpoint.read(name, "weights", 0, size), tensors["weights"].numpy())
        assert checkpoint.manifest.shapes == shapes


def test_what_is_written_is_the_moment_it_began_however_slow_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, values = Event(), values_of(SHAPES)
    before = {name: tensors["weights"].clone() for name, tensors in values.items()}

    def slow(path: Path, mode: str, buffering: int) -> Any:
        assert may_write.wait(30)
        return open(path, mode, buffering)  # noqa: PTH123 - the path's own is what is slow here

    monkeypatch.setattr(Path, "open", slow)
    pieces = cut(values, {})
    began = time.monotonic()
    writing = AsyncWrite(0, tmp_path / "c", pieces, OPTIMIZER, allocate_host_buffer(pieces))
    assert time.monotonic() - began < 10
    for tensors in values.values():  # the training continues
        for tensor in tensors.values():
            tensor.add_(1)
    was_done = writing.is_done
    assert find_latest_checkpoint(tmp_path) is None
    may_write.set()
    writing.wait_for_result()
    monkeypatch.undo()
    commit_checkpoint(ONE_RANK, writing, build_manifest(shapes=SHAPES))
    assert (was_done, writing.is_done) == (False, True)
    checkpoint = CheckpointReader(tmp_path / "c")
    for name, weights in before.items():
        assert checkpoint.read(name, "weights", 0, len(weights)).tobytes() == weights.numpy().tobytes()


def test_an_error_of_ours_in_the_thread_comes_up_where_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_file: int) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("os.fsync", broken)
    pieces = cut(values_of(SHAPES), {})
    writing = AsyncWrite(0, tmp_path / "c", pieces, OPTIMIZER, allocate_host_buffer(pieces))
    with pytest.raises(ZeroDivisionError):
        commit_checkpoint(ONE_RANK, writing, build_manifest(shapes=SHAPES))


def test_memory_is_used_again_for_other_pieces_and_the_files_are_plain_safetensors(tmp_path: Path) -> None:
    memory = allocate_host_buffer([])
    # It grows, and a shorter file has nothing of a longer one before. The second is written in chunks and a rest.
    for number, size in enumerate((5, 800_000, 2)):
        values = values_of({"w": (size,), 'ü "quoted"': (1,)}, seed=number)
        writing = AsyncWrite(number, tmp_path, cut(values, {}), OPTIMIZER, memory)
        entry = writing.wait_for_result().entry
        assert entry is not None
        path = tmp_path / entry.name
        assert (entry.size, entry.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        found = load_file(path)
        assert found.keys() == {f"{name}@0/{key}" for name in values for key in KEYS}
        for name, tensors in values.items():
            assert all(np.array_equal(found[f"{name}@0/{key}"], each.numpy()) for key, each in tensors.items())


def test_values_that_are_no_ordinary_numbers_survive(tmp_path: Path) -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, 3.4e38])
    part = Part("w", 0, dict.fromkeys(KEYS, odd))
    save(ONE_RANK, tmp_path / "c", [part], OPTIMIZER, build_manifest(shapes={"w": (6,)}))
    assert CheckpointReader(tmp_path / "c").read("w", "weights", 0, 6).tobytes() == odd.numpy().tobytes()


@pytest.mark.parametrize(("start", "count"), [(120, 9), (128, 1), (-1, 3)])
def test_a_range_beyond_the_parameter_is_an_error(tmp_path: Path, start: int, count: int) -> None:
    write(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"embed\.weight holds"):
        CheckpointReader(tmp_path / "c").read("embed.weight", "weights", start, count)


def test_a_parameter_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "c")
    with pytest.raises(CheckpointError, match="head holds 0 of the 4 values"):
        CheckpointReader(tmp_path / "c").read("head", "weights", 0, 4)


def part(start: int, count: int) -> Part:
    return Part("w", start, {key: torch.full((count,), 1.0) for key in KEYS})


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [part(0, 9)],
        [part(0, 11)],
        [part(0, 4), part(5, 5)],
        [part(1, 10)],
        [part(0, 5), part(3, 5)],  # ten values, two of them twice
        [part(0, 5), part(7, 5)],
        [part(0, 10), part(10, 1)],
    ],
    ids=lambda parts: "+".join(f"{each.start}:{each.start + each.count}" for each in parts) or "none",
)
def test_pieces_that_do_not_add_up_are_an_error_and_leave_nothing(run: RunDirectory, parts: list[Part]) -> None:
    write(run.get_checkpoint_dir(1, 1))
    with pytest.raises(CheckpointError, match="the pieces of w do not add up"):
        save(ONE_RANK, run.get_checkpoint_dir(2, 1), parts, OPTIMIZER, build_manifest(2, {"w": (10,)}))
    assert list(run.checkpoints_dir.iterdir()) == [run.get_checkpoint_dir(1, 1)]


def test_reading_does_not_let_an_overlap_make_up_for_a_gap(tmp_path: Path) -> None:
    parts = [part(0, 5), part(5, 5)]
    save(ONE_RANK, tmp_path / "c", parts, OPTIMIZER, build_manifest(shapes={"w": (10,)}))
    edit_manifest(tmp_path / "c", lambda manifest: manifest["layout"]["w"].__setitem__(1, [0, 5, 1, 0]))
    with pytest.raises(CheckpointError, match="w holds 5 of the 10 values"):
        CheckpointReader(tmp_path / "c").read("w", "weights", 0, 10)


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((directory / "manifest.json").read_text())
    change(data)
    (directory / "manifest.json").write_text(json.dumps(data))


LARGE: dict[str, tuple[int, ...]] = {"large": (1 << 16,)}


def assert_a_full_disk_costs_only_the_checkpoint_being_written(run: RunDirectory) -> None:
    with pytest.raises(CheckpointError, match=r"could not be written.*rank 0.*free some space.*same command again"):
        write(run.get_checkpoint_dir(2, 1), 2, LARGE)
    assert list(run.checkpoints_dir.iterdir()) == [run.get_checkpoint_dir(1, 1)]
    found = find_latest_checkpoint(run.checkpoints_dir)
    assert found == run.get_checkpoint_dir(1, 1)
    assert CheckpointReader(found).verify_files() == []


def test_a_full_disk_costs_only_the_checkpoint_being_written(run: RunDirectory) -> None:
    run.checkpoints_dir.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "none", run.checkpoints_dir],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a disk to fill needs the right to mount one: {mounted.stderr.strip()}")
    try:
        write(run.get_checkpoint_dir(1, 1), 1)
        assert_a_full_disk_costs_only_the_checkpoint_being_written(run)
        write(run.get_checkpoint_dir(2, 1), 2)
        assert find_latest_checkpoint(run.checkpoints_dir) == run.get_checkpoint_dir(2, 1)
    finally:
        subprocess.run(["umount", "--lazy", run.checkpoints_dir], check=True)


def test_fragments_the_kernel_refuses_cost_only_the_checkpoint_being_written(run: RunDirectory) -> None:
    write(run.get_checkpoint_dir(1, 1), 1)
    with no_file_beyond(10_000):
        assert_a_full_disk_costs_only_the_checkpoint_being_written(run)


def test_a_manifest_the_kernel_refuses_costs_only_the_checkpoint_being_written(run: RunDirectory) -> None:
    write(run.get_checkpoint_dir(1, 1), 1)
    single = [Part("w", 0, {"weights": torch.zeros(1)})]
    large = replace(build_manifest(2, {"w": (1,)}), versions={f"package{i}": "1" for i in range(100)})
    with no_file_beyond(1_000), pytest.raises(CheckpointError, match=r"rank 0: .*File too large"):
        save(ONE_RANK, run.get_checkpoint_dir(2, 1), single, OPTIMIZER, large)
    assert list(run.checkpoints_dir.iterdir()) == [run.get_checkpoint_dir(1, 1)]


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="Not a directory"):
        write(tmp_path / "file" / "step_000000001_a1")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [(truncate, "bytes, .* were written"), (flip, "checksum differs"), (Path.unlink, "missing")],
    ids=["a byte too few", "a flipped bit", "no file"],
)
def test_damage_is_found_and_named(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    write(tmp_path / "c")
    file = tmp_path / "c" / "fragments_00000.safetensors"
    damage(file)
    [fault] = CheckpointReader(tmp_path / "c").verify_files()
    assert fault.startswith(f"{file}: ")
    assert re.search(said, fault)


@given(files=st.integers(0, 12), ranks=st.integers(1, 8))
@settings(deadline=None)
def test_the_ranks_together_check_each_file_once(files: int, ranks: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        entries = tuple(FileEntry(f"f{i}", 1, "0") for i in range(files))
        (directory / "manifest.json").write_text(replace(build_manifest(shapes={}), files=entries).to_json())
        checkpoint = CheckpointReader(directory)
        found = [fault for rank in range(ranks) for fault in checkpoint.verify_files(rank, ranks)]
    assert sorted(found) == sorted(f"{directory}/f{i}: missing" for i in range(files))


def test_checkpoints_are_found_oldest_first_and_by_number(run: RunDirectory) -> None:
    places = [(9, 2), (100, 1), (9, 10), (20, 1)]
    for step, attempt in places:
        write(run.get_checkpoint_dir(step, attempt), step)
    assert list_complete_checkpoints(run.checkpoints_dir) == [
        run.get_checkpoint_dir(*place) for place in sorted(places)
    ]
    assert find_latest_checkpoint(run.checkpoints_dir) == run.get_checkpoint_dir(100, 1)


def test_a_directory_without_a_manifest_is_not_found(run: RunDirectory) -> None:
    assert find_latest_checkpoint(run.checkpoints_dir) is None
    write(run.get_checkpoint_dir(1, 1), 1)
    write(run.get_checkpoint_dir(2, 1), 2)
    (run.get_checkpoint_dir(2, 1) / "manifest.json").unlink()
    assert find_latest_checkpoint(run.checkpoints_dir) == run.get_checkpoint_dir(1, 1)


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "c", 7)
    manifest = read_manifest(tmp_path / "c")
    assert (manifest.step, manifest.tokens, manifest.shapes) == (7, 448, SHAPES)
    assert json.loads(manifest.to_json()) == json.loads((tmp_path / "c" / "manifest.json").read_text())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"null", b"[]", b"3", b'"text"', b"{}", b'{"format": 3}', b'{"format": 3, "files": [1]}'],
    ids=repr,
)
def test_an_unreadable_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json: not a readable manifest"):
        CheckpointReader(tmp_path)


Json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ("format", "files", "layout", "shapes", "skips", "step", "versions")


@settings(deadline=None)
@given(field=st.sampled_from(FIELDS), value=Json)
def test_a_manifest_with_anything_in_a_field_is_read_or_refused(field: str, value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "c"
        write(directory)
        edit_manifest(directory, lambda manifest: manifest.update({field: value}))
        try:
            read_manifest(directory)
        except CheckpointError as error:
            assert str(directory) in str(error)  # noqa: PT017 - both outcomes are right


def test_a_manifest_of_another_format_says_which_version_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "c")
    edit_manifest(tmp_path / "c", lambda manifest: manifest.update(format=2))
    with pytest.raises(CheckpointError, match="format 2, this version reads 3"):
        CheckpointReader(tmp_path / "c")


def test_a_checkpoint_set_aside_is_not_found_and_loses_nothing(run: RunDirectory) -> None:
    write(run.get_checkpoint_dir(1, 1), 1)
    values = write(run.get_checkpoint_dir(2, 1), 2)
    assert (
        run.storage.quarantine_checkpoint(run.get_checkpoint_dir(2, 1))
        == "it lies in quarantine_1_step_000000002_a1 now"
    )
    aside = run.checkpoints_dir / "quarantine_1_step_000000002_a1"
    assert find_latest_checkpoint(run.checkpoints_dir) == run.get_checkpoint_dir(1, 1)
    assert np.array_equal(CheckpointReader(aside).read("scale", "weights", 0, 1), values["scale"]["weights"].numpy())


def test_setting_aside_twice_overwrites_nothing(run: RunDirectory) -> None:
    for number in (1, 2, 3):
        write(run.get_checkpoint_dir(2, 1), number)
        assert (
            run.storage.quarantine_checkpoint(run.get_checkpoint_dir(2, 1))
            == f"it lies in quarantine_{number}_step_000000002_a1 now"
        )
    assert [CheckpointReader(path).manifest.step for path in sorted(run.checkpoints_dir.iterdir())] == [1, 2, 3]


def test_a_complete_checkpoint_is_neither_written_over_nor_deleted(run: RunDirectory) -> None:
    directory = run.get_checkpoint_dir(1, 1)
    write(directory)
    with pytest.raises(CheckpointError, match="is a complete checkpoint"):
        write(directory)
    assert list_complete_checkpoints(run.checkpoints_dir) == [directory]
    assert CheckpointReader(directory).verify_files() == []


@given(st.lists(st.integers(1, 2**32), min_size=1, max_size=60))
def test_reserved_memory_holds_the_header_of_files_of_any_size(counts: list[int]) -> None:
    names = {f"weights.layer.{number}": count for number, count in enumerate(counts)}
    places, end = {}, 0
    for name, count in names.items():
        places[name], end = (end, end + 4 * count), end + 4 * count
    assert len(_build_header(places)) + end <= compute_serialized_size(names)
