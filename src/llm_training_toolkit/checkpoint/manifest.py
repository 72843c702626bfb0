"""Checkpoint manifest: the contents of a checkpoint. Written last: it makes the directory a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llm_training_toolkit.checkpoint.layout import FragmentRun, Layout
from llm_training_toolkit.checkpoint.state import SkippedStep, StepStats
from llm_training_toolkit.distributed.column_slice import list_stored_shapes
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs.storage.object_keys import find_name_problem

MANIFEST_FORMAT = 3


class UnknownFormatError(CheckpointError):
    """Checkpoint of another version of the toolkit. Its files are intact, so it is never quarantined."""


MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class FileEntry:
    """File of a checkpoint. Raises ValueError for a name that would lead out of its directory."""

    name: str
    size: int
    """Bytes."""
    sha256: str

    def __post_init__(self) -> None:
        if problem := find_name_problem(self.name):
            raise ValueError(f"{self.name!r} is no file of a checkpoint: {problem}")


@dataclass(frozen=True)
class Manifest:
    """Everything needed to load a checkpoint, and its origin."""

    step: int
    """Completed optimizer steps."""
    tokens: int
    """Tokens seen along the lineage, padding included."""
    sequences: int
    """Sequences seen along the lineage: the position in the data to resume from."""
    attempt: int
    parent: str | None
    """Directory name of the checkpoint that the attempt resumed from, or None if it began at step 0."""
    world_size: int
    zero: int
    threads: int
    """Threads per rank; another number rounds differently."""
    config_fingerprint: str
    data_fingerprint: str
    versions: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each trainable parameter."""
    files: tuple[FileEntry, ...] = ()
    layout: Layout = field(default_factory=dict)
    """Fragments of each parameter or slice, sorted; file numbers count in `files`."""
    skips: tuple[SkippedStep, ...] = ()
    """Skipped updates along the lineage, with their sequences."""
    recent: tuple[StepStats, ...] = ()
    """Losses and gradient norms of the last steps, for comparison with the next one."""
    eval_loss: float | None = None
    """Held-out loss of exactly this step, or None if it was not measured."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    run_id: str = ""
    """Random id of the run, as in its attempts."""
    column_parts: Mapping[str, int] = field(default_factory=dict)
    """Parameters that are stored as slices of columns, and the number of these (engine.tensor_parallel)."""

    @property
    def update_count(self) -> int:
        """Number of times the optimizer has updated the weights."""
        return self.step - len(self.skips)

    @property
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what the files hold: whole parameters, and slices of columns."""
        return list_stored_shapes(self.shapes, self.column_parts)

    def to_json(self) -> str:
        """Return the stored form: a line a field, a parameter's layout and a file as lists, 0.7 MB at 4,096 ranks."""
        files = [[entry.name, entry.size, entry.sha256] for entry in self.files]
        layout = {
            name: [[run.start, run.length, run.count, run.first_file] for run in runs]
            for name, runs in self.layout.items()
        }
        small = asdict(replace(self, files=(), layout={}))
        fields = {"format": MANIFEST_FORMAT, **small, "files": files, "layout": layout}
        return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()) + "\n}\n"


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a checkpoint directory. Raises CheckpointError when it cannot be parsed.

    OSError of the storage propagates: a file that is unreadable now may be undamaged.
    """
    path = directory / MANIFEST_NAME
    try:
        data = json.loads(path.read_text())
        found = data.pop("format")
        if found != MANIFEST_FORMAT:
            raise UnknownFormatError(
                f"{path}: format {found}, this version reads {MANIFEST_FORMAT}: use the version that wrote it"
            )
        data["files"] = tuple(FileEntry(*entry) for entry in data["files"])
        data["layout"] = {
            name: tuple(FragmentRun(*numbers) for numbers in runs) for name, runs in data["layout"].items()
        }
        data["shapes"] = {name: tuple(shape) for name, shape in data["shapes"].items()}
        data["skips"] = tuple(SkippedStep(*skip) for skip in data["skips"])
        data["recent"] = tuple(StepStats(*step) for step in data["recent"])
        manifest = Manifest(**data)
        list_stored_shapes(manifest.shapes, manifest.column_parts)  # raises for slices that no matrix has
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable manifest ({error!r}): delete the directory") from error
    return manifest


def compute_sha256(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
