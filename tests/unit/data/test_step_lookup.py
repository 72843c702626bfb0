"""Lookup of a step: its work is that of a rank's own rows, however many sequences the global batch has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo, EpochInfo, StreamInfo
from llm_training_toolkit.data.prepare.packing import PackingPlan

SEQUENCES = 40_000


def write_index(folder: Path, shares: list[int]) -> DatasetInfo:
    """An index of sequences of one document each, in a stream for each share."""
    for name in ("plan", "tokens", "tokenizer"):
        (folder / name).mkdir()
    targets = np.random.default_rng(0).integers(1, 4096, SEQUENCES)
    PackingPlan(np.arange(SEQUENCES), np.arange(SEQUENCES + 1), targets).write(folder / "plan")
    epoch = EpochInfo("tokens", "plan", SEQUENCES, 0, 0)
    return DatasetInfo(
        fingerprint="",
        directory=str(folder),
        tokenizer_path=str(folder / "tokenizer"),
        vocab_size=1,
        pad_id=0,
        sequence_length=4096,
        seed=0,
        sources=(),
        streams=tuple(StreamInfo(share, (epoch,)) for share in shares),
        held_out="tokens",
        held_out_plan="plan",
        eval_sequences=0,
        padding=0.0,
        tokens_lost=0,
    )


def count_calls(work: Callable[[], object]) -> int:
    """Calls of Python and C functions that `work` makes."""
    calls = [0]

    def count(_frame: Any, event: str, _argument: Any) -> None:
        calls[0] += event in {"call", "c_call"}

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls[0]


@pytest.mark.parametrize("shares", [[1], [700_000, 300_000, 48_576]])
def test_a_step_of_8192_sequences_is_looked_up_in_the_work_of_one_of_64(tmp_path: Path, shares: list[int]) -> None:
    dataset_info = write_index(tmp_path, shares)
    counts = {}
    for global_batch in (64, 8192):
        dataset = PackedDataset(dataset_info, global_batch=global_batch)
        dataset.count_loss_tokens(1)  # opens the index

        def look_up(dataset: PackedDataset = dataset, middle: int = global_batch // 2) -> None:
            dataset.get_sequences_at(1, range(middle, middle + 2))
            dataset.count_loss_tokens(1)

        counts[global_batch] = count_calls(look_up)
    # How near a stream's due sequence lies to a bound differs from place to place, by a few calls.
    assert counts[8192] <= 1.1 * counts[64] < 1000
