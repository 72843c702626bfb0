"""Gaps in documents, and the two ways a model is shown them: both sides with sentinels, or the prefix alone."""

from __future__ import annotations

import re
from typing import NamedTuple, Protocol

from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.evaluation.model import Subject

_LINE_BREAKS = re.compile(r"\n*")


class Gap(NamedTuple):
    """A document with its middle cut out."""

    document: str
    prefix: str
    middle: str
    suffix: str


class View(Protocol):
    """What a model is shown of a gap."""

    @property
    def stop(self) -> str:
        """Text that ends an answer beside the special tokens; empty where there is none."""

    def prompt(self, gap: Gap, most: int) -> tuple[list[int], bool]:
        """At most `most` tokens, and whether something far from the gap was left out."""

    def answer(self, gap: Gap) -> list[int]:
        """What the model would have to write: the middle, and what shows that it ends there."""


class BothSides:
    """Prefix, suffix, middle, each behind its sentinel. An answer ends with the end of text, as in training."""

    stop = ""

    def __init__(self, subject: Subject) -> None:
        """Raises PlanError where the tokenizer has no sentinels."""
        tokens, encoder = subject.markers.tokens, subject.encoder
        names = (tokens.fim_prefix, tokens.fim_suffix, tokens.fim_middle)
        if not tokens.has_fim or not all(map(encoder.knows, names)):
            raise PlanError(
                f"{subject.directory}: the tokenizer has no fill-in-the-middle sentinels: this model cannot fill in "
                "the middle. Measure its perplexity, show it the prefix alone (--given prefix), or take a model of a "
                "family that has them"
            )
        self._sentinels = tuple(map(encoder.id_of, names))
        self._encoder, self._end = encoder, encoder.id_of(tokens.end_of_text)

    def prompt(self, gap: Gap, most: int) -> tuple[list[int], bool]:
        """The suffix has a third of the room, or what the prefix leaves of it."""
        before, after = map(self._encoder.encode, (gap.prefix, gap.suffix))
        room = most - len(self._sentinels)
        kept_after = min(len(after), max(room - len(before), room // 3))
        kept_before = min(len(before), room - kept_after)
        was_cut = kept_before < len(before) or kept_after < len(after)
        prefix, suffix, middle = self._sentinels
        return [prefix, *before[len(before) - kept_before :], suffix, *after[:kept_after], middle], was_cut

    def answer(self, gap: Gap) -> list[int]:
        """The middle and the end of text."""
        return [*self._encoder.encode(gap.middle), self._end]


class PrefixAlone:
    """The document up to the gap, a whole line: as text goes on without fill-in-the-middle."""

    stop = "\n"

    def __init__(self, subject: Subject) -> None:
        self._encoder = subject.encoder

    def prompt(self, gap: Gap, most: int) -> tuple[list[int], bool]:
        """The end of the prefix."""
        before = self._encoder.encode(gap.prefix)
        return before[-most:], len(before) > most

    def answer(self, gap: Gap) -> list[int]:
        """The line with the line breaks behind it: tokens of code often hold the break that ends their line."""
        breaks = _LINE_BREAKS.match(gap.suffix)
        assert breaks is not None
        return self._encoder.encode(gap.middle + breaks[0])
