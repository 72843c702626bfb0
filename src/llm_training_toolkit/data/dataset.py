"""Packed dataset: the sequences of each step in order, and their batches as tensors for one rank."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from llm_training_toolkit.data.collate import MicroBatch, build_padding_batch, collate_rows
from llm_training_toolkit.data.prepare.arrow_store import ExampleStore, read_array, read_column
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo, PreparedDataset
from llm_training_toolkit.data.prepare.packing import PackingPlan
from llm_training_toolkit.data.types import Example
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.plan import StreamPosition, count_per_stream, merge_streams
from llm_training_toolkit.plan.problem import format_plural


class SequenceRef(NamedTuple):
    """Reference to a sequence: its stream, its epoch, and its number in that epoch."""

    stream: int
    epoch: int
    sequence: int


class DocumentSpan(NamedTuple):
    """A piece of a sequence: source, document within the source, and number of tokens."""

    source: int
    document: int
    tokens: int


class _PackedExamples(NamedTuple):
    plan: PackingPlan
    examples: ExampleStore

    def read_examples(self, sequence: int) -> list[Example]:
        return [self.examples[i] for i in self.plan.get_examples(sequence).tolist()]


class PackedDataset:
    """The sequences of a run in training order, as a pure function of the step.

    Sequence g = step * global_batch + i is position i of that step, counted through all epochs. If sources have
    weights, g counts through the mixture of their streams, and each stream has its own epochs. An epoch is its
    partitions in turn.
    Steps count from 0: `step` is the number of steps completed before. With `epochs`, the order ends with the last
    epoch, and the last step may be short; otherwise it continues as far as epochs are prepared.
    An attempt resumes at `origin` (step, sequence), a multiple of the global batch except after an epoch that ended in
    a short step, or an accepted change of the global batch.
    """

    def __init__(
        self,
        dataset_info: DatasetInfo,
        *,
        global_batch: int,
        epochs: int | None = None,
        origin: tuple[int, int] = (0, 0),
    ) -> None:
        self._directory = PreparedDataset.from_info(dataset_info).directory
        self.global_batch, self.epochs, self.origin = global_batch, epochs, origin
        # Streams alternate, and a step may span two parts of each; every open part costs file descriptors.
        self._examples = lru_cache(maxsize=2 * len(dataset_info.streams) + 1)(
            lambda name: ExampleStore(self._directory / name)
        )
        self._plan = lru_cache(maxsize=2 * len(dataset_info.streams))(
            lambda name: PackingPlan.read(self._directory / name)
        )
        self.extend_epochs(dataset_info)

    def extend_epochs(self, dataset_info: DatasetInfo) -> None:
        """Switch to a DatasetInfo of the same data with more epochs, or more partitions of them."""
        self.dataset_info = dataset_info
        self._shares = [stream.share for stream in dataset_info.streams]
        self._partitions = dataset_info.streams[0].partitions
        last = None if self.epochs is None else self.epochs * self._partitions
        self._starts = [
            list(accumulate(stream.sequences_per_part[:last], initial=0)) for stream in dataset_info.streams
        ]

    @property
    def total_steps(self) -> int | None:
        """Steps until the end, or None if the run is open-ended or its last epochs are still unprepared."""
        if self._total_sequences is None:
            return None
        step, sequence = self.origin
        return step + -(-max(self._total_sequences - sequence, 0) // self.global_batch)

    @property
    def _total_sequences(self) -> int | None:
        """Sequences of a run over epochs, once all of them are prepared."""
        if self.epochs is None or len(self.dataset_info.streams[0].epochs) < self.epochs * self._partitions:
            return None
        return self._starts[0][-1]

    def get_step_sequences(self, step: int) -> list[SequenceRef]:
        """Return the sequences of a step: global_batch of them, fewer only in the last step of a run over epochs.

        Raises DataError for a step that needs an unprepared epoch, and for one after the end.
        """
        return self.get_sequences_at(step, range(self.count_sequences(step)))

    def get_sequences_at(self, step: int, positions: range) -> list[SequenceRef]:
        """Return the sequences at these positions of a step; the cost does not grow with the global batch.

        Positions beyond a short last step are omitted. Raises DataError as `get_step_sequences` does.
        """
        first, last = self._get_prepared_range(step)
        start, stop = (min(first + position, last) for position in (positions.start, positions.stop))
        return [self._locate_sequence(due) for due in merge_streams(self._shares, start, stop)]

    def count_sequences(self, step: int) -> int:
        """Count the sequences of a step. Raises DataError as `get_step_sequences` does."""
        first, last = self._get_prepared_range(step)
        return last - first

    def _get_prepared_range(self, step: int) -> tuple[int, int]:
        """Return the range [first, stop) of a step. Raises DataError if it is empty or not prepared."""
        first, last = self._get_sequence_range(step)
        if not 0 <= first < last:
            raise DataError(
                f"step {step}: lies outside the run, whose steps go from 0 to {(self.total_steps or 1) - 1}."
            )
        if (stream := self._find_exhausted_stream(last)) is not None:
            raise self._build_unprepared_error(step, stream)
        return first, last

    def has_step(self, step: int) -> bool:
        """Return whether all sequences of a step are prepared."""
        return self._find_exhausted_stream(self._get_sequence_range(step)[1]) is None

    def _get_sequence_range(self, step: int) -> tuple[int, int]:
        """Return the range [first, stop) of a step in the order of all sequences."""
        first = self.origin[1] + (step - self.origin[0]) * self.global_batch
        last = first + self.global_batch
        return first, last if self._total_sequences is None else min(last, self._total_sequences)

    def _find_exhausted_stream(self, last: int) -> int | None:
        """Return the first stream with too few sequences for the positions before `last`."""
        needed = count_per_stream(self._shares, last)
        return next((stream for stream, starts in enumerate(self._starts) if needed[stream] > starts[-1]), None)

    def _build_unprepared_error(self, step: int, stream: int) -> DataError:
        missing, prepared = len(self._starts[stream]) - 1, self._starts[stream][-1]
        epoch, partition = divmod(missing, self._partitions)
        of_source = f" of {self.dataset_info.sources[stream].path}" if len(self._starts) > 1 else ""
        unit, of_epoch = ("epoch", "") if self._partitions == 1 else ("partition", f"partition {partition} of ")
        return DataError(
            f"step {step}: needs sequences of {of_epoch}epoch {epoch}{of_source}, and only "
            f"{format_plural(missing, unit)} ({prepared} sequences) can be read. Prepare at least {missing + 1}."
        )

    def _locate_sequence(self, due: StreamPosition) -> SequenceRef:
        starts = self._starts[due.stream]
        epoch = (bisect_right(starts, due.number) - 1) // self._partitions
        return SequenceRef(due.stream, epoch, due.number - starts[epoch * self._partitions])

    def get_micro_batches(self, step: int, positions: range, micro_batch: int) -> list[MicroBatch]:
        """Return positions of the step's global batch as micro-batches of `micro_batch` rows, except the last.

        Positions beyond a short last step are omitted.
        """
        rows = [self._read_examples(placed) for placed in self.get_sequences_at(step, positions)]
        return [
            replace(batch, step=step, first=positions.start + number * micro_batch)
            for number, batch in enumerate(self._build_micro_batches(rows, micro_batch))
        ]

    def count_loss_tokens(self, step: int) -> int:
        """Count the labels other than -100 in the whole global batch, from the index alone."""
        first, last = (count_per_stream(self._shares, end) for end in self._get_prepared_range(step))
        return sum(
            int(self._plan(self.dataset_info.streams[stream].epochs[epoch].plan).targets[part].sum())
            for stream in range(len(self._shares))
            for epoch, part in self._split_by_part(stream, first[stream], last[stream])
        )

    def _split_by_part(self, stream: int, first: int, stop: int) -> Iterator[tuple[int, slice]]:
        """Yield (part, its sequences) for the sequences [first, stop) of a stream."""
        starts = self._starts[stream]
        for part in range(bisect_right(starts, first) - 1, len(starts) - 1):
            if starts[part] >= stop:
                return
            yield part, slice(max(first - starts[part], 0), min(stop, starts[part + 1]) - starts[part])

    def get_document_spans(self, step: int, positions: range | None = None) -> list[list[DocumentSpan]]:
        """Return the pieces of each sequence of the step, or of those at `positions`, from the index alone."""
        placed = self.get_step_sequences(step) if positions is None else self.get_sequences_at(step, positions)
        return [self._build_document_spans(each) for each in placed]

    def get_document_name(self, source: int, document: int) -> str:
        """Return a document's name: its file within the source, and the line in a .jsonl file."""
        first, names = self._document_table
        return str(names[first[source] + document].as_py())

    @cached_property
    def _document_table(self) -> tuple[dict[int, int], Any]:
        """First row of each source in the table of documents, and the memory-mapped names."""
        file = self._directory / "documents" / "documents.arrow"
        found, first = np.unique(read_array(file, "source"), return_index=True)
        return dict(zip(found.tolist(), first.tolist(), strict=True)), read_column(file, "name")

    def read_sequence_examples(self, step: int, position: int) -> list[Example]:
        """Read the pieces of one sequence, with tokens and loss flags."""
        return self._read_examples(self.get_sequences_at(step, range(position, position + 1))[0])

    def get_padding_batch(self, rows: int) -> MicroBatch:
        """Return a micro-batch of padding without labels, for a rank that has fewer micro-batches than others."""
        return build_padding_batch(rows, self.dataset_info.sequence_length, self.dataset_info.pad_id)

    @property
    def eval_sequences(self) -> int:
        """Number of held-out sequences."""
        return len(self._held_out.plan)

    @property
    def eval_loss_tokens(self) -> int:
        """Labels other than -100 in all held-out sequences."""
        return int(self._held_out.plan.targets.sum())

    def iter_held_out_examples(self) -> Iterator[tuple[int, Example]]:
        """Yield every held-out piece with its source, in the order of the documents."""
        examples = self._held_out.examples
        for index in range(len(examples.length)):
            yield int(examples.source[index]), examples[index]

    def iter_eval_batches(self, replica: int, replicas: int, micro_batch: int) -> Iterator[MicroBatch]:
        """Yield a replica's share of the held-out sequences (every replicas-th one) as micro-batches.

        Every one gets as many of the same shape, filled up with rows without labels, so each may run collectives.
        """
        mine = range(replica, self.eval_sequences, replicas)
        largest = -(-self.eval_sequences // replicas)
        for start in range(0, largest, micro_batch):
            rows = [self._held_out.read_examples(i) for i in mine[start : start + micro_batch]]
            rows += [[]] * (min(micro_batch, largest - start) - len(rows))
            yield from self._build_micro_batches(rows, micro_batch)

    def _open_sequence(self, placed: SequenceRef) -> tuple[_PackedExamples, int]:
        """Return the part that holds a sequence, and the number of the sequence in it."""
        starts = self._starts[placed.stream]
        number = starts[placed.epoch * self._partitions] + placed.sequence
        part = bisect_right(starts, number) - 1
        files = self.dataset_info.streams[placed.stream].epochs[part]
        return _PackedExamples(self._plan(files.plan), self._examples(files.tokens)), number - starts[part]

    @cached_property
    def _held_out(self) -> _PackedExamples:
        plan = PackingPlan.read(self._directory / self.dataset_info.held_out_plan)
        return _PackedExamples(plan, ExampleStore(self._directory / self.dataset_info.held_out))

    def _read_examples(self, placed: SequenceRef) -> list[Example]:
        packed, number = self._open_sequence(placed)
        return packed.read_examples(number)

    def _build_document_spans(self, placed: SequenceRef) -> list[DocumentSpan]:
        (plan, examples), number = self._open_sequence(placed)
        return [
            DocumentSpan(int(examples.source[i]), int(examples.document[i]), int(examples.length[i]))
            for i in plan.get_examples(number).tolist()
        ]

    def _build_micro_batches(self, rows: Sequence[Sequence[Example]], micro_batch: int) -> Iterator[MicroBatch]:
        length, pad = self.dataset_info.sequence_length, self.dataset_info.pad_id
        for start in range(0, len(rows), micro_batch):
            yield collate_rows(rows[start : start + micro_batch], length, pad)
