"""The documents that a model is measured on: a person's own, or those that its run has held out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llm_training_toolkit.config import Source
from llm_training_toolkit.data.prepare.builder import Prepared
from llm_training_toolkit.data.prepare.document_index import Rereader, Survey, all_sources, shards
from llm_training_toolkit.data.sources import STANDARD_LIBRARY, Document, documents, is_address
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.evaluation.model import Origin, Subject
from llm_training_toolkit.evaluation.task import Format


def source_of(path: str, form: Format) -> Source:
    """Documents of one's own as a source: a file, a directory, a glob or an address."""
    return Source(path=path, format=form)


def own_documents(source: Source) -> Iterator[Document]:
    """Every document of a source, doubled ones once. Raises DataError for the first that cannot be read."""
    return documents(source, 0)


def held_out_documents(origin: Origin) -> Iterator[Document]:
    """The held-out documents of a run, but its conversations, read again from its sources.

    Raises DataError where they are not there any more as they were.
    """
    data = origin.config.data
    survey = Survey.read(Prepared.load(origin.receipt).directory / "documents")
    written = [index for index, source in enumerate(all_sources(data)) if source.format != "chat"]
    rereader = Rereader(data, survey)
    for shard in shards(data, survey, written, held=True):
        for _, document in rereader.documents(shard, held=True):
            yield document


def documents_of(subject: Subject, path: str | None, form: Format) -> Iterator[Document]:
    """Documents at a path, or without one those that the model's run has held out."""
    return own_documents(source_of(path, form)) if path is not None else held_out_documents(origin_of(subject))


def origin_of(subject: Subject) -> Origin:
    """The run a model came from. Raises PlanError where it came from none, and so brings no documents with it."""
    if subject.origin is None:
        raise PlanError(f"{subject.directory} belongs to no run with documents held out: name some with --data")
    return subject.origin


def described(subject: Subject, path: str | None) -> str:
    """What the documents are, for the result."""
    return where(path) if path is not None else f"held out by {origin_of(subject).config.run.name}"


def where(path: str) -> str:
    """A path as anyone finds it later, from whatever directory; addresses and the standard library as they are."""
    return path if is_address(path) or path == STANDARD_LIBRARY else str(Path(path).expanduser().absolute())
