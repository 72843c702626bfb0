"""The data as the loop takes it: a rank's micro-batches of a step, filled up so that every rank runs as many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

from llm_training_toolkit.data.dataset import MicroBatch, Sequences
from llm_training_toolkit.data.prepare.dataset_info import Receipt
from llm_training_toolkit.data.sample_log import Ledger
from llm_training_toolkit.data.tokenizer import open_tokenizer


class Feed:
    """The sequences of a run, step by step, and its held-out part."""

    def __init__(
        self,
        receipt: Receipt,
        *,
        global_batch: int,
        epochs: int | None,
        origin: tuple[int, int] = (0, 0),
        newest: Callable[[Receipt], Receipt] | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        """Open the data; `newest` looks for a receipt with more epochs, where later ones are still being prepared."""
        self._ledger = ledger
        self._sequences = Sequences(receipt, global_batch=global_batch, epochs=epochs, origin=origin)
        self._newest = newest
        self._receipt = receipt

    def has(self, step: int) -> bool:
        """Whether all sequences of a step are prepared, as far as was looked."""
        return self._sequences.has(step)

    def look(self) -> None:
        """See whether more epochs were prepared. Raises DataError when there will be no more."""
        if self._newest is not None:
            self._sequences.extend(self._newest(self._sequences.receipt))

    def sequences_in(self, step: int) -> int:
        """Sequences of the step: the global batch, fewer only in the last step of a run over epochs."""
        return len(self._sequences.step_sequences(step))

    def loss_tokens(self, step: int) -> int:
        """Loss tokens of the whole global batch, from the index alone."""
        return self._sequences.loss_tokens(step)

    def batch(self, step: int, positions: range, micro_batch: int, count: int) -> list[MicroBatch]:
        """`count` micro-batches: those of `positions`, then empty ones (one row of padding, no loss)."""
        batches = self._sequences.batch(step, positions, micro_batch)
        if self._ledger is not None:
            self._ledger.note(step + 1, self._sequences.step_sequences(step)[positions.start : positions.stop], batches)
        return batches + [self._sequences.dummy(1)] * (count - len(batches))

    def names(self, step: int, positions: range) -> str:
        """Which documents lie at these positions of the step."""
        rows = self._sequences.ledger(step)[positions.start : positions.stop]
        found = {(piece.source, piece.document): None for row in rows for piece in row}
        named = [self._sequences.document_name(*key) for key in list(found)[:5]]
        return ", ".join(named) + (f" and {len(found) - 5} more documents" if len(found) > 5 else "")

    def eval_batches(self, rank: int, world_size: int, micro_batch: int) -> list[MicroBatch]:
        """This rank's share of the held-out batches; as many on every rank."""
        return list(self._sequences.eval_batches(rank, world_size, micro_batch))

    @property
    def eval_tokens(self) -> int:
        """Loss tokens of the held-out part."""
        return self._sequences.eval_loss_tokens

    @cached_property
    def eval_bytes(self) -> int:
        """Bytes of text that the held-out loss tokens stand for; special tokens stand for none."""
        sizes = open_tokenizer(self._receipt.tokenizer_path).bytes_per_token()
        total = 0
        for batch in self._sequences.eval_batches(0, 1, 64):
            labels = batch.labels.numpy()
            total += int(sizes[labels[labels >= 0]].sum())
        return total


def held_out_beginnings(receipt: Receipt, limit: int, characters: int) -> Iterator[str]:
    """Beginnings of held-out documents of at least `characters` characters, at most `limit` of them."""
    encoder = open_tokenizer(receipt.tokenizer_path)
    last: tuple[int, int] | None = None
    found = 0
    for source, example in Sequences(receipt, global_batch=1).held_out_examples():
        begins, last = (source, example.document) != last, (source, example.document)
        text = encoder.decode(example.tokens, skip_special_tokens=True) if begins else ""
        if len(text) >= characters and found < limit:
            found += 1
            yield text
