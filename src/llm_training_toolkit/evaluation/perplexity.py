"""Task `perplexity`: the loss of documents, as loss, perplexity and bits per byte.

Documents are rendered, split and packed like a run's held-out part, so that the figures match those of training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from llm_training_toolkit.config import SourceConfig
from llm_training_toolkit.data.collate import MicroBatch
from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.prepare.renderer import DocumentRenderer
from llm_training_toolkit.data.sources import Document, read_source_documents
from llm_training_toolkit.data.types import Example
from llm_training_toolkit.errors import DataError, PlanError
from llm_training_toolkit.evaluation.documents import (
    format_data_description,
    get_exported_run,
)
from llm_training_toolkit.evaluation.losses import LossAccumulator, pack_into_batches
from llm_training_toolkit.evaluation.model import EvalModel
from llm_training_toolkit.evaluation.task import EvalResult, PerplexityTask, ProgressCallback

_DOCUMENTS_PER_BATCH = 256  # rendered and packed together
_UNLIMITED_LENGTH = 1 << 40  # sequence length longer than any document


def measure_perplexity(task: PerplexityTask, subject: EvalModel, progress: ProgressCallback) -> EvalResult:
    """Compute the loss of all documents. Raises DataError if they are unreadable or hold no token to predict."""
    if task.stride is not None and not 1 <= task.stride < subject.context_length:
        raise PlanError(f"--stride {task.stride}: give 1 to {subject.context_length - 1}: less than the context")
    loss = LossAccumulator(subject, progress)
    found: dict[str, int] = {}
    settings: dict[str, object] = {"context": subject.context_length, "stride": task.stride or subject.context_length}
    if task.data is None:
        if task.stride is not None:
            raise PlanError("--stride is for documents of --data: those of the run are cut as the run cut them")
        loss.add_batches(_read_held_out_batches(subject, task.batch))
    else:
        documents = _RenderedDocuments(task, subject)
        for examples in documents.iter_example_batches():
            loss.add_batches(pack_into_batches(examples, subject, task.batch))
        found = {"documents": documents.count, "too_long": documents.too_long}
        settings["format"] = task.format
    held = loss.compute_loss()
    figures = {"loss": held.loss, "perplexity": held.token_perplexity, "bits_per_byte": held.bits_per_byte}
    return EvalResult(
        {**figures, "tokens": held.tokens, "bytes": held.bytes, **found},
        format_data_description(subject, task.data),
        settings,
    )


def _read_held_out_batches(subject: EvalModel, batch: int) -> Iterator[MicroBatch]:
    """Read the prepared held-out sequences of the model's run."""
    origin = get_exported_run(subject)
    if subject.context_length != origin.dataset_info.sequence_length:
        raise PlanError(
            f"--context {subject.context_length}: what the run holds out is cut into "
            f"{origin.dataset_info.sequence_length} "
            "tokens; another context is for documents of --data"
        )
    sequences = PackedDataset(origin.dataset_info, global_batch=1)
    if not sequences.eval_sequences:
        raise DataError(f"{origin.directory.path}: the run has held nothing out: name documents with --data")
    return sequences.iter_eval_batches(0, 1, batch)


class _RenderedDocuments:
    """The user's documents, rendered in batches."""

    def __init__(self, task: PerplexityTask, subject: EvalModel) -> None:
        assert task.data is not None
        self._source, self._context, self._stride = (
            SourceConfig(path=task.data, format=task.format),
            subject.context_length,
            task.stride,
        )
        length = self._context if task.stride is None else _UNLIMITED_LENGTH
        self._renderer = DocumentRenderer(
            [self._source], subject.tokenization_spec, subject.text_encoder, subject.directory, length
        )
        self.count = self.too_long = 0

    def iter_example_batches(self) -> Iterator[list[Example]]:
        """Yield the examples of all documents, each at most as long as the context."""
        numbered = enumerate(read_source_documents(self._source, 0))
        while some := list(islice(numbered, _DOCUMENTS_PER_BATCH)):
            yield list(self._render_examples(some))

    def _render_examples(self, numbered: list[tuple[int, Document]]) -> Iterator[Example]:
        for rendered in self._renderer.render_documents(0, numbered, seed=0, epoch=0, plain=True):
            self.count += bool(rendered.examples)
            self.too_long += rendered.dropped == "too_long"
            for example in rendered.examples:
                yield from split_into_windows(example, self._context, self._stride or self._context)


def split_into_windows(example: Example, context: int, stride: int) -> Iterator[Example]:
    """Split an example into windows of `context` tokens, each starting `stride` after the previous one.

    Every token but the first is predicted once, in the first window that contains it, with at least `context` -
    `stride` preceding tokens. An example that fits is a single window.
    """
    seen = 0
    for start in range(0, max(len(example.tokens) - context, 0) + stride, stride):
        stop = min(start + context, len(example.tokens))
        if stop > seen:
            loss = example.loss[start:stop].copy()
            loss[: seen - start] = False
            yield replace(example, tokens=example.tokens[start:stop], loss=loss)
        seen = stop
