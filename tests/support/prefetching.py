"""A training step and the storage of the next one that wait for each other."""

from __future__ import annotations

from collections import defaultdict
from threading import Event
from typing import Any
from unittest import mock

from llm_training_toolkit.data.collate import MicroBatch
from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.engine import Engine
from rank_tasks import train_run

_PATIENCE = 20.0  # seconds


def train_while_data_waits(run: str, changes: dict[str, Any], steps: int) -> list[int]:
    """Train a run whose storage answers only while the step before computes, and that step only once it has answered.

    Returns the steps, from 0, of which the rows were read in that time: none with a loop that reads between steps.
    """
    computing, read = (defaultdict[int, Event](Event) for _ in range(2))
    met: list[int] = []
    get_micro_batches, forward_backward = PackedDataset.get_micro_batches, Engine.forward_backward

    def read_slowly(dataset: PackedDataset, step: int, positions: range, micro_batch: int) -> list[MicroBatch]:
        if step and computing[step - 1].wait(_PATIENCE):
            met.append(step)
        found = get_micro_batches(dataset, step, positions, micro_batch)
        read[step].set()
        return found

    def compute(engine: Engine, batches: list[MicroBatch], *given: Any) -> float:
        step = batches[0].step
        computing[step].set()
        assert step + 1 == steps or read[step + 1].wait(_PATIENCE), "the next step was not read meanwhile"
        return forward_backward(engine, batches, *given)

    with (
        mock.patch.object(PackedDataset, "get_micro_batches", read_slowly),
        mock.patch.object(Engine, "forward_backward", compute),
    ):
        train_run(run, {**changes, "train": {**changes.get("train", {}), "steps": steps}})
    return met
