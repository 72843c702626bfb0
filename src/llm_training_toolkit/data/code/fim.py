"""Fill-in-the-middle: a text is cut twice at random, and the middle is moved to its end."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import NamedTuple

from llm_training_toolkit.config.schema import FimConfig
from llm_training_toolkit.data.code.split_points import Segment, TextSegment
from llm_training_toolkit.data.tokenizer import TextEncoder, TokenizationSpec
from llm_training_toolkit.errors import DataError


@dataclass(frozen=True)
class FimRules:
    """How a source is rearranged, with the ids of the three sentinels.

    whole: a document is rearranged before it is cut, not chunk by chunk. path_in_prefix: the path in front of a file
    stands behind the sentinel of the prefix.
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
        """The rules of a source. Raises DataError where the family or the tokenizer lacks a sentinel."""
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
    """Four independent uniform numbers in [0, 1): rearrange?, in which order?, first cut, second cut."""

    rearrange: float
    order: float
    first: float
    second: float


def draw_uniform_numbers(seed: int, epoch: int, source: int, document: int, part: str) -> UniformDraw:
    """The random numbers of a part of a document: a hash of its coordinates, so no order of work can change them."""
    key = f"{seed}/{epoch}/{source}/{document}/{part}".encode()
    raw = struct.unpack("<4Q", hashlib.blake2b(key, digest_size=32, person=b"ltt-fim").digest())
    return UniformDraw(*((value >> 11) * 2.0**-53 for value in raw))


def apply_fim(lead: str, body: str, chance: UniformDraw, fim: FimRules) -> list[Segment]:
    """The items of a file whose body is cut in three; the last is the middle. The lead, its metadata, is never cut."""
    places = len(body) + 1  # before the first character … after the last
    first, second = sorted((int(chance.first * places), int(chance.second * places)))
    in_front = [] if fim.path_in_prefix or not lead else [TextSegment(lead, len(lead))]
    inside = lead if fim.path_in_prefix else ""
    prefix, middle, suffix = (
        TextSegment(inside + body[:first], len(inside)),
        TextSegment(body[first:second]),
        TextSegment(body[second:]),
    )
    if chance.order < fim.spm_rate:  # "variant 2": the prefix flows into the middle without a sentinel between them
        return [*in_front, fim.prefix, fim.suffix, suffix, fim.middle, prefix, middle]
    return [*in_front, fim.prefix, prefix, fim.suffix, suffix, fim.middle, middle]
