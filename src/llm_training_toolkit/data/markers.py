"""The special tokens the data layer needs to know, as plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Markers:
    """The special tokens of a model family, and how its tokenizer splits text before merging bytes.

    `all` holds every special token in id order: a tokenizer of one's own gives them the first ids.
    The three fill-in-the-middle markers, and those for a repository's name, a file and its stars, are None where the
    family has none. The rest is how code is written with them: see `CodeLayout` in families/family.py.
    """

    end_of_text: str
    pad: str
    fim_prefix: str | None
    fim_middle: str | None
    fim_suffix: str | None
    all: tuple[str, ...]
    pre_tokenizer_pattern: str
    chat_template: str = ""
    """Jinja text of the family's own way to write a conversation, for tokenizers that bring none."""
    repository: str | None = None
    file: str | None = None
    stars: str | None = None
    after_repository: str = ""
    between_files: str = ""
    path_in_prefix: bool = False
    needs_path: bool = False
