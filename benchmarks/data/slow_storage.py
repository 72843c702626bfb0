"""Wait for the rows of a step on storage that takes 200 ms longer for each step, as a share of the step.

Blocks of six steps take turns within one run, so that a machine that slows down slows all of them: plain storage, slow
storage, and slow storage whose rows are read between steps instead of beside the step before.

    python benchmarks/data/slow_storage.py
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

from llm_training_toolkit.cli.app import main as ltt
from llm_training_toolkit.data.collate import MicroBatch
from llm_training_toolkit.data.dataloader import DataLoader
from llm_training_toolkit.data.dataset import PackedDataset

KINDS = ("plain", "slow, read ahead", "slow, read between steps")
DELAY = 0.2  # seconds
BLOCK = 6  # steps; the first of each is left out, because it was read in the block before
ROUNDS = 4
AIM = 0.02
CONFIG = {
    "model": {
        "name": "qwen3-0.6b",
        "config_overrides": {
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
    },
    "tokenizer": {"train": {"vocab_size": 4096}},
    "data": {
        "sequence_length": 256,
        "sources": [{"path": "python:stdlib", "format": "code"}],
        "eval": {"fraction": 0.0},
    },
    "train": {
        "steps": len(KINDS) * BLOCK * ROUNDS,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "precision": "fp32",
    },
    "checkpoint": {"interval": 1_000_000},
    "failures": {"on_loss_spike": "ignore"},
    "export": {"at_end": False},
    "cluster": {"workers": 0},
}


def get_kind(step: int) -> str:
    """Storage of a step, from 0."""
    return KINDS[step // BLOCK % len(KINDS)]


def train(directory: Path) -> list[dict[str, float]]:
    """Metrics of every step of a run on storage of changing speed."""
    get_micro_batches, prefetch = PackedDataset.get_micro_batches, DataLoader.prefetch

    def read(dataset: PackedDataset, step: int, positions: range, micro_batch: int) -> list[MicroBatch]:
        if get_kind(step) != KINDS[0]:
            time.sleep(DELAY)
        return get_micro_batches(dataset, step, positions, micro_batch)

    def read_ahead(dataloader: DataLoader, step: int, positions: range, micro_batch: int) -> None:
        if get_kind(step) != KINDS[2]:
            prefetch(dataloader, step, positions, micro_batch)

    config = CONFIG | {"run": {"name": "slow", "dir": str(directory)}}
    path = directory / "slow.yaml"
    path.write_text(json.dumps(config))
    terminal = os.dup(1)
    with (
        mock.patch.object(PackedDataset, "get_micro_batches", read),
        mock.patch.object(DataLoader, "prefetch", read_ahead),
        mock.patch.object(sys, "argv", ["ltt", "train", str(path), "--json"]),
    ):
        try:
            ltt()
        except SystemExit as end:
            if end.code:
                raise
    os.dup2(terminal, 1)  # what a run prints goes to its log
    rows = [json.loads(line) for line in (directory / "slow" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "perf/step_seconds" in row]


def main() -> None:
    """Train, and print the median step and its wait for rows, by kind."""
    with tempfile.TemporaryDirectory() as name:
        rows = train(Path(name))
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for step, row in enumerate(rows):
        if step % BLOCK and step > BLOCK:  # the first block warms up
            found[get_kind(step)].append((row["perf/step_seconds"], row["perf/data_seconds"]))
    print(f"\nmedians; aim: read ahead, a wait of at most {AIM:.0%} of a step\n")
    for kind in KINDS:
        step, wait = (statistics.median(values) for values in zip(*found[kind], strict=True))
        print(f"{kind}: step {1e3 * step:,.0f} ms, of that its wait for rows {1e3 * wait:,.1f} ms ({wait / step:.2%})")


if __name__ == "__main__":
    main()
