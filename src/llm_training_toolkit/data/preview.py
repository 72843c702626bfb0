"""Readable preview of a training step: every sequence as text, its loss mask, and the origin of each piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.tokenizer import TextEncoder, open_tokenizer
from llm_training_toolkit.data.types import Example

_MAX_CHARACTER_BYTES = 4  # of UTF-8, and so the maximum tokens of a character


@dataclass(frozen=True)
class TextSpan:
    """Text of consecutive tokens with equal `loss` and `special`."""

    text: str
    loss: bool
    """True for prediction targets."""
    special: bool
    """True for special tokens, which represent no text."""


@dataclass(frozen=True)
class DocumentPreview:
    """Piece of a sequence."""

    source: str
    document: str
    tokens: int
    loss_tokens: int
    spans: tuple[TextSpan, ...]


@dataclass(frozen=True)
class SequencePreview:
    """Sequence of the step."""

    pieces: tuple[DocumentPreview, ...]
    padding: int
    """Padding tokens at its end."""

    def to_json(self) -> dict[str, Any]:
        """Return one sequence in the format of `ltt show-batch --json`."""
        return {
            "text": "".join(stretch.text for piece in self.pieces for stretch in piece.spans),
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


def preview_step(sequences: PackedDataset, step: int) -> list[SequencePreview]:
    """Return the sequences of a step, counted from 1. Raises DataError beyond the run."""
    encoder = open_tokenizer(sequences.dataset_info.tokenizer_path)
    special = encoder.count_bytes_per_token() == 0
    shown = []
    for position, row in enumerate(sequences.get_document_spans(step - 1)):
        pieces = tuple(
            DocumentPreview(
                source=sequences.dataset_info.sources[piece.source].path,
                document=sequences.get_document_name(piece.source, piece.document),
                tokens=piece.tokens,
                loss_tokens=int(np.count_nonzero(example.loss[1:])),
                spans=_build_text_spans(example, special, encoder),
            )
            for piece, example in zip(row, sequences.read_sequence_examples(step - 1, position), strict=True)
        )
        padding = sequences.dataset_info.sequence_length - sum(piece.tokens for piece in row)
        shown.append(SequencePreview(pieces, padding))
    return shown


def _build_text_spans(example: Example, special: Sequence[bool], encoder: TextEncoder) -> tuple[TextSpan, ...]:
    """Group consecutive tokens with equal flags. A character of several tokens belongs to its last token."""
    loss = [False, *example.loss[1:].tolist()]  # the first token is never predicted
    tokens = example.tokens.tolist()
    marked = zip(_decode_tokens(tokens, encoder), loss, (bool(special[token]) for token in tokens), strict=True)
    return tuple(
        TextSpan("".join(text for text, *_ in group), *kind)
        for kind, group in groupby(marked, key=lambda token: token[1:])
    )


def _decode_tokens(tokens: Sequence[int], encoder: TextEncoder) -> Iterator[str]:
    """Yield the text of each token, empty if its character ends in a later token."""
    held: list[int] = []
    for number, token in enumerate(tokens, start=1):
        held.append(token)
        text = encoder.decode(held)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and number < len(tokens) and len(held) < _MAX_CHARACTER_BYTES:
            yield ""
            continue
        yield text
        held.clear()
