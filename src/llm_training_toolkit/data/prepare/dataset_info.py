"""Prepared data: its description (inputs, results, location), and its place and key in the cache."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.uri import is_uri
from llm_training_toolkit.errors import DataError

FORMAT_VERSION = 8  # part of every key: raise it when the same documents would give different files
FAULT_REPORT_NAME = "faults.json"  # beside the documents' index, and beside dataset_info.json in the run


@dataclass(frozen=True)
class SourceInfo:
    """Statistics of one source: documents includes held-out ones; dropped counts those left out, by reason.

    Training examples of the first epoch: tokens, loss_tokens (labels other than -100).
    Longest document: longest (tokens before splitting), longest_document (name).
    Documents dropped as too long: truncated (share of all tokens), 0 unless `overlong` drops them; others are complete.
    Files and repositories cut into several documents because of their size: cut.
    """

    path: str
    documents: int
    held_out: int
    dropped: dict[str, int]
    tokens: int
    loss_tokens: int
    longest: int
    longest_document: str
    truncated: float
    cut: int = 0


@dataclass(frozen=True)
class EpochInfo:
    """Location of one epoch, or of one partition of it, relative to the directory of its DatasetInfo, and its size.

    filled: tokens in its sequences, without padding. lost: rendered tokens outside all sequences; 0.
    """

    tokens: str
    plan: str
    sequences: int
    filled: int
    lost: int


@dataclass(frozen=True)
class StreamInfo:
    """A stream of sequences: all sources together, or one source if sources have weights.

    share: its part of the mixture, in sequences relative to the other streams; it makes the weights shares of tokens.
    epochs: prepared epochs in training order; with several `partitions`, those of the first epoch, then of the second.
    """

    share: int
    epochs: tuple[EpochInfo, ...]
    partitions: int = 1

    @property
    def sequences_per_part(self) -> tuple[int, ...]:
        """Sequences of each prepared part: an epoch, or a partition of one."""
        return tuple(epoch.sequences for epoch in self.epochs)

    @property
    def sequences_per_epoch(self) -> tuple[int, ...]:
        """Sequences of each epoch, as far as it is prepared."""
        parts, size = self.sequences_per_part, self.partitions
        return tuple(sum(parts[first : first + size]) for first in range(0, len(parts), size))


@dataclass(frozen=True)
class DatasetInfo:
    """Everything a worker needs to open prepared data, and a person to judge it.

    streams: one, or, if sources have weights, one per training source, in their order.
    padding: share in the sequences of all prepared epochs. tokens_lost: rendered tokens outside all sequences; 0.
    eval_sequences: held-out sequences of an evaluation, of all `held_out_sequences`.
    """

    fingerprint: str
    directory: str
    tokenizer_path: str
    vocab_size: int
    pad_id: int
    sequence_length: int
    seed: int
    sources: tuple[SourceInfo, ...]
    streams: tuple[StreamInfo, ...]
    held_out: str
    held_out_plan: str
    eval_sequences: int
    padding: float
    tokens_lost: int
    held_out_sequences: int = 0

    @property
    def total_sequences(self) -> int:
        """Sequences of all prepared epochs."""
        return sum(sum(stream.sequences_per_epoch) for stream in self.streams)

    @property
    def fault_report(self) -> Path | None:
        """The list of documents that were skipped, None if there are none."""
        file = Path(self.directory, FAULT_REPORT_NAME)
        return file if file.is_file() else None

    def to_json(self) -> str:
        """Return the JSON text that `from_json` reads."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DatasetInfo:
        """Read JSON text. Raises DataError if it is malformed or of another version."""
        try:
            values: dict[str, Any] = json.loads(text)
            values["sources"] = tuple(SourceInfo(**source) for source in values["sources"])
            values["streams"] = tuple(
                StreamInfo(**stream | {"epochs": tuple(EpochInfo(**epoch) for epoch in stream["epochs"])})
                for stream in values["streams"]
            )
            return cls(**values)
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise DataError(f"data/dataset_info.json cannot be read ({error}). Run `ltt prepare` again.") from error


@dataclass(frozen=True)
class PreparedDataset:
    """Prepared data on disk: its DatasetInfo, the tokenizer's directory, and the directory of everything else."""

    dataset_info: DatasetInfo
    tokenizer_path: Path
    directory: Path

    @classmethod
    def from_info(cls, dataset_info: DatasetInfo) -> PreparedDataset:
        """Reopen prepared data from its DatasetInfo. Raises DataError if its files are missing."""
        directory, tokenizer = Path(dataset_info.directory), Path(dataset_info.tokenizer_path)
        epochs = [epoch for stream in dataset_info.streams for epoch in stream.epochs]
        file_names = [
            dataset_info.held_out,
            dataset_info.held_out_plan,
            *(name for epoch in epochs for name in (epoch.tokens, epoch.plan)),
        ]
        for path in [tokenizer, *(directory / name for name in file_names)]:
            if not path.is_dir():
                raise DataError(
                    f"{path}: the prepared data is not there. Run `ltt prepare` again; on a cluster, data.cache must "
                    "be a directory that every node sees."
                )
        return cls(dataset_info, tokenizer, directory)


def get_cache_directory(config: Config) -> Path:
    """Return the directory of prepared data, shared by runs: data.cache, or `<run.dir>/.cache`.

    Prepared data is memory-mapped, so for runs in an object store each machine has its own.
    """
    beside = "~/.cache/llm-training-toolkit" if is_uri(config.run.dir) else f"{config.run.dir}/.cache"
    folder = Path(beside if config.data.cache == "auto" else config.data.cache)
    return folder.expanduser().resolve()


def compute_cache_key(*values: Any) -> str:  # noqa: ANN401 - any JSON
    """Return the SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
