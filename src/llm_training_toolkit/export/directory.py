"""Exported directory: complete or absent. Writes all files besides the weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from transformers import GenerationConfig

from llm_training_toolkit.data.tokenizer import TOKENIZER_FILES
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs.atomic_write import sync_directory
from llm_training_toolkit.runs.directory import RunDirectory

ORIGIN_FILE = "training.json"  # in every export


@dataclass(frozen=True)
class ModelFiles:
    """Contents of an exported directory besides the weights."""

    tokenizer: Path
    """Directory of the tokenizer, and of the chat template if there is one."""
    stop_token_ids: Mapping[str, int]
    """Special tokens that end generation, with their ids. Of several, the first ends an answer and becomes the
    tokenizer's `eos_token`: a chat model never generates the end of text."""
    pad: int
    card: str
    """Model card."""
    checkpoint_name: str
    """Name of the source checkpoint."""
    run_name: str


@contextmanager
def atomic_export_dir(destination: Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces `destination` once it is complete and synced.

    Raises CheckpointError on a failed write, and for a destination that holds anything other than an export.
    """
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file: name a directory (--out)")
    if not _is_replaceable(destination):
        raise CheckpointError(f"{destination} is not empty and no earlier export: name another directory (--out)")
    temporary = _get_temporary_dir(destination)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _open_to_readers(temporary)
        _sync_tree(temporary)
        _replace_directory(temporary, destination)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"export to {destination} failed: {error}. The checkpoint is untouched: free some space and start again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_replaceable(destination: Path) -> bool:
    """Return whether a directory is absent, empty, an export, or the run's own (and may be damaged)."""
    run = RunDirectory(destination.parent)
    is_own = run.resolved_config_path.is_file() and destination in {run.export_dir, run.task_export_dir}
    return (
        is_own
        or not destination.exists()
        or read_source_checkpoint_name(destination) is not None
        or not any(destination.iterdir())
    )


def _open_to_readers(directory: Path) -> None:
    """Give every file the rights of a new one: safetensors writes files that the owner alone may read."""
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(directory.stat().st_mode & 0o666)  # the directory's, which follow the umask


def _sync_tree(directory: Path) -> None:
    """Make the files below a directory survive a power loss, before a name says that they are complete."""
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace_directory(source: Path, destination: Path) -> None:
    """Rename a directory over another one; a kill leaves the old or the new one, or the old one under `replaced`."""
    replaced = _get_replaced_dir(destination)
    shutil.rmtree(replaced, ignore_errors=True)
    if destination.exists():
        destination.rename(replaced)
    source.rename(destination)
    sync_directory(destination.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _get_temporary_dir(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.writing")


def _get_replaced_dir(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.replaced")


def remove_export(destination: Path) -> None:
    """Delete an export, and the partial one of a killed process."""
    for directory in (destination, _get_temporary_dir(destination), _get_replaced_dir(destination)):
        shutil.rmtree(directory, ignore_errors=True)


def write_model_files(directory: Path, beside: ModelFiles) -> None:
    """Write generation configuration, tokenizer, model card and the names of the source checkpoint and its run."""
    ends = list(beside.stop_token_ids.values())
    stops = ends if len(ends) > 1 else ends[0]
    GenerationConfig(eos_token_id=stops, pad_token_id=beside.pad).save_pretrained(directory)
    _write_tokenizer(beside.tokenizer, directory, next(iter(beside.stop_token_ids)) if len(ends) > 1 else None)
    (directory / "README.md").write_text(beside.card)
    origin = {"checkpoint": beside.checkpoint_name, "run": beside.run_name}
    (directory / ORIGIN_FILE).write_text(json.dumps(origin))


def _write_tokenizer(source: Path, directory: Path, end: str | None) -> None:
    """Copy the tokenizer, and set its `eos_token` to `end` unless that is None."""
    for name in TOKENIZER_FILES:
        if not (source / name).is_file():
            continue
        shutil.copyfile(source / name, directory / name)
        if end is not None and name in {"tokenizer_config.json", "special_tokens_map.json"}:
            values = json.loads((source / name).read_text(encoding="utf-8")) | {"eos_token": end}
            (directory / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_source_checkpoint_name(directory: Path) -> str | None:
    """Return the name of an export's source checkpoint, or None if the directory holds no export."""
    return _read_origin(directory, "checkpoint")


def read_source_run_name(directory: Path) -> str | None:
    """Return the name of the run that was exported, or None if the directory does not tell."""
    return _read_origin(directory, "run")


def _read_origin(directory: Path, key: str) -> str | None:
    try:
        return str(json.loads((directory / ORIGIN_FILE).read_text())[key])
    except (OSError, ValueError, KeyError, TypeError):  # the last: JSON of another kind
        return None
