"""Results of a run as tests compare them: rows of its metrics, losses, state of its newest checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm_training_toolkit.checkpoint import find_latest_checkpoint
from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.sample_log import read_sample_log
from llm_training_toolkit.data.tokenizer import open_tokenizer
from llm_training_toolkit.runs.attempts import find_last_attempt
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.json_lines import read_newest_rows


def read_rows(run: RunDirectory) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in run.metrics_path.read_text().splitlines()]


def read_training_rows(run: RunDirectory) -> dict[int, dict[str, Any]]:
    """The row of each training step; the last attempt of a step counts."""
    return {row["step"]: row for row in read_rows(run) if "train/loss" in row}


def read_losses(run: RunDirectory) -> dict[int, float]:
    """Training loss by step; the last attempt of a step counts."""
    return {step: row["train/loss"] for step, row in read_training_rows(run).items()}


def list_losses(run: RunDirectory) -> list[float]:
    """Training losses in the order written, repeated steps included."""
    return [row["train/loss"] for row in read_rows(run) if "train/loss" in row]


def read_values(run: RunDirectory, name: str) -> dict[int, float]:
    """A metric by step."""
    return {row["step"]: row[name] for row in read_newest_rows(run.metrics_path) if name in row}


def read_fetched(run: RunDirectory) -> list[tuple[int, Any]]:
    """Every sequence that was fetched, with its step."""
    attempts = range(1, find_last_attempt(run) + 1)
    logged = (row for attempt in attempts for row in read_sample_log(run.sample_log_dir, attempt))
    return sorted((step, sequence) for step, sequences in logged for sequence in sequences)


def newest_checkpoint(run: RunDirectory) -> Path:
    """The newest complete checkpoint."""
    directory = find_latest_checkpoint(run.checkpoints_dir)
    assert directory is not None
    return directory


def assert_same_state(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Every weight and moment is the same, bit for bit."""
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert np.array_equal(found[name], values), name


def largest_gradient_error(found: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """Largest error of a gradient relative to the largest gradient."""
    assert found.keys() == reference.keys()
    largest = max(float(np.abs(values).max()) for values in reference.values())
    return max(float(np.abs(found[name] - reference[name]).max()) for name in reference) / largest


def decode_sequence(dataset: PackedDataset, step: int, position: int) -> str:
    """Decode a training sequence into text, with special tokens and without padding."""
    tokens = [example.tokens for example in dataset.read_sequence_examples(step, position)]
    return open_tokenizer(dataset.dataset_info.tokenizer_path).decode(np.concatenate(tokens))
