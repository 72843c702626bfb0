"""Task `perplexity`: the loss of documents under a model, as loss, perplexity and bits per byte.

Documents are rendered, cut and packed as the held-out part of a run is, so that the figures are those of the training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from llm_training_toolkit.data.dataset import MicroBatch, Sequences
from llm_training_toolkit.data.prepare.renderer import Renderer
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.types import Example
from llm_training_toolkit.errors import DataError, PlanError
from llm_training_toolkit.evaluation.documents import described, origin_of, own_documents, source_of
from llm_training_toolkit.evaluation.losses import Losses, packed
from llm_training_toolkit.evaluation.model import Subject
from llm_training_toolkit.evaluation.task import Measured, Perplexity, Progress

_TOGETHER = 256
"""Documents that are rendered and packed at a time."""
_ENDLESS = 1 << 40
"""A sequence no document is longer than."""


def measure_perplexity(task: Perplexity, subject: Subject, progress: Progress) -> Measured:
    """The loss of all documents. Raises DataError where they cannot be read, or hold nothing to predict."""
    if task.stride is not None and not 1 <= task.stride < subject.context:
        raise PlanError(f"--stride {task.stride}: give 1 to {subject.context - 1}: less than the context")
    loss = Losses(subject, progress)
    found: dict[str, int] = {}
    settings: dict[str, object] = {"context": subject.context, "stride": task.stride or subject.context}
    if task.data is None:
        if task.stride is not None:
            raise PlanError("--stride is for documents of --data: those of the run are cut as the run cut them")
        loss.add(_of_run(subject, task.batch))
    else:
        documents = _Documents(task, subject)
        for examples in documents.rendered():
            loss.add(packed(examples, subject, task.batch))
        found = {"documents": documents.count, "too_long": documents.too_long}
        settings["format"] = task.format
    held = loss.result()
    figures = {"loss": held.loss, "perplexity": held.perplexity, "bits_per_byte": held.bits_per_byte}
    return Measured(
        {**figures, "tokens": held.tokens, "bytes": held.bytes, **found}, described(subject, task.data), settings
    )


def _of_run(subject: Subject, batch: int) -> Iterator[MicroBatch]:
    """The held-out sequences of the model's run, as they lie prepared."""
    origin = origin_of(subject)
    if subject.context != origin.receipt.sequence_length:
        raise PlanError(
            f"--context {subject.context}: what the run holds out is cut into {origin.receipt.sequence_length} "
            "tokens; another context is for documents of --data"
        )
    sequences = Sequences(origin.receipt, global_batch=1)
    if not sequences.eval_sequences:
        raise DataError(f"{origin.run.path}: the run has held nothing out: name documents with --data")
    return sequences.eval_batches(0, 1, batch)


class _Documents:
    """Documents of one's own, rendered some at a time."""

    def __init__(self, task: Perplexity, subject: Subject) -> None:
        assert task.data is not None
        self._source, self._context, self._stride = source_of(task.data, task.format), subject.context, task.stride
        length = self._context if task.stride is None else _ENDLESS
        self._renderer = Renderer([self._source], subject.markers, subject.encoder, subject.directory, length)
        self.count = self.too_long = 0

    def rendered(self) -> Iterator[list[Example]]:
        """The examples of all documents, none longer than the context."""
        numbered = enumerate(own_documents(self._source))
        while some := list(islice(numbered, _TOGETHER)):
            yield list(self._examples(some))

    def _examples(self, numbered: list[tuple[int, Document]]) -> Iterator[Example]:
        for rendered in self._renderer.render(0, numbered, seed=0, epoch=0, plain=True):
            self.count += bool(rendered.examples)
            self.too_long += not rendered.examples
            for example in rendered.examples:
                yield from windows(example, self._context, self._stride or self._context)


def windows(example: Example, context: int, stride: int) -> Iterator[Example]:
    """An example in windows of `context` tokens, each `stride` after the one before.

    Every token but the first is predicted once, in the first window that has it, behind at least `context` - `stride`
    others. An example that fits is a window of its own.
    """
    seen = 0
    for start in range(0, max(len(example.tokens) - context, 0) + stride, stride):
        stop = min(start + context, len(example.tokens))
        if stop > seen:
            loss = example.loss[start:stop].copy()
            loss[: seen - start] = False
            yield replace(example, tokens=example.tokens[start:stop], loss=loss)
        seen = stop
