"""What adapters belong to: the files of the model's own weights, which their checkpoints do not hold.

A checkpoint with adapters names these files and their checksums; beside other weights it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_training_toolkit.checkpoint.manifest import FileEntry, compute_sha256
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import CheckpointError

_WEIGHT_FILE_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
"""Weights as transformers looks for them: the first kind that is there."""


@dataclass(frozen=True)
class BaseWeights:
    """The weights that adapters stand beside."""

    path: str
    """As it was given: a directory or a hub id."""
    files: tuple[FileEntry, ...]

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BaseWeights:
        """As the manifest has it."""
        return cls(values["path"], tuple(FileEntry(**entry) for entry in values["files"]))


def read_base_weights(path: str, context: RunContext) -> BaseWeights:
    """The weights at a path, each file read by one rank. Collective. Raises CheckpointError when there are none."""
    files = find_weight_files(path)
    mine = [
        FileEntry(file.name, file.stat().st_size, compute_sha256(file))
        for file in files[context.rank :: context.world_size]
    ]
    entries = sorted(
        (entry for found in context.all_gather_object(mine) for entry in found), key=lambda entry: entry.name
    )
    return BaseWeights(path, tuple(entries))


def find_weight_files(path: str) -> list[Path]:
    """The files of weights in a directory, or of a hub id that has been fetched, by name."""
    directory = Path(path).expanduser()
    if not directory.exists():
        # Whoever reads checkpoints reads this module, and the hub's client brings progress bars of its own.
        from huggingface_hub import snapshot_download  # noqa: PLC0415
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

        try:
            directory = Path(snapshot_download(path, local_files_only=True))
        except HFValidationError as error:
            raise CheckpointError(f"{path}: there is no such directory") from error
        except (LocalEntryNotFoundError, OSError) as error:
            raise CheckpointError(
                f"{path}: no such directory, and nothing of this name fetched from the hub"
            ) from error
    for pattern in _WEIGHT_FILE_PATTERNS:
        if found := sorted(directory.glob(pattern)):
            return found
    raise CheckpointError(f"{path}: no weights there ({' or '.join(_WEIGHT_FILE_PATTERNS)})")


def check_base_matches(saved: BaseWeights, now: BaseWeights) -> None:
    """Raise CheckpointError when adapters would stand beside other weights than they were trained with."""
    before, found = ({entry.name: entry.sha256 for entry in base.files} for base in (saved, now))
    if before == found:
        return
    differing = sorted(name for name in before.keys() | found.keys() if before.get(name) != found.get(name))
    name = differing[0]
    what = "is not there" if name not in found else "was not there" if name not in before else "has other content"
    raise CheckpointError(
        f"{now.path}: not the weights these adapters were trained beside ({saved.path}): {name} {what}. Adapters "
        "belong to one base: bring its files back, or start a new run under another run.name"
    )
