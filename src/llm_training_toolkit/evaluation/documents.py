"""The documents that a model is measured on: a person's own, or those that its run has held out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llm_training_toolkit.config import SourceConfig
from llm_training_toolkit.data.prepare.builder import PreparedDataset
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


def build_document_source(path: str, form: DocumentFormat) -> SourceConfig:
    """Documents of one's own as a source: a file, a directory, a glob or an address."""
    return SourceConfig(path=path, format=form)


def read_user_documents(source: SourceConfig) -> Iterator[Document]:
    """Every document of a source, doubled ones once. Raises DataError for the first that cannot be read."""
    return read_source_documents(source, 0)


def read_held_out_documents(origin: ExportedRun) -> Iterator[Document]:
    """The held-out documents of a run, but its conversations, read again from its sources.

    Raises DataError where they are not there any more as they were.
    """
    data = origin.config.data
    survey = DocumentIndex.read(PreparedDataset.from_info(origin.receipt).directory / "documents")
    written = [index for index, source in enumerate(list_all_sources(data)) if source.format != "chat"]
    rereader = DocumentReader(data, survey)
    for shard in split_into_shards(data, survey, written, held=True):
        for _, document in rereader.read_documents(shard, held=True):
            yield document


def read_eval_documents(subject: EvalModel, path: str | None, form: DocumentFormat) -> Iterator[Document]:
    """Documents at a path, or without one those that the model's run has held out."""
    return (
        read_user_documents(build_document_source(path, form))
        if path is not None
        else read_held_out_documents(get_exported_run(subject))
    )


def get_exported_run(subject: EvalModel) -> ExportedRun:
    """The run a model came from. Raises PlanError where it came from none, and so brings no documents with it."""
    if subject.origin is None:
        raise PlanError(f"{subject.directory} belongs to no run with documents held out: name some with --data")
    return subject.origin


def format_data_description(subject: EvalModel, path: str | None) -> str:
    """What the documents are, for the result."""
    return resolve_data_path(path) if path is not None else f"held out by {get_exported_run(subject).config.run.name}"


def resolve_data_path(path: str) -> str:
    """A path as anyone finds it later, from whatever directory; addresses and the standard library as they are."""
    return path if is_uri(path) or path == STANDARD_LIBRARY else str(Path(path).expanduser().absolute())
