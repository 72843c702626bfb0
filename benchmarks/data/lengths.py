"""Lengths of documents as collections of text have them, and what both packings are asked about."""

from __future__ import annotations

import json
import resource
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LENGTH = 2048
Integers = NDArray[np.int64]


def lengths_of(documents: int) -> Integers:
    """Tokens of each document: half have more than 400, the mean is 740, 7 in 100 are longer than a sequence."""
    drawn = np.random.default_rng(0).lognormal(6.0, 1.1, documents)
    return drawn.astype(np.int64) + 1


def chunks_of(lengths: Integers) -> tuple[Integers, Integers]:
    """Document and length of every chunk, as `overlong: split` cuts them."""
    counts = -(-lengths // LENGTH)
    document = np.repeat(np.arange(len(lengths)), counts)
    chunks = np.full(len(document), LENGTH)
    chunks[np.cumsum(counts) - 1] = lengths - LENGTH * (counts - 1)
    return document, chunks


class Pieces(NamedTuple):
    """What lies in the sequences, piece after piece: whose tokens (document), in which sequence (row), and how many."""

    document: Integers
    row: Integers
    tokens: Integers


def report(seconds: float, documents: int, found: Pieces) -> None:
    """Print what became of the documents, as JSON."""
    lengths = lengths_of(documents)
    kept = np.bincount(found.document, found.tokens, documents).astype(np.int64)
    pieces = np.bincount(found.document, minlength=documents)
    sequences = len(np.unique(found.row))
    facts = {
        "seconds": seconds,
        "documents": documents,
        "kept": int(kept.sum()) / int(lengths.sum()),
        "truncated": int((kept < lengths).sum()),
        "cut": int((pieces > 1).sum()),
        "cut_though_short": int(((pieces > 1) & (lengths <= LENGTH)).sum()),
        "sequences": sequences,
        "padding": 1 - int(kept.sum()) / (sequences * LENGTH),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    print(json.dumps(facts), flush=True)


def pieces_of(tokens: NDArray[np.int32], starts: Integers) -> Pieces:
    """The pieces of packed sequences that begin at `starts`, where each token is the number of its document."""
    changes = np.flatnonzero(np.diff(tokens, prepend=-1))
    at = np.union1d(changes, starts)
    row = np.searchsorted(starts, at, side="right") - 1
    return Pieces(tokens[at].astype(np.int64), row, np.diff(at, append=len(tokens)))
