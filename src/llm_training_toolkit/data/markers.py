"""What the data layer takes from a family of models: its special tokens, and how text is written with them."""

from __future__ import annotations

from dataclasses import dataclass

from llm_training_toolkit.families import CodeLayout, Family, SpecialTokens


@dataclass(frozen=True)
class Markers:
    """The part of a family that decides about tokens, and so whether prepared ones are those of a run."""

    tokens: SpecialTokens
    layout: CodeLayout
    pre_tokenizer_pattern: str
    chat_template: str

    @classmethod
    def of(cls, family: Family) -> Markers:
        """The markers of a family."""
        return cls(family.special_tokens, family.code_layout, family.pre_tokenizer_pattern, family.chat_template)
