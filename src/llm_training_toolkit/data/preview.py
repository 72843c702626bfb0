"""What a step trains on, for a person to read: every sequence as text, its loss mask, and where each piece is from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from llm_training_toolkit.data.dataset import Sequences
from llm_training_toolkit.data.tokenizer import TextEncoder, open_tokenizer
from llm_training_toolkit.data.types import Example

_LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, and so the most tokens it can take."""


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens of one kind, as text."""

    text: str
    loss: bool
    """Whether they are to be predicted."""
    special: bool
    """Whether they are special tokens, which stand for no text."""


@dataclass(frozen=True)
class ShownPiece:
    """A piece of a sequence."""

    source: str
    document: str
    tokens: int
    loss_tokens: int
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True)
class ShownSequence:
    """A sequence of the step."""

    pieces: tuple[ShownPiece, ...]
    padding: int
    """Tokens of padding at its end."""

    def to_json(self) -> dict[str, Any]:
        """The contract of `ltt show-batch --json` for one sequence."""
        return {
            "text": "".join(stretch.text for piece in self.pieces for stretch in piece.stretches),
            "loss_tokens": sum(piece.loss_tokens for piece in self.pieces),
            "padding": self.padding,
            "documents": [
                {
                    "source": piece.source,
                    "document": piece.document,
                    "tokens": piece.tokens,
                    "loss_tokens": piece.loss_tokens,
                }
                for piece in self.pieces
            ],
        }


def shown_step(sequences: Sequences, step: int) -> list[ShownSequence]:
    """The sequences of the step numbered `step`, the first being 1. Raises DataError beyond the run."""
    encoder = open_tokenizer(sequences.receipt.tokenizer_path)
    special = encoder.bytes_per_token() == 0
    shown = []
    for position, row in enumerate(sequences.ledger(step - 1)):
        pieces = tuple(
            ShownPiece(
                source=sequences.receipt.sources[piece.source].path,
                document=sequences.document_name(piece.source, piece.document),
                tokens=piece.tokens,
                loss_tokens=int(np.count_nonzero(example.loss[1:])),
                stretches=_stretches(example, special, encoder),
            )
            for piece, example in zip(row, sequences.examples(step - 1, position), strict=True)
        )
        padding = sequences.receipt.sequence_length - sum(piece.tokens for piece in row)
        shown.append(ShownSequence(pieces, padding))
    return shown


def _stretches(example: Example, special: Sequence[bool], encoder: TextEncoder) -> tuple[Stretch, ...]:
    """Runs of tokens with the same mask; a character of several tokens stands with the last of them."""
    loss = [False, *example.loss[1:].tolist()]  # nothing comes before the first token
    tokens = example.tokens.tolist()
    marked = zip(_texts(tokens, encoder), loss, (bool(special[token]) for token in tokens), strict=True)
    return tuple(
        Stretch("".join(text for text, *_ in group), *kind)
        for kind, group in groupby(marked, key=lambda token: token[1:])
    )


def _texts(tokens: Sequence[int], encoder: TextEncoder) -> Iterator[str]:
    """The text of each token; empty where the character it begins ends in a later one."""
    held: list[int] = []
    for number, token in enumerate(tokens, start=1):
        held.append(token)
        text = encoder.decode(held)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and number < len(tokens) and len(held) < _LONGEST_CHARACTER:
            yield ""
            continue
        yield text
        held.clear()
