"""Data loader of the training loop: micro-batches of a rank per step, padded to the same number on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

from llm_training_toolkit.data.dataset import MicroBatch, PackedDataset
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.data.sample_log import SampleLog
from llm_training_toolkit.data.tokenizer import open_tokenizer


class DataLoader:
    """Training sequences of a run, step by step, and its held-out sequences."""

    def __init__(
        self,
        dataset_info: DatasetInfo,
        *,
        global_batch: int,
        epochs: int | None,
        origin: tuple[int, int] = (0, 0),
        newest: Callable[[DatasetInfo], DatasetInfo] | None = None,
        event_log: SampleLog | None = None,
    ) -> None:
        """Open the data; `newest` reads a DatasetInfo with more epochs while later ones are still being prepared."""
        self._sample_log = event_log
        self._dataset = PackedDataset(dataset_info, global_batch=global_batch, epochs=epochs, origin=origin)
        self._newest = newest
        self._dataset_info = dataset_info

    def has_step(self, step: int) -> bool:
        """Return whether all sequences of a step are prepared, as of the last refresh."""
        return self._dataset.has_step(step)

    def refresh_epochs(self) -> None:
        """Check for newly prepared epochs. Raises DataError when there will be no more."""
        if self._newest is not None:
            self._dataset.extend_epochs(self._newest(self._dataset.dataset_info))

    def count_sequences(self, step: int) -> int:
        """Count the sequences of the step: the global batch, fewer only in the last step of a run over epochs."""
        return len(self._dataset.get_step_sequences(step))

    def count_loss_tokens(self, step: int) -> int:
        """Count the loss tokens of the whole global batch, from the index alone."""
        return self._dataset.count_loss_tokens(step)

    def get_micro_batches(self, step: int, positions: range, micro_batch: int, count: int) -> list[MicroBatch]:
        """Return `count` micro-batches: those of `positions`, then padding (one row each, no loss)."""
        batches = self._dataset.get_micro_batches(step, positions, micro_batch)
        if self._sample_log is not None:
            self._sample_log.log_step(
                step + 1, self._dataset.get_step_sequences(step)[positions.start : positions.stop], batches
            )
        return batches + [self._dataset.get_padding_batch(1)] * (count - len(batches))

    def format_document_names(self, step: int, positions: range) -> str:
        """List the documents at these positions of the step, five by name."""
        rows = self._dataset.get_document_spans(step)[positions.start : positions.stop]
        found = {(piece.source, piece.document): None for row in rows for piece in row}
        named = [self._dataset.get_document_name(*key) for key in list(found)[:5]]
        return ", ".join(named) + (f" and {len(found) - 5} more documents" if len(found) > 5 else "")

    def get_eval_batches(self, rank: int, world_size: int, micro_batch: int) -> list[MicroBatch]:
        """Return this rank's share of the held-out batches, equally many on every rank."""
        return list(self._dataset.iter_eval_batches(rank, world_size, micro_batch))

    @property
    def eval_loss_tokens(self) -> int:
        """Loss tokens in the held-out sequences."""
        return self._dataset.eval_loss_tokens

    @cached_property
    def eval_bytes(self) -> int:
        """Bytes of text in the held-out loss tokens; special tokens count as 0."""
        sizes = open_tokenizer(self._dataset_info.tokenizer_path).count_bytes_per_token()
        total = 0
        for batch in self._dataset.iter_eval_batches(0, 1, 64):
            labels = batch.labels.numpy()
            total += int(sizes[labels[labels >= 0]].sum())
        return total


def read_held_out_texts(dataset_info: DatasetInfo, limit: int, characters: int) -> Iterator[str]:
    """Yield the beginnings of at most `limit` held-out documents, each of at least `characters` characters."""
    encoder = open_tokenizer(dataset_info.tokenizer_path)
    last: tuple[int, int] | None = None
    found = 0
    for source, example in PackedDataset(dataset_info, global_batch=1).iter_held_out_examples():
        begins, last = (source, example.document) != last, (source, example.document)
        text = encoder.decode(example.tokens, skip_special_tokens=True) if begins else ""
        if len(text) >= characters and found < limit:
            found += 1
            yield text
