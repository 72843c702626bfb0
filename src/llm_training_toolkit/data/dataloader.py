"""Data loader of the training loop: micro-batches of a rank per step, padded to the same number on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import cached_property
from threading import Thread
from typing import NamedTuple

import torch

from llm_training_toolkit.data.collate import MicroBatch
from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.data.sample_log import SampleLog
from llm_training_toolkit.data.tokenizer import open_tokenizer


class _Request(NamedTuple):
    """Micro-batches of a rank: the step, the positions in its global batch, rows in each."""

    step: int
    positions: range
    micro_batch: int


class DataLoader:
    """Training sequences of a run, step by step, and its held-out sequences."""

    def __init__(
        self,
        dataset_info: DatasetInfo,
        *,
        global_batch: int,
        epochs: int | None,
        origin: tuple[int, int] = (0, 0),
        read_newest_info: Callable[[DatasetInfo], DatasetInfo] | None = None,
        sample_log: SampleLog | None = None,
        pinned_for: torch.device | None = None,
    ) -> None:
        """Open the data; `read_newest_info` reads a DatasetInfo with more epochs while later ones are being prepared.

        Micro-batches lie in page-locked memory if `pinned_for` is a GPU: it copies from there while it computes.
        """
        self._sample_log = sample_log
        self._dataset = PackedDataset(dataset_info, global_batch=global_batch, epochs=epochs, origin=origin)
        self._read_newest_info = read_newest_info
        self._pinned_for = pinned_for
        self._prefetched: tuple[_Request, Future[list[MicroBatch]]] | None = None
        self._dataset_info = dataset_info

    def has_step(self, step: int) -> bool:
        """Return whether all sequences of a step are prepared, as of the last refresh."""
        return self._dataset.has_step(step)

    def refresh_epochs(self) -> None:
        """Check for newly prepared epochs. Raises DataError when there will be no more."""
        if self._read_newest_info is not None:
            self._dataset.extend_epochs(self._read_newest_info(self._dataset.dataset_info))

    def count_sequences(self, step: int) -> int:
        """Count the sequences of the step: the global batch, fewer only in the last step of a run over epochs."""
        return self._dataset.count_sequences(step)

    def count_loss_tokens(self, step: int) -> int:
        """Count the loss tokens of the whole global batch, from the index alone."""
        return self._dataset.count_loss_tokens(step)

    def get_micro_batches(self, step: int, positions: range, micro_batch: int, count: int) -> list[MicroBatch]:
        """Return `count` micro-batches: those of `positions`, then padding (one row each, no loss)."""
        request = _Request(step, positions, micro_batch)
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None and prefetched[0] == request:
            batches = prefetched[1].result()
        else:
            batches = self._read_micro_batches(request)
        if self._sample_log is not None:
            self._sample_log.log_step(step + 1, self._dataset.get_sequences_at(step, positions), batches)
        return batches + [self._dataset.get_padding_batch(1)] * (count - len(batches))

    def read_micro_batch(self, step: int, positions: range) -> MicroBatch:
        """Return these positions of a step as one micro-batch that is not trained on: the sample log leaves it out."""
        batches = self._read_micro_batches(_Request(step, positions, max(len(positions), 1)))
        return batches[0] if batches else self._dataset.get_padding_batch(1)

    def prefetch(self, step: int, positions: range, micro_batch: int) -> None:
        """Begin to read a step's micro-batches in a thread, for the next `get_micro_batches`; errors come out there.

        Storage that takes 200 ms for a step then costs nothing beside a longer computation.
        """
        request, future = _Request(step, positions, micro_batch), Future[list[MicroBatch]]()

        def read() -> None:
            try:
                if self._pinned_for is not None:
                    torch.cuda.set_device(self._pinned_for)  # a new thread is on the first GPU
                future.set_result(self._read_micro_batches(request))
            except BaseException as error:  # noqa: BLE001 - the edge of a thread: raised again by `result`
                future.set_exception(error)

        self._prefetched = (request, future)
        # Daemon: a process that must end does not wait for storage that hangs.
        Thread(target=read, daemon=True, name="prefetch").start()

    def _read_micro_batches(self, request: _Request) -> list[MicroBatch]:
        batches = self._dataset.get_micro_batches(request.step, request.positions, request.micro_batch)
        return [batch.pin_memory() for batch in batches] if self._pinned_for is not None else batches

    def format_document_names(self, step: int, positions: range) -> str:
        """List the documents at these positions of the step, five by name."""
        rows = self._dataset.get_document_spans(step, positions)
        found = {(piece.source, piece.document): None for row in rows for piece in row}
        named = [self._dataset.get_document_name(*key) for key in list(found)[:5]]
        return ", ".join(named) + (f" and {len(found) - 5} more documents" if len(found) > 5 else "")

    def get_eval_batches(self, replica: int, replicas: int, micro_batch: int) -> list[MicroBatch]:
        """Return a replica's share of the held-out batches, equally many for every replica."""
        return list(self._dataset.iter_eval_batches(replica, replicas, micro_batch))

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
