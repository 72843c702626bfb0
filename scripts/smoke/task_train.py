"""A run through the toolkit, without Ray or with it: what `ltt train` does, from a configuration in plain data."""

from __future__ import annotations

import json
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import torch

from llm_training_toolkit.checkpoint import CheckpointReader, find_latest_checkpoint
from llm_training_toolkit.config import Config, parse_config
from llm_training_toolkit.data.prepare.epochs import build_data_facts, prepare_run_data
from llm_training_toolkit.distributed.events import Event, StepEvent
from llm_training_toolkit.launch import backend
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.plan import check_plan, make_plan
from llm_training_toolkit.runs.attempts import find_last_attempt, read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory, lock_run_directory
from llm_training_toolkit.setup.run_files import write_run_files
from llm_training_toolkit.worker.spec import get_torchrun_world_size, is_first_rank
from smoke.task import Values, run

_SETTLED = 2
"""The step after which memory is measured anew: what the start needed, and what ran out of memory, is over."""


class Watch(Console):
    """The screen of a run that stops itself, and measures the memory of its steps alone."""

    def __init__(self, stop_after: int | None) -> None:
        super().__init__()
        self._stop_after = stop_after

    def show_event(self, event: Event) -> None:
        """Look for the steps to act on; a stop asked for in one step takes place after the next."""
        super().show_event(event)
        if not isinstance(event, StepEvent):
            return
        if event.step == _SETTLED and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.reset_peak_memory_stats()
        if self._stop_after is not None and event.step == self._stop_after - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def train(arguments: Values) -> Values:
    """Train the run of `config`, to its end or to a stop after `stop_after` steps; the same again resumes.

    `discard` deletes its checkpoints when they have been measured.
    """
    config = parse_config(arguments["config"], "gpu smoke")
    place = RunDirectory(Path(config.run.dir) / config.run.name)
    watch = Watch(arguments.get("stop_after"))
    if not is_first_rank():
        return backend.launch_training(place, config, watch)
    with lock_run_directory(place):
        _prepare(place, config)
        outcome = backend.launch_training(place, config, watch)
    watch.close()
    found = outcome | _measured(place, arguments["config"])
    if arguments.get("discard"):
        shutil.rmtree(place.checkpoints_dir)
    return found


def _prepare(place: RunDirectory, config: Config) -> None:
    """Write what the workers read."""
    dataset_info = prepare_run_data(config, lambda _stage, _done, _total: None).dataset_info
    ranks = get_torchrun_world_size() if config.cluster.workers == 0 else None
    write_run_files(
        place, config, check_plan(make_plan(config, ranks).with_data(build_data_facts(dataset_info))), dataset_info
    )


def _measured(place: RunDirectory, config: Values) -> Values:
    """The numbers a run left in its directory."""
    rows = [json.loads(line) for line in place.metrics_path.read_text().splitlines()]
    steps = {row["step"]: row for row in rows if "train/loss" in row}
    attempt = read_attempt_record(place, find_last_attempt(place))
    micro_batch = attempt["micro_batch"]
    settled = parse_config(
        config
        | {"train": config["train"] | {"micro_batch_size": micro_batch}}
        | {"model": config["model"] | {"activation_checkpointing": attempt["activation_checkpointing"]}},
        "gpu smoke",
    )
    plan = make_plan(settled, ranks=attempt["workers"])
    return {
        "losses": [row["train/loss"] for _, row in sorted(steps.items())],
        # From line to line: the whole loop counts, the writing of metrics too.
        "seconds": [after["time"] - before["time"] for before, after in pairwise(steps.values())],
        "tokens_per_step": plan.tokens_per_step,
        "start_gb": steps[min(steps)]["perf/memory_gb"],
        "peak_gb": max(row["perf/memory_gb"] for step, row in steps.items() if step > _SETTLED),
        "plan_gb": dict(plan.memory_gb_per_device),
        "parameters": plan.parameters,
        "flops_per_token": plan.flops_per_token,
        "micro_batch": micro_batch,
        "attempts": find_last_attempt(place),
        "checkpoint": _checkpoint(place, rows),
    }


def _checkpoint(place: RunDirectory, rows: list[Values]) -> Values:
    directory = find_latest_checkpoint(place.checkpoints_dir)
    assert directory is not None, "a run that ends or stops leaves a checkpoint"
    files = CheckpointReader(directory).manifest.files
    seconds = [row["perf/checkpoint_seconds"] for row in rows if "perf/checkpoint_seconds" in row]
    return {
        "name": directory.name,
        "bytes": sum(file.size for file in files),
        "sha256": [file.sha256 for file in files],
        "seconds": seconds[-1],
    }


if __name__ == "__main__":
    run(train)
