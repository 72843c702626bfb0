"""Types of the data layer: documents, repository files, examples and rendered documents."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_training_toolkit.data.tokenizer import Ids


@dataclass(frozen=True)
class Example:
    """Training example from one document: tokens (L,) uint32, loss (L,) bool, and the document's number.

    `loss[i]` marks token i as a prediction target; the first token of an example cannot be one.
    """

    tokens: Ids
    loss: NDArray[np.bool_]
    document: int


class RenderedDocument(NamedTuple):
    """Examples of a document (empty: dropped), and the token count of the whole document with its end.

    dropped: the reason, longer than a sequence or without a token that bears loss; None for a document with examples.
    """

    document: int
    tokens: int
    examples: list[Example]
    dropped: Literal["too_long", "no_loss"] | None = None


class MarkedText(NamedTuple):
    """Text of a document behind special tokens, which are given as text; the text may be empty.

    is_trained: False for a text that is only shown, and bears no loss.
    """

    markers: tuple[str, ...]
    text: str
    is_trained: bool = True


class RepositoryFile(NamedTuple):
    """File of a repository: path within it, and text."""

    path: str
    text: str


@dataclass(frozen=True)
class Document:
    """Document: number of its source, a name that identifies its origin, and text.

    Code also has its repository, path within it and the repository's stars, as far as known. A whole-repository
    document has its files as `parts`, in path order, and their concatenated texts as `text`. A commit, an issue and a
    notebook have their special tokens and texts as `segments`, and the texts alone as `text`.
    """

    source: int
    name: str
    text: str
    repository: str = ""
    path: str = ""
    stars: int | None = None
    parts: tuple[RepositoryFile, ...] = ()
    segments: tuple[MarkedText, ...] = ()
    dedup_text: str = ""
    """Text to compare for duplicates if it differs from `text`: a conversation without its loss overrides."""

    @cached_property
    def content_digest(self) -> bytes:
        """Hash of the content, without name and metadata."""
        if self.segments:  # lengths keep apart what the texts alone do not
            return content_hash(
                "\0".join(f"{''.join(each.markers)}{len(each.text)}\0{each.text}" for each in self.segments)
            )
        return content_hash(self.dedup_text or self.text)


def content_hash(text: str) -> bytes:
    """Return a content hash of 16 bytes, half of a SHA-256.

    The chance of a collision among 10 million different documents is 1 in 10^25.
    """
    return hashlib.sha256(text.encode()).digest()[:16]
