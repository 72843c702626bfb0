"""The receipt of prepared data: what went in, what came out, and where it lies."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from llm_training_toolkit.errors import DataError


@dataclass(frozen=True)
class SourceInfo:
    """What became of one source.

    documents: kept, held-out ones included. dropped: documents left out, by reason. tokens, loss_tokens (labels other
    than -100): of its training examples in the first epoch. longest: tokens of its longest document, before cutting;
    longest_document: its name. truncated: share of all its tokens that belong to documents dropped as too long; 0
    unless that was asked for, as no document is ever cut short.
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


@dataclass(frozen=True)
class EpochInfo:
    """Where one epoch lies, relative to the receipt's directory, and what it has.

    filled: tokens in its sequences, without padding. lost: rendered tokens that no sequence holds; 0.
    """

    tokens: str
    plan: str
    sequences: int
    filled: int
    lost: int


@dataclass(frozen=True)
class StreamInfo:
    """A stream of sequences: all sources together, or where they have weights one source; `share`: its part of the mix.

    Shares are of sequences, relative to the other streams'; they make the weights shares of tokens.
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

    streams: one, or where sources have weights one for each of those that are trained on, in their order.
    padding: share of padding in all prepared epochs' sequences. tokens_lost: rendered tokens that no sequence holds; 0.
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

    @property
    def total_sequences(self) -> int:
        """Sequences of all prepared epochs."""
        return sum(sum(stream.sequences_per_epoch) for stream in self.streams)

    def to_json(self) -> str:
        """The receipt as text that `from_json` reads back."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DatasetInfo:
        """Read a receipt. Raises DataError where it is none, or of another version."""
        try:
            values: dict[str, Any] = json.loads(text)
            values["sources"] = tuple(SourceInfo(**source) for source in values["sources"])
            values["streams"] = tuple(
                StreamInfo(stream["share"], tuple(EpochInfo(**epoch) for epoch in stream["epochs"]))
                for stream in values["streams"]
            )
            return cls(**values)
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise DataError(f"data receipt: cannot be read ({error}). Run `ltt prepare` again.") from error
