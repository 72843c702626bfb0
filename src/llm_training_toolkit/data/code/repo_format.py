"""Repository format of a family: repository, path and stars in special tokens around the code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.sources import Document, RepositoryFile
from llm_training_toolkit.data.tokenizer import TextEncoder, TokenizationSpec
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.families import CodeLayout

_STAR_BUCKETS = ((0, "0"), (10, "1-10"), (100, "10-100"), (1000, "100-1000"))


class FileSegment(NamedTuple):
    """A file of a document, or the whole of a plain one.

    head: special tokens (ids) and metadata (text). lead: text between the last special token and the body.
    body: the file's own text, the only part FIM may split. tail: separator before the next file.
    is_trained: False for a text that is only shown, and bears no loss.
    """

    head: tuple[int | str, ...]
    lead: str
    body: str
    tail: str
    is_trained: bool = True


@dataclass(frozen=True)
class RepoFormat:
    """Special token ids and code layout for writing the documents of a source.

    stars: None if the family does not write them. metadata: write repository, path and stars, or the file token alone.
    """

    file: int
    repository: int
    stars: int | None
    form: CodeLayout
    metadata: bool

    @classmethod
    def from_config(cls, source: SourceConfig, markers: TokenizationSpec, encoder: TextEncoder) -> RepoFormat | None:
        """Build the format of a source, or None if its documents are written as plain text.

        Raises DataError if the family or the tokenizer lacks a special token.
        """
        if not source.metadata and source.group_by == "file":
            return None
        tokens, form = markers.tokens, markers.layout
        if not tokens.repository or not tokens.file or (form.needs_path and not source.metadata):
            raise DataError(
                "data.sources: this model family has no special tokens for repositories, or none for files without "
                "metadata. Remove group_by and metadata from the source, or choose a model of a family that has them."
            )
        return cls(
            encoder.get_special_token_id(tokens.file),
            encoder.get_special_token_id(tokens.repository),
            encoder.get_special_token_id(form.stars) if form.stars else None,
            form,
            source.metadata,
        )

    def build_file_segments(self, document: Document) -> list[FileSegment]:
        """Build the segments of a document's files in order; the first carries the repository's metadata."""
        files = document.parts or (RepositoryFile(document.path, document.text),)
        tails = [self.form.between_files] * (len(files) - 1) + [""]
        written = []
        for number, (file, tail) in enumerate(zip(files, tails, strict=True)):
            labels = self._build_labels(document if number == 0 else None, file)
            head = [item for label in labels for item in label if item != ""]
            # The last label ends its line and is encoded together with the code, as when a user tokenizes the file.
            lead = f"{head.pop()}\n" if head and isinstance(head[-1], str) else ""
            written.append(FileSegment(tuple(head), lead, file.text, tail))
        return written

    def _build_labels(self, document: Document | None, file: RepositoryFile) -> list[tuple[int, str]]:
        """Pair special tokens with their texts; `document` is given only for its first file."""
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
    """Return the document as its text alone."""
    return [FileSegment((), "", document.text, "")]


def get_star_bucket(stars: int) -> str:
    """Return the bucket of a star count: StarCoder's five steps (Li et al. 2023)."""
    return next((name for limit, name in _STAR_BUCKETS if stars <= limit), "1000+")
