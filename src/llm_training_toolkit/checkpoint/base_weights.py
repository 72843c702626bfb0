"""Base weights of adapters: the files that an adapter checkpoint names with their checksums, but does not contain.

Beside other base weights such a checkpoint is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_training_toolkit.checkpoint.checksum_cache import read_sha256
from llm_training_toolkit.checkpoint.hub_commit import WEIGHT_PATTERNS
from llm_training_toolkit.checkpoint.manifest import FileEntry
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import CheckpointError

# In transformers' order: the first pattern with matches is used.
_WEIGHT_FILE_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class BaseWeights:
    """Weights that adapters are trained beside."""

    path: str
    """Directory or hub id, as given."""
    files: tuple[FileEntry, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the form stored in the manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BaseWeights:
        """Parse the form stored in the manifest."""
        return cls(values["path"], tuple(FileEntry(**entry) for entry in values["files"]))


def read_base_weights(path: str, context: RunContext, cache: Path) -> BaseWeights:
    """Return the weights at a path, each file hashed by one rank unless its checksum is in `cache`. Collective.

    `cache`: directory of prepared data. Raises CheckpointError when there are no weights.
    """
    files = find_weight_files(find_weights_directory(path))
    mine = [
        FileEntry(file.name, file.stat().st_size, read_sha256(file, cache / "checksums"))
        for file in files[context.rank :: context.world_size]
    ]
    entries = sorted(
        (entry for found in context.all_gather_object(mine) for entry in found), key=lambda entry: entry.name
    )
    return BaseWeights(path, tuple(entries))


def find_weights_directory(path: str, revision: str | None = None) -> Path:
    """Return the directory of weights: the path itself, or the local copy of a hub id at a revision (None = main).

    Raises CheckpointError if there is neither.
    """
    directory = Path(path).expanduser()
    if not directory.exists():
        # Every reader of checkpoints imports this module, and the hub client brings its own progress bars.
        from huggingface_hub import snapshot_download  # noqa: PLC0415
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

        try:
            # With the patterns, because without them the client calls a partly fetched repository absent.
            found = snapshot_download(path, revision=revision, allow_patterns=WEIGHT_PATTERNS, local_files_only=True)
            directory = Path(found)
        except HFValidationError as error:
            raise CheckpointError(f"{path}: there is no such directory") from error
        except (LocalEntryNotFoundError, OSError) as error:
            raise CheckpointError(
                f"{path}: no such directory, and nothing of this name fetched from the hub"
                f"{'' if revision is None else f' at revision {revision}'}"
            ) from error
    return directory


def find_weight_files(directory: Path) -> list[Path]:
    """Return the weight files of a directory, by name. Raises CheckpointError without any."""
    for pattern in _WEIGHT_FILE_PATTERNS:
        if found := sorted(directory.glob(pattern)):
            return found
    raise CheckpointError(f"{directory}: no weights there ({' or '.join(_WEIGHT_FILE_PATTERNS)})")


def check_base_matches(saved: BaseWeights, now: BaseWeights) -> None:
    """Raise CheckpointError if the base weights differ from those the adapters were trained with."""
    saved_hashes, current_hashes = ({entry.name: entry.sha256 for entry in base.files} for base in (saved, now))
    if saved_hashes == current_hashes:
        return
    differing = sorted(
        name
        for name in saved_hashes.keys() | current_hashes.keys()
        if saved_hashes.get(name) != current_hashes.get(name)
    )
    name = differing[0]
    what = (
        "is not there"
        if name not in current_hashes
        else "was not there"
        if name not in saved_hashes
        else "has other content"
    )
    raise CheckpointError(
        f"{now.path}: not the weights these adapters were trained beside ({saved.path}): {name} {what}. Adapters "
        "belong to one base: bring its files back, or start a new run under another run.name"
    )
