"""The order of the data and its batches: which sequences a step sees, as tensors for one rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from llm_training_toolkit.data.packing import PackingPlan
from llm_training_toolkit.data.prepare import Prepared
from llm_training_toolkit.data.receipt import Receipt
from llm_training_toolkit.data.render import Example
from llm_training_toolkit.data.store import Examples, read_array, read_column
from llm_training_toolkit.data.tokenizer import open_tokenizer
from llm_training_toolkit.errors import DataError

IGNORED = -100
"""The label of a position that has nothing to predict."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass sees, each (rows, T) int64.

    position_ids start at 0 for every piece of a row, padding being a piece of its own: that alone keeps the documents
    of a row apart. labels are shifted already: labels[t] is the token at t + 1 of the same piece, or -100.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor


class Placed(NamedTuple):
    """A sequence of the stream: the epoch it belongs to and its number in that epoch."""

    epoch: int
    sequence: int


class Piece(NamedTuple):
    """A piece of a sequence: source, document within the source, and its number of tokens."""

    source: int
    document: int
    tokens: int


class _Packed(NamedTuple):
    plan: PackingPlan
    examples: Examples

    def pieces(self, sequence: int) -> list[Example]:
        return [self.examples[i] for i in self.plan.examples(sequence).tolist()]


class Sequences:
    """The stream of sequences, as a pure function of the step.

    Sequence g = step * global_batch + i is position i of that step, counted through all epochs without a break.
    Steps count from 0: `step` is the number of steps completed before. With `epochs` the stream ends with the last
    one's last sequence, and the last step may be short; without, it goes on as far as epochs were prepared.
    `origin` (step, sequence) is where an attempt goes on: they differ from a plain multiple of the global batch only
    after an epoch that ended in a short step, or a change of the global batch that was accepted.
    """

    def __init__(
        self, receipt: Receipt, *, global_batch: int, epochs: int | None = None, origin: tuple[int, int] = (0, 0)
    ) -> None:
        self._directory = Prepared.load(receipt).directory
        self.receipt, self.global_batch, self.epochs, self.origin = receipt, global_batch, epochs, origin
        counts = receipt.sequences[:epochs]
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        self._opened: dict[int, _Packed] = {}
        self._held_out = _open(self._directory / receipt.held_out, self._directory / receipt.held_out)

    @property
    def steps(self) -> int | None:
        """Steps until the stream ends; None where it has no end, or its last epochs are not prepared yet."""
        if self.epochs is None or len(self.receipt.epochs) < self.epochs:
            return None
        step, sequence = self.origin
        return step + -(-max(int(self._starts[-1]) - sequence, 0) // self.global_batch)

    def step_sequences(self, step: int) -> list[Placed]:
        """The sequences of a step: global_batch of them, fewer only in the last step of a stream that ends.

        Raises DataError for a step that needs an epoch that was not prepared, and for one after the end.
        """
        first = self.origin[1] + (step - self.origin[0]) * self.global_batch
        last = first + self.global_batch
        prepared = int(self._starts[-1])
        if last > prepared and self.steps is None:
            missing = len(self._starts) - 1
            raise DataError(
                f"step {step}: needs sequences of epoch {missing}, and only {missing} epochs ({prepared} sequences) "
                f"are prepared. Prepare at least {missing + 1} epochs."
            )
        if not 0 <= first < prepared:
            raise DataError(f"step {step}: lies outside the run, whose steps go from 0 to {(self.steps or 1) - 1}.")
        stream = np.arange(first, min(last, prepared))
        epochs = np.searchsorted(self._starts, stream, side="right") - 1
        return [
            Placed(epoch, sequence)
            for epoch, sequence in zip(epochs.tolist(), (stream - self._starts[epochs]).tolist(), strict=True)
        ]

    def batch(self, step: int, positions: range, micro_batch: int) -> list[MicroBatch]:
        """Positions of the step's global batch in rows of `micro_batch`; the last may have fewer rows.

        Positions that a short last step does not have are left out.
        """
        rows = [self._pieces(placed) for placed in self.step_sequences(step)[positions.start : positions.stop]]
        return list(self._micro_batches(rows, micro_batch))

    def loss_tokens(self, step: int) -> int:
        """Labels other than -100 in the whole global batch, from the index alone."""
        return sum(int(self._epoch(epoch).plan.targets[sequence]) for epoch, sequence in self.step_sequences(step))

    def ledger(self, step: int) -> list[list[Piece]]:
        """For each sequence of the step the pieces it holds, from the index alone."""
        return [self._ledger_row(placed) for placed in self.step_sequences(step)]

    def document_name(self, source: int, document: int) -> str:
        """Where a document of the ledger came from: its file within the source, and the line in a .jsonl file."""
        first, names = self._documents
        return str(names[first[source] + document].as_py())

    @cached_property
    def _documents(self) -> tuple[dict[int, int], Any]:
        """The first row of each source in the table of documents, and their names, mapped."""
        file = self._directory / "documents" / "documents.arrow"
        found, first = np.unique(read_array(file, "source"), return_index=True)
        return dict(zip(found.tolist(), first.tolist(), strict=True)), read_column(file, "name")

    def examples(self, step: int, position: int) -> list[Example]:
        """The pieces of one sequence, with tokens and loss flags."""
        return self._pieces(self.step_sequences(step)[position])

    def text_of(self, step: int, position: int) -> str:
        """One sequence as text, markers written out, padding left out."""
        encoder = open_tokenizer(self.receipt.tokenizer_path)
        return encoder.decode(np.concatenate([example.tokens for example in self.examples(step, position)]))

    def dummy(self, rows: int) -> MicroBatch:
        """A micro-batch of padding without any label, for a rank that has fewer micro-batches than others."""
        return dummy(rows, self.receipt.sequence_length, self.receipt.pad_id)

    @property
    def eval_sequences(self) -> int:
        """Number of held-out sequences."""
        return len(self._held_out.plan)

    @property
    def eval_loss_tokens(self) -> int:
        """Labels other than -100 in all held-out sequences."""
        return int(self._held_out.plan.targets.sum())

    def held_out_examples(self) -> Iterator[tuple[int, Example]]:
        """Every held-out piece with its source, in the order of the documents."""
        examples = self._held_out.examples
        for index in range(len(examples.length)):
            yield int(examples.source[index]), examples[index]

    def eval_batches(self, rank: int, world: int, micro_batch: int) -> Iterator[MicroBatch]:
        """This rank's part of the held-out sequences (every world-th one).

        Every rank gets the same number of micro-batches of the same shape, filled up with rows without labels, so
        that ranks may talk to each other in every one of them.
        """
        mine = range(rank, self.eval_sequences, world)
        largest = -(-self.eval_sequences // world)
        for start in range(0, largest, micro_batch):
            rows = [self._held_out.pieces(i) for i in mine[start : start + micro_batch]]
            rows += [[]] * (min(micro_batch, largest - start) - len(rows))
            yield from self._micro_batches(rows, micro_batch)

    def _epoch(self, epoch: int) -> _Packed:
        if epoch not in self._opened:
            files = self.receipt.epochs[epoch]
            self._opened[epoch] = _open(self._directory / files.tokens, self._directory / files.plan)
        return self._opened[epoch]

    def _pieces(self, placed: Placed) -> list[Example]:
        return self._epoch(placed.epoch).pieces(placed.sequence)

    def _ledger_row(self, placed: Placed) -> list[Piece]:
        plan, examples = self._epoch(placed.epoch)
        return [
            Piece(int(examples.source[i]), int(examples.document[i]), int(examples.length[i]))
            for i in plan.examples(placed.sequence).tolist()
        ]

    def _micro_batches(self, rows: Sequence[Sequence[Example]], micro_batch: int) -> Iterator[MicroBatch]:
        length, pad = self.receipt.sequence_length, self.receipt.pad_id
        for start in range(0, len(rows), micro_batch):
            yield assemble(rows[start : start + micro_batch], length, pad)


def assemble(rows: Sequence[Sequence[Example]], sequence_length: int, pad_id: int) -> MicroBatch:
    """Lay the pieces of each row one after another and fill the rest with padding. A row may be empty."""
    arrays = [_row(pieces, sequence_length, pad_id) for pieces in rows]
    ids, positions, labels = (torch.from_numpy(np.stack(part)) for part in zip(*arrays, strict=True))
    return MicroBatch(ids, positions, labels)


def dummy(rows: int, sequence_length: int, pad_id: int) -> MicroBatch:
    """`rows` rows of padding, every label -100: they cost a pass and add nothing to the loss."""
    return assemble([[]] * rows, sequence_length, pad_id)


def _row(pieces: Sequence[Example], length: int, pad_id: int) -> tuple[NDArray[np.int64], ...]:
    ids = np.full(length, pad_id, dtype=np.int64)
    positions = np.zeros(length, dtype=np.int64)
    labels = np.full(length, IGNORED, dtype=np.int64)
    start = 0
    for piece in pieces:
        stop = start + len(piece.tokens)
        ids[start:stop] = piece.tokens
        positions[start:stop] = np.arange(stop - start)
        labels[start : stop - 1] = np.where(piece.loss[1:], ids[start + 1 : stop], IGNORED)
        start = stop
    positions[start:] = np.arange(length - start)
    return ids, positions, labels


def _open(tokens: Path, plan: Path) -> _Packed:
    return _Packed(PackingPlan.read(plan), Examples(tokens))
