"""Fill-in-the-middle (FIM): a text is split at two random places and the middle is moved to the end."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import NamedTuple

from llm_training_toolkit.config.source_config import FimConfig
from llm_training_toolkit.data.code.split_points import Segment, TextSegment
from llm_training_toolkit.data.tokenizer import TextEncoder, TokenizationSpec
from llm_training_toolkit.errors import DataError


@dataclass(frozen=True)
class FimRules:
    """FIM settings of a source, with the ids of the three sentinels.

    whole: rearrange a document before splitting it, instead of chunk by chunk.
    path_in_prefix: put a file's path after the prefix sentinel, instead of before it.
    """

    prefix: int
    middle: int
    suffix: int
    rate: float
    spm_rate: float
    middle_only: bool
    whole: bool = False
    path_in_prefix: bool = False

    @classmethod
    def from_config(cls, fim: FimConfig, markers: TokenizationSpec, encoder: TextEncoder) -> FimRules:
        """Build the rules of a source. Raises DataError if the family or the tokenizer lacks a sentinel."""
        tokens = markers.tokens
        if not tokens.has_fim:
            raise DataError(
                "data.sources.fim: this model family has no fill-in-the-middle markers. Remove fim from the source, or "
                "choose a model of a family that has them."
            )
        return cls(
            encoder.get_special_token_id(tokens.fim_prefix),
            encoder.get_special_token_id(tokens.fim_middle),
            encoder.get_special_token_id(tokens.fim_suffix),
            fim.rate,
            fim.spm_rate,
            middle_only=fim.loss == "middle",
            whole=fim.level == "document",
            path_in_prefix=markers.layout.path_in_prefix,
        )


class UniformDraw(NamedTuple):
    """Four independent uniform numbers in [0, 1): rearrange or not, order, first split, second split."""

    rearrange: float
    order: float
    first: float
    second: float


def draw_uniform_numbers(seed: int, epoch: int, source: int, document: int, part: str) -> UniformDraw:
    """Hash the coordinates of a document part into random numbers, independent of processing order."""
    key = f"{seed}/{epoch}/{source}/{document}/{part}".encode()
    raw = struct.unpack("<4Q", hashlib.blake2b(key, digest_size=32, person=b"ltt-fim").digest())
    return UniformDraw(*((value >> 11) * 2.0**-53 for value in raw))


def apply_fim(lead: str, body: str, chance: UniformDraw, fim: FimRules) -> list[Segment]:
    """Split a file's body in three and return its segments, the middle last; the lead (metadata) stays whole."""
    cut_positions = len(body) + 1  # before the first character … after the last
    first, second = sorted((int(chance.first * cut_positions), int(chance.second * cut_positions)))
    in_front = [] if fim.path_in_prefix or not lead else [TextSegment(lead, len(lead))]
    inside = lead if fim.path_in_prefix else ""
    prefix, middle, suffix = (
        TextSegment(inside + body[:first], len(inside)),
        TextSegment(body[first:second]),
        TextSegment(body[second:]),
    )
    if chance.order < fim.spm_rate:  # "variant 2": no sentinel between prefix and middle
        return [*in_front, fim.prefix, fim.suffix, suffix, fim.middle, prefix, middle]
    return [*in_front, fim.prefix, prefix, fim.suffix, suffix, fim.middle, middle]
