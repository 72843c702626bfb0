"""The special tokens the data layer needs to know, as plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Markers:
    """The special tokens of a model family, and how its tokenizer splits text before merging bytes.

    `all` holds every special token in id order: a tokenizer of one's own gives them the first ids.
    The three fill-in-the-middle markers are None where the family has none.
    """

    end_of_text: str
    pad: str
    fim_prefix: str | None
    fim_middle: str | None
    fim_suffix: str | None
    all: tuple[str, ...]
    pre_tokenizer_pattern: str
