"""Audit from a run's files alone: each sequence must have gone into the final weights exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from llm_training_toolkit.data.sample_log import FetchedSequence, read_sample_log
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs.attempts import read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory, parse_checkpoint_name


class AttemptSpan(NamedTuple):
    """Steps that one attempt added to the lineage of a checkpoint."""

    attempt: int
    after_step: int
    last_step: int
    """Step of the checkpoint that the next attempt resumed from."""


class AuditResult(NamedTuple):
    """Numbers of sequences that were fetched never or more than once."""

    missing: int
    doubled: int


def read_attempt_spans(run: RunDirectory, checkpoint: str) -> list[AttemptSpan]:
    """Return the attempts that led to a checkpoint, oldest first. Raises CheckpointError if one is unknown."""
    found: list[AttemptSpan] = []
    name: str | None = checkpoint
    while name is not None:
        step_and_attempt = parse_checkpoint_name(run.checkpoints_dir / name)
        record = read_attempt_record(run, step_and_attempt[1]) if step_and_attempt else {}
        if step_and_attempt is None or "resumed" not in record:
            raise CheckpointError(f"{run.path}: nothing is known of the attempt that wrote {name}")
        name = record["resumed"]
        resumed_from = parse_checkpoint_name(run.checkpoints_dir / name) if name else None
        found.append(AttemptSpan(step_and_attempt[1], resumed_from[0] if resumed_from else 0, step_and_attempt[0]))
    return found[::-1]


def read_fetched_sequences(run: RunDirectory, lineage: Iterable[AttemptSpan]) -> list[FetchedSequence]:
    """Return the sequences that all ranks fetched in the steps of the lineage."""
    return [
        sequence
        for stretch in lineage
        for step, sequences in read_sample_log(run.sample_log_dir, stretch.attempt)
        if stretch.after_step < step <= stretch.last_step
        for sequence in sequences
    ]


def audit_sequences(
    found: Sequence[FetchedSequence], wanted: Sequence[FetchedSequence], epochs: Sequence[Sequence[int]]
) -> AuditResult:
    """Count the sequences missing or doubled in `found`, compared with `wanted`, those of the undisturbed run.

    `epochs` holds the number of sequences in each epoch of each stream. An epoch followed by a later one must be
    complete, whatever the undisturbed run fetched. A sequence with other tokens is another sequence.
    """
    counted, expected = Counter(found), set(wanted)
    present = {(each.stream, each.epoch, each.sequence) for each in counted}
    last: dict[int, int] = {}
    for stream, epoch, _ in present:
        last[stream] = max(last.get(stream, 0), epoch)
    whole = {
        (stream, epoch, sequence)
        for stream, newest in last.items()
        for epoch in range(newest)
        for sequence in range(epochs[stream][epoch])
    }
    missing = {each[:3] for each in expected - counted.keys()} | (whole - present)
    occurrences = Counter((each.stream, each.epoch, each.sequence) for each in counted.elements())
    return AuditResult(len(missing), sum(count - 1 for count in occurrences.values()))
