"""All that the rendering of code and text depends on besides the document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm_training_toolkit.config.schema import Source
from llm_training_toolkit.data.code.fim import Draw, FimRules, draw
from llm_training_toolkit.data.code.repo_format import Layout, Passage, plain
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import Markers, TextEncoder


@dataclass(frozen=True)
class Rules:
    """How the documents of a source are rendered in an epoch."""

    sequence_length: int
    end_of_text: int
    too_long: Literal["continue", "drop", "error"] = "continue"
    fim: FimRules | None = None
    seed: int = 0
    epoch: int = 0
    layout: Layout | None = None

    @classmethod
    def of(
        cls, source: Source, markers: Markers, encoder: TextEncoder, sequence_length: int, *, seed: int, epoch: int
    ) -> Rules:
        """The rules of a source of the configuration. Raises DataError where the tokenizer lacks a marker."""
        return cls(
            sequence_length,
            encoder.id_of(markers.tokens.end_of_text),
            "continue" if source.too_long == "auto" else source.too_long,
            None if source.fim is None else FimRules.of(source.fim, markers, encoder),
            seed,
            epoch,
            Layout.of(source, markers, encoder),
        )

    def passages(self, document: Document) -> list[Passage]:
        """The files of a document as they are written."""
        return plain(document) if self.layout is None else self.layout.passages(document)

    def chance(self, number: int, document: Document, part: str) -> Draw | None:
        """The random numbers of a part of a document; None where it stays as it is."""
        if self.fim is None:
            return None
        drawn = draw(self.seed, self.epoch, document.source, number, part)
        return drawn if drawn.rearrange < self.fim.rate else None
