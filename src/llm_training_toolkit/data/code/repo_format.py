"""Writes a document as its family does: repository, path and stars in special tokens around the code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llm_training_toolkit.config.schema import SourceConfig
from llm_training_toolkit.data.sources import Document, RepositoryFile
from llm_training_toolkit.data.tokenizer import TextEncoder, TokenizationSpec
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.families import CodeLayout

_STAR_BUCKETS = ((0, "0"), (10, "1-10"), (100, "10-100"), (1000, "100-1000"))


class FileSegment(NamedTuple):
    """A file of a document, or all of a plain one.

    head: special tokens (ids) and metadata (text) in front. lead: text between the last special token and the body.
    body: the file's own text, all that fill-in-the-middle may cut. tail: what parts it from the next file.
    """

    head: tuple[int | str, ...]
    lead: str
    body: str
    tail: str


@dataclass(frozen=True)
class RepoFormat:
    """How the documents of a source are written: the ids of the special tokens, and the family's form.

    stars: None where they are not written. metadata: whether repository, path and stars are written, or nothing but
    the file's token.
    """

    file: int
    repository: int
    stars: int | None
    form: CodeLayout
    metadata: bool

    @classmethod
    def from_config(cls, source: SourceConfig, markers: TokenizationSpec, encoder: TextEncoder) -> RepoFormat | None:
        """The layout of a source; None where its documents are written without any.

        Raises DataError where the family or the tokenizer lacks a special token.
        """
        if not source.metadata and source.group_by == "file":
            return None
        tokens, form = markers.tokens, markers.layout
        if not tokens.repository or not tokens.file or (form.needs_path and not source.metadata):
            raise DataError(
                "data.sources: this model family has no special tokens for repositories, or none for files without "
                "metadata. Remove per and metadata from the source, or choose a model of a family that has them."
            )
        return cls(
            encoder.get_special_token_id(tokens.file),
            encoder.get_special_token_id(tokens.repository),
            encoder.get_special_token_id(form.stars) if form.stars else None,
            form,
            source.metadata,
        )

    def build_file_segments(self, document: Document) -> list[FileSegment]:
        """The files of a document in their order, the first with what is known of the repository."""
        files = document.parts or (RepositoryFile(document.path, document.text),)
        tails = [self.form.between_files] * (len(files) - 1) + [""]
        written = []
        for number, (file, tail) in enumerate(zip(files, tails, strict=True)):
            labels = self._build_labels(document if number == 0 else None, file)
            head = [item for label in labels for item in label if item != ""]
            # The last text in front ends its line. It is encoded as one with the code, as by anyone who reads the file.
            lead = f"{head.pop()}\n" if head and isinstance(head[-1], str) else ""
            written.append(FileSegment(tuple(head), lead, file.text, tail))
        return written

    def _build_labels(self, document: Document | None, file: RepositoryFile) -> list[tuple[int, str]]:
        """Special tokens with their texts; `document` only before its first file."""
        if not self.metadata:
            return [(self.file, "")]
        labels = []
        if document is not None and document.repository:
            labels.append((self.repository, document.repository + self.form.after_repository))
        if file.path or document is None or not self.form.needs_path:
            labels.append((self.file, file.path))
        if document is not None and document.stars is not None and self.stars is not None:
            labels.append((self.stars, get_star_bucket(document.stars)))
        return labels


def build_plain_segments(document: Document) -> list[FileSegment]:
    """A document that is its text and nothing else."""
    return [FileSegment((), "", document.text, "")]


def get_star_bucket(stars: int) -> str:
    """Stars as StarCoder was told them: in five steps (Li et al. 2023)."""
    return next((name for limit, name in _STAR_BUCKETS if stars <= limit), "1000+")
