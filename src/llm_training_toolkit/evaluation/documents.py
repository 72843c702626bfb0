"""Documents to evaluate on: the user's own, or the held-out documents of the model's run."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from llm_training_toolkit.config import SourceConfig
from llm_training_toolkit.config.source_config import SourceFormat
from llm_training_toolkit.config.uri import redact_uri
from llm_training_toolkit.data.prepare.dataset_info import PreparedDataset
from llm_training_toolkit.data.prepare.document_index import (
    DocumentIndex,
    DocumentReader,
    list_all_sources,
    split_into_shards,
)
from llm_training_toolkit.data.sources import STANDARD_LIBRARY, Document, is_uri, read_source_documents
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.evaluation.model import EvalModel, ExportedRun
from llm_training_toolkit.evaluation.task import DocumentFormat

_WRITTEN_FORMATS: frozenset[SourceFormat] = frozenset(("code", "text"))
_CHAT_FORMATS: frozenset[SourceFormat] = frozenset(("chat",))


def read_held_out_documents(
    origin: ExportedRun, formats: Collection[SourceFormat] = _WRITTEN_FORMATS
) -> Iterator[Document]:
    """Read a run's held-out documents of some formats again from its sources.

    Raises DataError if they are missing or have changed.
    """
    data = origin.config.data
    document_index = DocumentIndex.read(PreparedDataset.from_info(origin.dataset_info).directory / "documents")
    written = [index for index, source in enumerate(list_all_sources(data)) if source.format in formats]
    reader = DocumentReader(data, document_index)
    for shard in split_into_shards(data, document_index, written, held=True):
        for _, document in reader.read_documents(shard, held=True):
            yield document


def read_eval_documents(subject: EvalModel, path: str | None, form: DocumentFormat) -> Iterator[Document]:
    """Read the documents at `path`, by default the held-out documents of the model's run."""
    if path is not None:
        return read_source_documents(SourceConfig(path=path, format=form), 0)
    return read_held_out_documents(get_exported_run(subject), _CHAT_FORMATS if form == "chat" else _WRITTEN_FORMATS)


def get_exported_run(subject: EvalModel) -> ExportedRun:
    """Return the model's run. Raises PlanError for a model without one: held-out documents belong to a run."""
    if subject.origin is None:
        raise PlanError(f"{subject.directory} belongs to no run with documents held out: name some with --data")
    return subject.origin


def format_data_description(subject: EvalModel, path: str | None) -> str:
    """Return the `data` field of a result: the resolved path, or the run that held the documents out."""
    return (
        redact_uri(resolve_data_path(path))
        if path is not None
        else f"held out by {get_exported_run(subject).config.run.name}"
    )


def resolve_data_path(path: str) -> str:
    """Return an absolute path, so that the record is valid from any directory; URIs and STANDARD_LIBRARY unchanged."""
    return path if is_uri(path) or path == STANDARD_LIBRARY else str(Path(path).expanduser().absolute())
