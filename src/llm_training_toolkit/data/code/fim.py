"""Fill-in-the-middle: a text is cut twice at random, and the middle is moved to its end."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import NamedTuple

from llm_training_toolkit.config.schema import FillInTheMiddle
from llm_training_toolkit.data.code.split_points import Item, Text
from llm_training_toolkit.data.tokenizer import Markers, TextEncoder
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
    def of(cls, fim: FillInTheMiddle, markers: Markers, encoder: TextEncoder) -> FimRules:
        """The rules of a source. Raises DataError where the family or the tokenizer lacks a sentinel."""
        tokens = markers.tokens
        if not tokens.has_fim:
            raise DataError(
                "data.sources.fim: this model family has no fill-in-the-middle markers. Remove fim from the source, or "
                "choose a model of a family that has them."
            )
        return cls(
            encoder.id_of(tokens.fim_prefix),
            encoder.id_of(tokens.fim_middle),
            encoder.id_of(tokens.fim_suffix),
            fim.rate,
            fim.spm_rate,
            middle_only=fim.loss == "middle",
            whole=fim.level == "document",
            path_in_prefix=markers.layout.path_in_prefix,
        )


class Draw(NamedTuple):
    """Four independent uniform numbers in [0, 1): rearrange?, in which order?, first cut, second cut."""

    rearrange: float
    order: float
    first: float
    second: float


def draw(seed: int, epoch: int, source: int, document: int, part: str) -> Draw:
    """The random numbers of a part of a document: a hash of its coordinates, so no order of work can change them."""
    key = f"{seed}/{epoch}/{source}/{document}/{part}".encode()
    raw = struct.unpack("<4Q", hashlib.blake2b(key, digest_size=32, person=b"ltt-fim").digest())
    return Draw(*((value >> 11) * 2.0**-53 for value in raw))


def rearranged(lead: str, body: str, chance: Draw, fim: FimRules) -> list[Item]:
    """The items of a file whose body is cut in three; the last is the middle. The lead, its metadata, is never cut."""
    places = len(body) + 1  # before the first character … after the last
    first, second = sorted((int(chance.first * places), int(chance.second * places)))
    in_front = [] if fim.path_in_prefix or not lead else [Text(lead, len(lead))]
    inside = lead if fim.path_in_prefix else ""
    prefix, middle, suffix = Text(inside + body[:first], len(inside)), Text(body[first:second]), Text(body[second:])
    if chance.order < fim.spm_rate:  # "variant 2": the prefix flows into the middle without a sentinel between them
        return [*in_front, fim.prefix, fim.suffix, suffix, fim.middle, prefix, middle]
    return [*in_front, fim.prefix, prefix, fim.suffix, suffix, fim.middle, middle]
