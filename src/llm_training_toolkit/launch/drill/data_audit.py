"""Which sequences went into the final weights of a run, and whether each did once. From its files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from llm_training_toolkit.data.sample_log import Fetched, read_ledger
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs.attempts import attempt_record
from llm_training_toolkit.runs.directory import RunDirectory, checkpoint_place


class Stretch(NamedTuple):
    """Steps that one attempt added to the lineage."""

    attempt: int
    after: int
    until: int
    """The last of its steps that others went on from."""


class Count(NamedTuple):
    """Sequences that should have been fetched once and were not."""

    missing: int
    doubled: int


def stretches(run: RunDirectory, checkpoint: str) -> list[Stretch]:
    """The attempts that led to a checkpoint, the first one first. Raises CheckpointError where one is unknown."""
    found: list[Stretch] = []
    name: str | None = checkpoint
    while name is not None:
        place = checkpoint_place(run.checkpoints / name)
        record = attempt_record(run, place[1]) if place else {}
        if place is None or "resumed" not in record:
            raise CheckpointError(f"{run.path}: nothing is known of the attempt that wrote {name}")
        name = record["resumed"]
        before = checkpoint_place(run.checkpoints / name) if name else None
        found.append(Stretch(place[1], before[0] if before else 0, place[0]))
    return found[::-1]


def fetched_along(run: RunDirectory, lineage: Iterable[Stretch]) -> list[Fetched]:
    """What all ranks fetched in the steps of the lineage."""
    return [
        sequence
        for stretch in lineage
        for step, sequences in read_ledger(run.ledger, stretch.attempt)
        if stretch.after < step <= stretch.until
        for sequence in sequences
    ]


def compare(found: Sequence[Fetched], wanted: Sequence[Fetched], epochs: Sequence[Sequence[int]]) -> Count:
    """Sequences missing or doubled in `found`, beside `wanted`, what the undisturbed run fetched.

    `epochs`: how many sequences each epoch of each stream has. An epoch that a later one follows has to be whole,
    whatever the undisturbed run did. A sequence of other tokens is another sequence.
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
    places = Counter((each.stream, each.epoch, each.sequence) for each in counted.elements())
    return Count(len(missing), sum(count - 1 for count in places.values()))
