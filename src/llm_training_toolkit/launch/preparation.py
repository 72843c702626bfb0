"""Preparing the data of a run before ranks exist: the tokenizer, tokens and packing of as many epochs as it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from llm_training_toolkit import families
from llm_training_toolkit.config import Config
from llm_training_toolkit.console import Console
from llm_training_toolkit.data.markers import Markers
from llm_training_toolkit.data.prepare import Prepared, Progress, is_prepared, prepare
from llm_training_toolkit.data.receipt import Receipt
from llm_training_toolkit.data.shards import Done, Job, Runner, directory_of, in_this_process
from llm_training_toolkit.data.survey import Shard, Survey, verify
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.launch.environment import is_local, prepare_environment
from llm_training_toolkit.plan import DataFacts, StreamFacts, make_plan


def markers_of(config: Config) -> Markers:
    """The special tokens of the run's family, as the data layer takes them."""
    return Markers.of(families.find(config.model.name).family)


def runner_of(config: Config, console: Console) -> Runner:
    """What renders a run's documents: the cluster the run is for, where there is one and the work is worth it."""

    def run(job: Job, shards: Sequence[Shard], done: Done) -> None:
        left = [shard for shard in shards if not directory_of(job, shard).is_dir()]
        done(sum(shard.stop - shard.first for shard in set(shards) - set(left)))
        if len(left) < 2 or config.cluster.workers == 0 or is_local():
            in_this_process(job, left, done)
            return
        prepare_environment()
        from llm_training_toolkit.launch.ray_prepare import on_cluster

        on_cluster(job, left, done, console)

    return run


def prepare_run(
    config: Config,
    progress: Progress,
    step: int = 0,
    sequences: int = 0,
    *,
    until: int | None = None,
    runner: Runner = in_this_process,
) -> Prepared:
    """Prepare the first epoch, then as many more as the run needs from `step`, with `sequences` seen, to its end.

    With `until`, as many as the steps up to this one need, and what lies prepared already. A run over epochs always
    gets all: its schedule depends on how many steps they make.
    """
    make = partial(prepare, config, markers_of(config), progress=progress, runner=runner)
    epochs = [config.train.epochs or 1] * (len(config.data.weights) or 1)
    prepared = make(epochs=epochs)
    if not sum(source.loss_tokens for source in prepared.receipt.sources):
        raise DataError(
            "data.sources: no token bears loss, so nothing would be learnt. Look at the sources' loss, and at switches "
            "within the records: ltt show-batch shows them in colour"
        )
    while any(more := _more_epochs(config, facts_of(prepared.receipt, step, sequences), epochs, until)):
        epochs = [count + one for count, one in zip(epochs, more, strict=True)]
        prepared = make(epochs=epochs)
    return prepared


def _more_epochs(config: Config, facts: DataFacts, epochs: list[int], until: int | None) -> list[int]:
    """Epochs to add: those that are needed, or else the next ones where they lie prepared already."""
    if any(needed := missing_epochs(config, facts, until)):
        return needed
    following = [min(count, 1) for count in missing_epochs(config, facts)]
    wanted = [count + one for count, one in zip(epochs, following, strict=True)]
    found = any(following) and is_prepared(config, markers_of(config), wanted)
    return following if found else [0] * len(epochs)


def verify_content(config: Config, prepared: Prepared, progress: Progress) -> None:
    """Compare the documents with what was prepared from them, by content. Raises DataError for the first other one."""
    survey = Survey.read(prepared.directory / "documents")
    total = len(survey.sources)
    verify(config.data, survey, lambda done: progress("comparing", done, total))


def facts_of(receipt: Receipt, step: int = 0, sequences: int = 0) -> DataFacts:
    """What the plan needs to know of the data, and of how far the run has come in it."""
    streams = tuple(StreamFacts(stream.sequences, stream.share) for stream in receipt.streams)
    return DataFacts(streams, receipt.vocab_size, step, sequences)


def covers(config: Config, facts: DataFacts) -> bool:
    """Whether the prepared epochs hold every sequence the run still needs."""
    return not any(missing_epochs(config, facts))


def missing_epochs(config: Config, facts: DataFacts, until: int | None = None) -> list[int]:
    """Epochs of each stream to add at least, reckoned from the size of its largest prepared one."""
    if config.train.epochs is not None:
        return [max(config.train.epochs - len(facts.streams[0].sequences_per_epoch), 0)]
    plan = make_plan(config, facts)
    assert plan.steps is not None
    needed = facts.needed(plan.steps if until is None else min(until, plan.steps), plan.global_batch)
    missing = [count - sum(stream.sequences_per_epoch) for stream, count in zip(facts.streams, needed, strict=True)]
    return [
        max(1, count // max(stream.sequences_per_epoch)) if count > 0 else 0
        for stream, count in zip(facts.streams, missing, strict=True)
    ]


def receipt_json(receipt: Receipt) -> dict[str, Any]:
    """The contract of `ltt prepare --json`."""
    return {
        "sources": [asdict(source) for source in receipt.sources],
        "sequences": receipt.sequences,
        "padding": receipt.padding,
        "tokens_lost": receipt.tokens_lost,
        "eval_sequences": receipt.eval_sequences,
        "tokenizer": receipt.tokenizer_path,
    }


def receipt_lines(receipt: Receipt) -> list[str]:
    """The receipt in words: what became of every source."""
    rows = []
    for source in receipt.sources:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in source.dropped.items()) or "none"
        rows.append(
            f"{source.path}: {source.documents:,} documents ({source.held_out:,} held out), dropped: {dropped}; "
            f"{source.tokens:,} tokens, {source.loss_tokens:,} with loss, longest document {source.longest:,}"
        )
    epochs = " + ".join(f"{len(stream.epochs)}" for stream in receipt.streams)
    rows.append(
        f"{receipt.sequences:,} sequences of {receipt.sequence_length:,} tokens in {epochs} epochs, "
        f"{receipt.padding:.2%} padding, {receipt.tokens_lost} tokens lost"
    )
    return rows
