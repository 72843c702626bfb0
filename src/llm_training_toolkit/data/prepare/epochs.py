"""Preparation of a run's data before ranks exist: tokenizer, tokens and packing of all epochs it needs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from llm_training_toolkit import families
from llm_training_toolkit.config import Config
from llm_training_toolkit.data.prepare.builder import DatasetBuilder
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo, PreparedDataset
from llm_training_toolkit.data.prepare.dataset_tokenizer import StageProgressCallback
from llm_training_toolkit.data.prepare.shards import render_in_process
from llm_training_toolkit.data.tokenizer import TokenizationSpec, open_tokenizer, resolve_tokenizer_directory
from llm_training_toolkit.errors import DataError, PlanError
from llm_training_toolkit.plan import DataFacts, StreamFacts
from llm_training_toolkit.plan.checks.horizon_check import find_vocabulary_problems
from llm_training_toolkit.plan.horizon import count_missing_parts
from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.runs.directory import RunDirectory


def write_preparation_state(run: RunDirectory, state: str, why: str = "") -> None:
    write_atomically(run.preparation_state_path, json.dumps({"state": state, "why": why}))


def read_preparation_state(run: RunDirectory) -> tuple[str, str]:
    if not run.preparation_state_path.exists():
        return "done", ""
    record = json.loads(run.preparation_state_path.read_text(encoding="utf-8"))
    return str(record["state"]), str(record["why"])


def read_latest_dataset_info(run: RunDirectory, known: DatasetInfo) -> DatasetInfo:
    """Read the current DatasetInfo. Raises DataError if it equals `known` and preparation has failed or finished."""
    run.storage.refresh_directory(run.dataset_info_path.parent)
    state, why = read_preparation_state(run)  # read first: the DatasetInfo is written before the state becomes done
    dataset_info = DatasetInfo.from_json(run.dataset_info_path.read_text(encoding="utf-8"))
    if dataset_info == known and state == "failed":
        raise DataError(f"later data could not be prepared: {why}")
    if dataset_info == known and state == "done":
        raise DataError("more data is needed than was prepared: give the same command again, which prepares it")
    return dataset_info


def get_tokenization_spec(config: Config) -> TokenizationSpec:
    """Return the TokenizationSpec of the run's model family."""
    return TokenizationSpec.from_family(families.find_run_size(config).family)


def prepare_run_data(config: Config, progress: StageProgressCallback) -> PreparedDataset:
    """Prepare all data that a new run needs, in this process."""
    return prepare_epochs(DatasetBuilder(config, get_tokenization_spec(config), progress, render_in_process), config)


def prepare_epochs(
    work: DatasetBuilder, config: Config, step: int = 0, sequences: int = 0, *, until: int | None = None
) -> PreparedDataset:
    """Prepare the epochs that the run needs from `step`, with `sequences` seen, to its end.

    With `until`, streams that are rendered anew every epoch (`is_drawn`) or have several partitions get only the parts
    needed up to that step, and those already on disk. A run over epochs always gets all: its schedule depends on their
    number of steps.
    """
    _check_tokenizer_fits(work, config)
    parts = [config.train.epochs * work.partitions if config.train.epochs else 1] * len(work.streams)
    prepared = _check_loss_tokens(work.build_parts(parts))
    while any(
        more := _count_missing_parts(work, config, build_data_facts(prepared.dataset_info, step, sequences), until)
    ):
        parts = [len(stream.epochs) + one for stream, one in zip(prepared.dataset_info.streams, more, strict=True)]
        prepared = work.build_parts(parts)
    return prepared


def _check_tokenizer_fits(work: DatasetBuilder, config: Config) -> None:
    """Raise PlanError, before any document is read, if the tokenizer has ids beyond the rows of the embedding."""
    if config.tokenizer.path is None or work.is_rendered:
        return
    directory = resolve_tokenizer_directory(config.tokenizer.path, config.tokenizer.revision)
    entries = open_tokenizer(str(directory)).vocab_size
    for problem in find_vocabulary_problems(config, entries, families.resolve_hf_config(config)["vocab_size"]):
        raise PlanError(str(problem))


def _check_loss_tokens(prepared: PreparedDataset) -> PreparedDataset:
    if not sum(source.loss_tokens for source in prepared.dataset_info.sources):
        raise DataError(
            "data.sources: no token bears loss, so nothing would be learnt. Look at the sources' loss, and at switches "
            "within the records: ltt show-batch shows them in colour"
        )
    return prepared


def _count_missing_parts(work: DatasetBuilder, config: Config, data_facts: DataFacts, until: int | None) -> list[int]:
    """Count the parts to add to each stream."""
    at_the_end, now = count_missing_parts(config, data_facts), count_missing_parts(config, data_facts, until)
    there = [len(stream.sequences_per_part) for stream in data_facts.streams]
    found = [count - known for count, known in zip(work.count_prepared_parts(), there, strict=True)]
    return [
        max(needed, min(more, missing)) if stream.is_drawn or work.partitions > 1 else missing
        for stream, needed, more, missing in zip(work.streams, now, found, at_the_end, strict=True)
    ]


def build_data_facts(dataset_info: DatasetInfo, step: int = 0, sequences: int = 0) -> DataFacts:
    """Build the plan's facts about the data and the run's progress in it."""
    streams = tuple(
        StreamFacts(stream.sequences_per_part, stream.share, stream.partitions) for stream in dataset_info.streams
    )
    return DataFacts(streams, dataset_info.vocab_size, step, sequences)


def build_dataset_info_json(dataset_info: DatasetInfo) -> dict[str, Any]:
    """Return the contract of `ltt prepare --json`."""
    return {
        "sources": [asdict(source) for source in dataset_info.sources],
        "sequences": dataset_info.total_sequences,
        "partitions": dataset_info.streams[0].partitions,
        "padding": dataset_info.padding,
        "tokens_lost": dataset_info.tokens_lost,
        "eval_sequences": dataset_info.eval_sequences,
        "held_out_sequences": dataset_info.held_out_sequences,
        "tokenizer": dataset_info.tokenizer_path,
    }


def format_dataset_info(dataset_info: DatasetInfo) -> list[str]:
    """Format a DatasetInfo as text: the outcome of every source."""
    rows = []
    for source in dataset_info.sources:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in source.dropped.items()) or "none"
        too_long = f" ({source.truncated:.2%} of the tokens left out as too long)" if source.truncated else ""
        if source.cut:
            too_long += f", {source.cut:,} cut because of their size"
        rows += [
            f"{source.path}: {source.documents:,} documents ({source.held_out:,} held out), "
            f"dropped: {dropped}{too_long}",
            f"  {source.tokens:,} tokens, {source.loss_tokens:,} with loss; "
            f"the longest document has {source.longest:,}: {source.longest_document}",
        ]
    if dataset_info.eval_sequences < dataset_info.held_out_sequences:
        rows.append(
            f"{dataset_info.eval_sequences:,} of {dataset_info.held_out_sequences:,} held-out sequences are evaluated "
            "(eval.max_sequences)"
        )
    if dataset_info.fault_report is not None:
        rows.append(f"skipped documents: {dataset_info.fault_report}")
    streams = dataset_info.streams
    parts, partitions = " + ".join(f"{len(stream.epochs)}" for stream in streams), streams[0].partitions
    unit = "epoch" if partitions == 1 else "part"
    rows.append(
        f"{dataset_info.total_sequences:,} sequences of {dataset_info.sequence_length:,} tokens in {parts} "
        f"{unit if parts == '1' else f'{unit}s'}{'' if partitions == 1 else f' ({partitions} in an epoch)'}, "
        f"{dataset_info.padding:.2%} padding, {dataset_info.tokens_lost} tokens lost"
    )
    return rows
