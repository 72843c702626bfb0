"""The manifest: what a checkpoint holds. Written last, so that a directory without one is no checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llm_training_toolkit.checkpoint.state import SkippedStep, StepStats
from llm_training_toolkit.errors import CheckpointError

MANIFEST_FORMAT = 2


class UnknownFormatError(CheckpointError):
    """A checkpoint of another version of the toolkit: whole, but not to be read here, and so never set aside."""


MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class FileEntry:
    """A file of a checkpoint."""

    name: str
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything needed to load a checkpoint and to know where it comes from."""

    step: int
    """Completed optimizer steps."""
    tokens: int
    """Tokens seen along the lineage, padding included."""
    sequences: int
    """Sequences seen along the lineage: where the data goes on."""
    attempt: int
    parent: str | None
    """Directory name of the checkpoint the attempt went on from; None from the start."""
    world_size: int
    zero: int
    threads: int
    """Threads per rank; another number gives other rounding."""
    config_fingerprint: str
    data_fingerprint: str
    versions: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each trainable parameter."""
    files: tuple[FileEntry, ...]
    fragments: tuple[tuple[str, int, int, int], ...]
    """(parameter, start, count, index into files) of every piece."""
    skips: tuple[SkippedStep, ...] = ()
    """Updates that were left out along the lineage, with their sequences."""
    recent: tuple[StepStats, ...] = ()
    """Losses and gradient norms of the last steps: what the next one is compared with."""
    eval_loss: float | None = None
    """The held-out loss of exactly this step; None where it was not measured then."""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def update_count(self) -> int:
        """How often the optimizer has updated the weights."""
        return self.step - len(self.skips)

    def to_json(self) -> str:
        """As stored."""
        return json.dumps({"format": MANIFEST_FORMAT, **asdict(self)}, indent=1)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint directory. Raises CheckpointError when it cannot be understood.

    What the storage says (OSError) goes out as it is: a file that cannot be read now is not damaged.
    """
    path = directory / MANIFEST_NAME
    try:
        data = json.loads(path.read_text())
        found = data.pop("format")
        if found != MANIFEST_FORMAT:
            raise UnknownFormatError(
                f"{path}: format {found}, this version reads {MANIFEST_FORMAT}: use the version that wrote it"
            )
        data["files"] = tuple(FileEntry(**entry) for entry in data["files"])
        data["fragments"] = tuple(tuple(piece) for piece in data["fragments"])
        data["shapes"] = {name: tuple(shape) for name, shape in data["shapes"].items()}
        data["skips"] = tuple(SkippedStep(*skip) for skip in data["skips"])
        data["recent"] = tuple(StepStats(*step) for step in data["recent"])
        return Manifest(**data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a readable manifest ({error!r}): delete the directory") from error


def compute_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
