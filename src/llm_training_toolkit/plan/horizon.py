"""Horizon of a run: the epochs of each stream that its steps need."""

from __future__ import annotations

from llm_training_toolkit.config import Config
from llm_training_toolkit.plan import DataFacts, make_plan


def is_prepared(config: Config, facts: DataFacts) -> bool:
    """Return whether the prepared epochs hold every sequence that the run still needs."""
    return not any(missing_epochs(config, facts))


def missing_epochs(config: Config, facts: DataFacts, until: int | None = None) -> list[int]:
    """Return the minimum number of epochs to add per stream, by the size of its largest prepared epoch."""
    if config.train.epochs is not None:
        return [max(config.train.epochs - len(facts.streams[0].sequences_per_epoch), 0)]
    plan = make_plan(config, facts)
    assert plan.steps is not None
    needed = facts.count_needed_sequences(plan.steps if until is None else min(until, plan.steps), plan.global_batch)
    missing = [count - sum(stream.sequences_per_epoch) for stream, count in zip(facts.streams, needed, strict=True)]
    return [
        max(1, count // max(stream.sequences_per_epoch)) if count > 0 else 0
        for stream, count in zip(facts.streams, missing, strict=True)
    ]
