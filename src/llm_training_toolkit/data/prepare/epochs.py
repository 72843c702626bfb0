"""Preparing the data of a run before ranks exist: the tokenizer, tokens and packing of as many epochs as it needs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from llm_training_toolkit import families
from llm_training_toolkit.config import Config
from llm_training_toolkit.data.prepare.builder import Preparation, Prepared, Progress
from llm_training_toolkit.data.prepare.dataset_info import Receipt
from llm_training_toolkit.data.prepare.shards import in_this_process
from llm_training_toolkit.data.tokenizer import Markers, open_tokenizer
from llm_training_toolkit.errors import DataError, PlanError
from llm_training_toolkit.plan import DataFacts, StreamFacts
from llm_training_toolkit.plan.check import vocabulary_problems
from llm_training_toolkit.plan.horizon import missing_epochs
from llm_training_toolkit.runs.directory import RunDirectory, write_atomically
from llm_training_toolkit.runs.storage import storage_of


def write_preparation_state(run: RunDirectory, state: str, why: str = "") -> None:
    write_atomically(run.preparation, json.dumps({"state": state, "why": why}))


def read_preparation_state(run: RunDirectory) -> tuple[str, str]:
    if not run.preparation.exists():
        return "done", ""
    record = json.loads(run.preparation.read_text(encoding="utf-8"))
    return str(record["state"]), str(record["why"])


def newest_receipt(run: RunDirectory, known: Receipt) -> Receipt:
    """The receipt as it is now, if it will ever be another than the known one. Raises DataError when it will not."""
    storage_of(run.path).look(run.receipt.parent)
    state, why = read_preparation_state(run)  # before the receipt: what is done has been written
    receipt = Receipt.from_json(run.receipt.read_text(encoding="utf-8"))
    if receipt == known and state == "failed":
        raise DataError(f"later epochs could not be prepared: {why}")
    if receipt == known and state == "done":
        raise DataError("more epochs are needed than were prepared: give the same command again, which prepares them")
    return receipt


def markers_of(config: Config) -> Markers:
    """The special tokens of the run's family, as the data layer takes them."""
    return Markers.of(families.find(config.model.name).family)


def prepare_run(config: Config, progress: Progress) -> Prepared:
    """Prepare all that a run which has not begun needs, in this process."""
    return prepare_epochs(Preparation(config, markers_of(config), progress, in_this_process), config)


def prepare_epochs(
    work: Preparation, config: Config, step: int = 0, sequences: int = 0, *, until: int | None = None
) -> Prepared:
    """Prepare the epochs that the run needs from `step`, with `sequences` seen, to its end.

    With `until`, of what is rendered anew for every epoch only as much as the steps up to this one need, and what lies
    prepared already. A run over epochs always gets all: its schedule depends on how many steps they make.
    """
    _refuse_larger_tokenizer(work, config)
    epochs = [config.train.epochs or 1] * len(work.streams)
    prepared = _useful(work.prepare(epochs))
    while any(more := _more_epochs(work, config, facts_of(prepared.receipt, step, sequences), until)):
        epochs = [count + one for count, one in zip(epochs, more, strict=True)]
        prepared = work.prepare(epochs)
    return prepared


def _refuse_larger_tokenizer(work: Preparation, config: Config) -> None:
    """Raise PlanError for a tokenizer whose ids the embedding has no rows for, before any document is read."""
    if config.tokenizer.path is None or work.is_rendered:
        return
    entries = open_tokenizer(config.tokenizer.path).vocab_size
    for problem in vocabulary_problems(config, entries, families.hf_config(config)):
        raise PlanError(str(problem))


def _useful(prepared: Prepared) -> Prepared:
    if not sum(source.loss_tokens for source in prepared.receipt.sources):
        raise DataError(
            "data.sources: no token bears loss, so nothing would be learnt. Look at the sources' loss, and at switches "
            "within the records: ltt show-batch shows them in colour"
        )
    return prepared


def _more_epochs(work: Preparation, config: Config, facts: DataFacts, until: int | None) -> list[int]:
    """Epochs of each stream to add."""
    at_the_end, now = missing_epochs(config, facts), missing_epochs(config, facts, until)
    there = [len(stream.sequences_per_epoch) for stream in facts.streams]
    found = [count - known for count, known in zip(work.found(), there, strict=True)]
    return [
        max(needed, min(more, missing)) if stream.is_drawn else missing
        for stream, needed, more, missing in zip(work.streams, now, found, at_the_end, strict=True)
    ]


def facts_of(receipt: Receipt, step: int = 0, sequences: int = 0) -> DataFacts:
    """What the plan needs to know of the data, and of how far the run has come in it."""
    streams = tuple(StreamFacts(stream.sequences, stream.share) for stream in receipt.streams)
    return DataFacts(streams, receipt.vocab_size, step, sequences)


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
        too_long = f" ({source.truncated:.2%} of the tokens left out as too long)" if source.truncated else ""
        rows += [
            f"{source.path}: {source.documents:,} documents ({source.held_out:,} held out), "
            f"dropped: {dropped}{too_long}",
            f"  {source.tokens:,} tokens, {source.loss_tokens:,} with loss; "
            f"the longest document has {source.longest:,}: {source.longest_document}",
        ]
    epochs = " + ".join(f"{len(stream.epochs)}" for stream in receipt.streams)
    rows.append(
        f"{receipt.sequences:,} sequences of {receipt.sequence_length:,} tokens in {epochs} "
        f"{'epoch' if epochs == '1' else 'epochs'}, "
        f"{receipt.padding:.2%} padding, {receipt.tokens_lost} tokens lost"
    )
    return rows
