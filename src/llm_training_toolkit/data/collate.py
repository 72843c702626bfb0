"""Collation: examples of a sequence as rows of token ids, labels, positions and document lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from llm_training_toolkit.data.types import Example

IGNORE_INDEX = -100  # label of a position without a target


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward pass: ids, positions and labels are (rows, T) int64.

    In position_ids every piece of a row starts at 0, padding included: only that keeps the documents of a row apart.
    Labels are already shifted: labels[t] is the token at t + 1 of the same piece, or -100.
    Row r is position `first` + r of the global batch of `step`; both are meaningless in rows without labels.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor
    """Bounds of the pieces of all rows, one row after another, padding included: (pieces + 1,) int32, from 0."""
    max_seqlen: int
    """Tokens of the longest piece."""
    step: int = 0
    first: int = 0

    def pin_memory(self) -> MicroBatch:
        """Return a copy in page-locked memory. CUDA only."""
        ids, positions, labels, bounds = (
            tensor.pin_memory() for tensor in (self.input_ids, self.position_ids, self.labels, self.cu_seqlens)
        )
        return replace(self, input_ids=ids, position_ids=positions, labels=labels, cu_seqlens=bounds)


def collate_rows(rows: Sequence[Sequence[Example]], sequence_length: int, pad_id: int) -> MicroBatch:
    """Concatenate the pieces of each row and pad it to the sequence length. A row may be empty."""
    arrays = [_collate_row(pieces, sequence_length, pad_id) for pieces in rows]
    ids, positions, labels = (torch.from_numpy(np.stack(part)) for part in zip(*arrays, strict=True))
    lengths = [length for pieces in rows for length in _list_piece_lengths(pieces, sequence_length)]
    bounds = np.cumsum([0, *lengths], dtype=np.int32)
    return MicroBatch(ids, positions, labels, torch.from_numpy(bounds), max(lengths))


def count_attended_tokens(batches: Sequence[MicroBatch], window: int | None) -> int:
    """Return the sum over documents of n tokens of n x min(n, window), from their bounds on the CPU.

    The padding of a row counts as one more document, because it is computed like one.
    """
    total = 0
    for batch in batches:
        lengths = batch.cu_seqlens.diff().to(torch.int64)
        total += int((lengths * lengths.clamp(max=window)).sum() if window else (lengths * lengths).sum())
    return total


def build_full_batch(batch: MicroBatch) -> MicroBatch:
    """Return the micro-batch of as many rows that needs the most memory: rows of one document, a loss at each token."""
    rows, length = batch.input_ids.shape
    return replace(
        batch,
        position_ids=torch.arange(length).repeat(rows, 1),
        labels=batch.input_ids,
        cu_seqlens=torch.arange(0, (rows + 1) * length, length, dtype=torch.int32),
        max_seqlen=length,
    )


def build_padding_batch(rows: int, sequence_length: int, pad_id: int) -> MicroBatch:
    """Return `rows` rows of padding, every label -100: they cost a pass and leave the loss unchanged."""
    return collate_rows([[]] * rows, sequence_length, pad_id)


def _list_piece_lengths(pieces: Sequence[Example], sequence_length: int) -> list[int]:
    """Return the lengths of a row's pieces, with the padding as the last one; none is 0."""
    lengths = [len(piece.tokens) for piece in pieces]
    return [length for length in (*lengths, sequence_length - sum(lengths)) if length]


def _collate_row(pieces: Sequence[Example], length: int, pad_id: int) -> tuple[NDArray[np.int64], ...]:
    ids = np.full(length, pad_id, dtype=np.int64)
    positions = np.zeros(length, dtype=np.int64)
    labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
    start = 0
    for piece in pieces:
        stop = start + len(piece.tokens)
        ids[start:stop] = piece.tokens
        positions[start:stop] = np.arange(stop - start)
        labels[start : stop - 1] = np.where(piece.loss[1:], ids[start + 1 : stop], IGNORE_INDEX)
        start = stop
    positions[start:] = np.arange(length - start)
    return ids, positions, labels
