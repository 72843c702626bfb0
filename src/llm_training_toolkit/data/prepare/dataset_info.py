"""Description of prepared data: inputs, results and location."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_training_toolkit.errors import DataError

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
    """Location of one epoch, relative to the directory of its DatasetInfo, and its size.

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
    """

    share: int
    epochs: tuple[EpochInfo, ...]

    @property
    def sequences_per_epoch(self) -> tuple[int, ...]:
        """Sequences of each prepared epoch."""
        return tuple(epoch.sequences for epoch in self.epochs)


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
                StreamInfo(stream["share"], tuple(EpochInfo(**epoch) for epoch in stream["epochs"]))
                for stream in values["streams"]
            )
            return cls(**values)
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise DataError(f"data/dataset_info.json cannot be read ({error}). Run `ltt prepare` again.") from error
