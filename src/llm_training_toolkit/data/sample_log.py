"""Sample log: the sequences that a rank fetched in each step, with a checksum of their tokens."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llm_training_toolkit.runs.json_lines import read_json_lines

if TYPE_CHECKING:
    from llm_training_toolkit.data.collate import MicroBatch
    from llm_training_toolkit.data.dataset import SequenceRef


class FetchedSequence(NamedTuple):
    """A sequence that a rank fetched."""

    stream: int
    epoch: int
    sequence: int
    tokens_crc32: int
    """CRC-32 of its row of token ids."""


class SampleLog:
    """A rank's sample log of an attempt; every line is flushed to the operating system before the step continues."""

    def __init__(self, directory: Path, attempt: int, rank: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / f"attempt_{attempt}_rank_{rank}.jsonl").open("a", buffering=1)

    def log_step(self, step: int, placed: Sequence[SequenceRef], batches: Sequence[MicroBatch]) -> None:
        """Log the sequences of a step, counted from 1, in the row order of `batches`."""
        rows = [row for batch in batches for row in batch.input_ids.numpy()]
        found = [FetchedSequence(*each, zlib.crc32(row.tobytes())) for each, row in zip(placed, rows, strict=True)]
        self._file.write(json.dumps({"step": step, "fetched": found}) + "\n")


def read_sample_log(directory: Path, attempt: int) -> Iterator[tuple[int, list[FetchedSequence]]]:
    """Yield (step, sequences) of every rank of an attempt; a partial line of a killed process is skipped."""
    for path in sorted(directory.glob(f"attempt_{attempt}_rank_*.jsonl")):
        for row in read_json_lines(path):
            yield int(row["step"]), [FetchedSequence(*each) for each in row["fetched"]]
