"""Types of the data layer: documents, their parts, examples and rendered tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_training_toolkit.data.tokenizer import Ids


@dataclass(frozen=True)
class Example:
    """What the model is shown of one document: tokens (L,) uint32, loss (L,) bool, and the document's number.

    `loss[i]` says whether token i is to be predicted; the first token of an example never can be.
    """

    tokens: Ids
    loss: NDArray[np.bool_]
    document: int


class RenderedDocument(NamedTuple):
    """A document's examples (none: dropped as too long) and the tokens of the whole document with its end."""

    document: int
    tokens: int
    examples: list[Example]


class RepositoryFile(NamedTuple):
    """A file of a repository: its path in it, and its text."""

    path: str
    text: str


@dataclass(frozen=True)
class Document:
    """One document: the number of its source, a name that leads back to it, and its text.

    For code also the repository it is from, its path in it and the repository's stars, as far as they are known. A
    document that is a whole repository has its files as `parts`, in the order of their paths, and as `text` their
    texts one after the other.
    """

    source: int
    name: str
    text: str
    repository: str = ""
    path: str = ""
    stars: int | None = None
    parts: tuple[RepositoryFile, ...] = ()
    dedup_text: str = ""
    """What counts as its content where that is less than `text`: a conversation without its switches of loss."""

    @cached_property
    def content_digest(self) -> bytes:
        """Its content's hash; neither name nor metadata count."""
        return content_hash(self.dedup_text or self.text)


def content_hash(text: str) -> bytes:
    """16 bytes that stand for a content: equal contents, equal hashes.

    Half of a SHA-256: two of 10 million different documents are taken for equal with a chance of 1 in 10^25.
    """
    return hashlib.sha256(text.encode()).digest()[:16]
