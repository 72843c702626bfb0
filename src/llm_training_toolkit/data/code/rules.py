"""Rules for rendering code and text: every input of rendering besides the document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.code.fim import FimRules, UniformDraw, draw_uniform_numbers
from llm_training_toolkit.data.code.marker_layout import MARKED_FORMATS, MarkerLayout
from llm_training_toolkit.data.code.repo_format import FileSegment, RepoFormat, build_plain_segments
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import TextEncoder, TokenizationSpec


@dataclass(frozen=True)
class RenderRules:
    """Rendering settings of a source for one epoch."""

    sequence_length: int
    end_of_text: int
    overlong: Literal["split", "drop", "error"] = "split"
    fim: FimRules | None = None
    seed: int = 0
    epoch: int = 0
    layout: RepoFormat | MarkerLayout | None = None

    @classmethod
    def from_config(
        cls,
        source: SourceConfig,
        markers: TokenizationSpec,
        encoder: TextEncoder,
        sequence_length: int,
        *,
        seed: int,
        epoch: int,
    ) -> RenderRules:
        """Build the rules of a configured source. Raises DataError if the tokenizer lacks a special token."""
        return cls(
            sequence_length,
            encoder.get_special_token_id(markers.tokens.end_of_text),
            _choose_overlong(source),
            None if source.fim is None else FimRules.from_config(source.fim, markers, encoder),
            seed,
            epoch,
            MarkerLayout.from_config(source, encoder)
            if source.format in MARKED_FORMATS
            else RepoFormat.from_config(source, markers, encoder),
        )

    def build_file_segments(self, document: Document) -> list[FileSegment]:
        """Build the file segments of a document."""
        return build_plain_segments(document) if self.layout is None else self.layout.build_file_segments(document)

    def draw_fim_for_part(self, number: int, document: Document, part: str) -> UniformDraw | None:
        """Draw the random numbers of a document part, or None if it stays plain."""
        if self.fim is None:
            return None
        drawn = draw_uniform_numbers(self.seed, self.epoch, document.source, number, part)
        return drawn if drawn.rearrange < self.fim.rate else None


def _choose_overlong(source: SourceConfig) -> Literal["split", "drop", "error"]:
    """Return what happens to a long document. A next edit that is cut would show a region without its answer."""
    match source.overlong:
        case "split" | "drop" | "error" as chosen:
            return chosen
        case _:
            return "drop" if source.layout == "edits" else "split"
