"""Discovery of checkpoints by directory scan, and reads of any range of any parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from llm_training_toolkit.checkpoint.manifest import MANIFEST_NAME, Manifest, compute_sha256, read_manifest
from llm_training_toolkit.distributed.column_slice import ColumnSlice
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs.directory import parse_checkpoint_name
from llm_training_toolkit.runs.storage.storage import LocalStorage, Storage

Array = NDArray[np.float32]


def list_complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the complete checkpoints in a directory, oldest first."""
    found = [path.parent for path in checkpoints.glob(f"*/{MANIFEST_NAME}") if parse_checkpoint_name(path.parent)]
    return sorted(found, key=lambda path: parse_checkpoint_name(path) or (0, 0))


def find_latest_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest complete checkpoint by directory scan, or None."""
    found = list_complete_checkpoints(checkpoints)
    return found[-1] if found else None


class CheckpointReader:
    """Complete checkpoint, open for reading."""

    def __init__(self, directory: Path, storage: Storage | None = None) -> None:
        self.directory, self.storage = directory, storage or LocalStorage()
        self.manifest: Manifest = read_manifest(directory)
        self._open: dict[int, Any] = {}

    def verify_files(self, share: int = 0, of: int = 1) -> list[str]:
        """Return the damage found. A rank checks every `of`-th file, so that each file is read once."""
        return [found for number in range(share, len(self.manifest.files), of) if (found := self.verify_file(number))]

    def verify_file(self, number: int) -> str | None:
        """Return one file's damage: missing, wrong size or wrong checksum; None if intact."""
        entry = self.manifest.files[number]
        path = self.directory / entry.name
        self.storage.fetch_file(path)
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != entry.size:
            return f"{path}: {path.stat().st_size} bytes, {entry.size} were written"
        if compute_sha256(path) != entry.sha256:
            return f"{path}: the checksum differs from what was written"
        return None

    def read(self, name: str, key: str, start: int, count: int) -> Array:
        """Return values [start, start + count) of a flattened parameter; `key` is weights, exp_avg or exp_avg_sq.

        Reads only the fragments that overlap the range. Raises CheckpointError when part of the range is missing.
        """
        parts = self.manifest.column_parts.get(name)
        if parts is None or name not in self.manifest.shapes:
            return self._read_stored(name, key, start, count)
        width = self.manifest.shapes[name][1]
        first, last = start // width, -(-(start + count) // width)
        rows = np.empty((last - first, width), dtype=np.float32)
        each = width // parts
        for index in range(parts):
            stored = self._read_stored(ColumnSlice(name, index, parts).name, key, first * each, (last - first) * each)
            rows[:, index * each : (index + 1) * each] = stored.reshape(-1, each)
        return rows.reshape(-1)[start - first * width :][:count]

    def read_columns(self, columns: ColumnSlice, key: str, start: int, count: int) -> Array:
        """Return values [start, start + count) of a flattened slice of a matrix's columns, however it is stored."""
        name = columns.parameter
        if self.manifest.column_parts.get(name) == columns.parts:
            return self._read_stored(columns.name, key, start, count)
        width = self.manifest.shapes[name][1]
        each = width // columns.parts
        first, last = start // each, -(-(start + count) // each)
        rows = self.read(name, key, first * width, (last - first) * width).reshape(-1, width)
        own = rows[:, columns.index * each : (columns.index + 1) * each]
        return own.reshape(-1)[start - first * each :][:count]

    def _read_stored(self, name: str, key: str, start: int, count: int) -> Array:
        """Read a range of a whole parameter, or of a slice that is stored by itself."""
        out = np.empty(count, dtype=np.float32)
        filled = 0
        for run in self.manifest.layout.get(name, ()):
            for piece_start, file in run.find_fragments(start, start + count):
                low, high = max(start, piece_start), min(start + count, piece_start + run.length)
                if low < high and low == start + filled:  # contiguous: an overlap must not make up for a gap
                    stored = self._open_file(file).get_slice(f"{name}@{piece_start}/{key}")
                    out[low - start : high - start] = stored[low - piece_start : high - piece_start]
                    filled += high - low
        if filled != count:
            raise CheckpointError(
                f"{self.directory}: {name} holds {filled} of the {count} values from {start} on: "
                "the checkpoint is of another model, or damaged"
            )
        return out

    def _open_file(self, index: int) -> Any:  # noqa: ANN401 - safetensors has no types
        if index not in self._open:
            path = self.directory / self.manifest.files[index].name
            self.storage.fetch_file(path)
            self._open[index] = safe_open(path, framework="numpy")
        return self._open[index]
