"""Horizon of a run: everything in its plan that depends on the prepared data. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.uri import redact_uri
from llm_training_toolkit.plan import lr_schedule, mixture
from llm_training_toolkit.plan.checks import horizon_check
from llm_training_toolkit.plan.problem import Problem


@dataclass(frozen=True)
class StreamFacts:
    """Stream of sequences: all sources together, or one source if sources have weights."""

    sequences_per_part: tuple[int, ...]
    """Packed training sequences of each prepared part, in order: an epoch, or a partition of one."""
    share: int = 1
    """Share of the mixture, relative to the other streams."""
    partitions: int = 1
    """Parts of an epoch."""

    def compute_epochs(self, sequences: int) -> float | None:
        """Return `sequences` in passes over the stream, by the mean of its prepared parts, or None if empty."""
        prepared = sum(self.sequences_per_part)
        return sequences * len(self.sequences_per_part) / (prepared * self.partitions) if prepared else None


@dataclass(frozen=True)
class DataFacts:
    """Results of data preparation that a plan needs."""

    streams: tuple[StreamFacts, ...]
    """One stream, or one per source, in their order, if sources have weights."""
    vocab_size: int | None = None
    """Entries of the tokenizer, or None if unknown."""
    steps_done: int = 0
    """Steps of the run's newest checkpoint."""
    sequences_done: int = 0
    """Sequences seen in those steps: fewer than steps x global batch if an epoch ended in a short step."""
    estimated: bool = False
    """True if nothing is prepared, and the sequences are estimated by the bytes of the files."""

    def count_needed_sequences(self, steps: int, global_batch: int) -> tuple[int, ...]:
        """Return the number of sequences of each stream that the run has seen after `steps` steps."""
        total = self.sequences_done + (steps - self.steps_done) * global_batch
        return mixture.count_per_stream([stream.share for stream in self.streams], total)


@dataclass(frozen=True)
class MixtureSource:
    """Source with a weight: its share of the tokens, and its epochs in the run (None = not known yet)."""

    path: str
    share: float
    epochs: float | None


@dataclass(frozen=True)
class Horizon:
    """Length of a run. It depends on the prepared data where `train.tokens` or `train.epochs` gives it."""

    steps: int | None
    """Optimizer steps in all, or None if they depend on unprepared data."""
    steps_estimated: bool
    """True if some or all epochs are not prepared."""
    epochs: float | None
    """Passes over the data by the mean of the prepared parts, or None if unknown or if sources have weights."""
    mixture: tuple[MixtureSource, ...]
    """Sources with weights; empty without weights."""
    warmup_steps: int | None
    """Steps of the warm-up, or None for a share of an unknown length."""
    decay_steps: int | None
    """Steps of the final decay, or None for a share of an unknown length."""
    problems: tuple[Problem, ...]
    """Problems with the length and with the tokenizer."""

    def to_json(self) -> dict[str, Any]:
        """Return the values that `ltt plan --json` shows; the problems stand among those of the plan."""
        values = asdict(self)
        del values["problems"]
        return values | {"mixture": [asdict(source) for source in self.mixture]}


def compute_horizon(config: Config, data_facts: DataFacts | None, embedding_rows: int) -> Horizon:
    """Return the horizon as known from the configuration and the prepared data.

    `embedding_rows` are those of the model, which the tokenizer must fit into.
    """
    steps, estimated = _compute_run_steps(config, data_facts)
    warmup, decay = lr_schedule.compute_warmup_steps(config, steps), lr_schedule.compute_decay_steps(config, steps)
    vocab_size = None if data_facts is None else data_facts.vocab_size
    return Horizon(
        steps,
        estimated,
        _compute_epochs(config, steps, data_facts),
        _build_mixture(config, steps, data_facts),
        warmup,
        decay,
        problems=(
            *horizon_check.find_length_problems(steps, warmup, decay),
            *horizon_check.find_profile_problems(config.profile, steps),
            *horizon_check.find_vocabulary_problems(config, vocab_size, embedding_rows),
        ),
    )


def is_prepared(config: Config, data_facts: DataFacts) -> bool:
    """Return whether the prepared parts hold every sequence that the run still needs."""
    return not any(count_missing_parts(config, data_facts))


def count_missing_parts(config: Config, data_facts: DataFacts, until: int | None = None) -> list[int]:
    """Return the minimum number of parts to add per stream, by the size of its largest prepared part."""
    if config.train.epochs is not None:
        stream = data_facts.streams[0]
        return [max(config.train.epochs * stream.partitions - len(stream.sequences_per_part), 0)]
    needed = _count_needed_sequences(config, data_facts, until)
    missing = [count - sum(stream.sequences_per_part) for stream, count in zip(data_facts.streams, needed, strict=True)]
    return [
        max(1, count // max(stream.sequences_per_part)) if count > 0 else 0
        for stream, count in zip(data_facts.streams, missing, strict=True)
    ]


def find_shortest_stream(config: Config, data_facts: DataFacts) -> int:
    """Return the stream that runs out first. For runs over tokens or steps."""
    needed = _count_needed_sequences(config, data_facts)
    covered = [
        sum(stream.sequences_per_part) / count if count else 1.0
        for stream, count in zip(data_facts.streams, needed, strict=True)
    ]
    return covered.index(min(covered))


def _count_needed_sequences(config: Config, data_facts: DataFacts, until: int | None = None) -> tuple[int, ...]:
    steps, _ = _compute_run_steps(config, data_facts)
    assert steps is not None, "runs over epochs are prepared completely at the start"
    return data_facts.count_needed_sequences(
        steps if until is None else min(until, steps), config.train.global_batch_size
    )


def _compute_run_steps(config: Config, data_facts: DataFacts | None) -> tuple[int | None, bool]:
    """Return the length of the run in steps, and whether it is inexact.

    Tokens and epochs are converted to sequences. What the completed steps have left of them is divided by the
    global batch and rounded up, as the stream is continuous. A part that is still missing counts as the mean of those
    that are prepared. If none is, the length is None.
    """
    train = config.train
    if train.steps is not None:
        return train.steps, False
    done, seen = (data_facts.steps_done, data_facts.sequences_done) if data_facts else (0, 0)
    if train.tokens is not None:
        return _compute_total_steps(
            -(-train.tokens // config.data.sequence_length), train.global_batch_size, done, seen
        ), False
    assert train.epochs is not None  # the schema requires exactly one length
    if data_facts is None or not data_facts.streams[0].sequences_per_part:
        return None, True
    parts = train.epochs * data_facts.streams[0].partitions
    known = data_facts.streams[0].sequences_per_part[:parts]
    missing = parts - len(known)
    sequences = sum(known) + round(missing * sum(known) / len(known))
    return _compute_total_steps(sequences, train.global_batch_size, done, seen), missing > 0 or data_facts.estimated


def _compute_total_steps(sequences: int, global_batch: int, done: int, seen: int) -> int:
    """Return the steps after which a run has seen `sequences`, if `done` steps have seen `seen` of them."""
    return done + -(-max(sequences - seen, 0) // global_batch)


def _compute_epochs(config: Config, steps: int | None, data_facts: DataFacts | None) -> float | None:
    """Return the passes over the data, by the mean length of the prepared epochs."""
    if config.train.epochs is not None:
        return float(config.train.epochs)
    if steps is None or data_facts is None or config.data.source_weights:
        return None
    return data_facts.streams[0].compute_epochs(steps * config.train.global_batch_size)


def _build_mixture(config: Config, steps: int | None, data_facts: DataFacts | None) -> tuple[MixtureSource, ...]:
    """Return the share and the epochs of each source with a weight."""
    weights = config.data.source_weights
    if not weights:
        return ()
    epochs: list[float | None] = [None] * len(weights)
    if steps is not None and data_facts is not None:
        seen = mixture.count_per_stream(
            [stream.share for stream in data_facts.streams], steps * config.train.global_batch_size
        )
        epochs = [stream.compute_epochs(count) for stream, count in zip(data_facts.streams, seen, strict=True)]
    sources = zip(config.data.sources, weights, epochs, strict=True)
    return tuple(
        MixtureSource(redact_uri(source.path), weight / sum(weights), passes) for source, weight, passes in sources
    )
