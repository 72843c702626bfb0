"""Layout of documents whose texts stand behind special tokens: commits, issues, notebooks."""

from __future__ import annotations

from dataclasses import dataclass

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.code.repo_format import FileSegment, build_plain_segments
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import TextEncoder
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.families import list_models_with_tokens
from llm_training_toolkit.families.document_layouts import JUPYTER_SCRIPT, get_required_markers

MARKED_FORMATS = frozenset({"commits", "issues", "notebooks", "git"})


@dataclass(frozen=True)
class MarkerLayout:
    """Layout of a source whose documents bring their special tokens with them."""

    encoder: TextEncoder

    @classmethod
    def from_config(cls, source: SourceConfig, encoder: TextEncoder) -> MarkerLayout:
        """Build the layout of a source. Raises DataError, naming models, if the tokenizer lacks a special token."""
        required = get_required_markers(source.format, source.layout)
        missing = [marker for marker in required if not encoder.has_special_token(marker)]
        if missing:
            raise DataError(
                f"data.sources: format {source.format} needs the special token {missing[0]!r}, which the tokenizer "
                f"does not have. Models that have it: {', '.join(list_models_with_tokens(required))}."
            )
        return cls(encoder)

    def build_file_segments(self, document: Document) -> list[FileSegment]:
        """Build one segment per text; a document without special tokens is plain text."""
        if not document.segments:
            return build_plain_segments(document)
        return [
            FileSegment(self._get_ids(each.markers), "", each.text, "", each.is_trained) for each in document.segments
        ]

    def _get_ids(self, markers: tuple[str, ...]) -> tuple[int, ...]:
        """Return the ids of special tokens. A tokenizer without a token for scripts reads them as plain code."""
        return tuple(
            self.encoder.get_special_token_id(marker)
            for marker in markers
            if marker != JUPYTER_SCRIPT or self.encoder.has_special_token(marker)
        )
