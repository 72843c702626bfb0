"""The loop where it does not step: it begins at the end of the data that is prepared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_training_toolkit.checkpoint import RetentionPolicy
from llm_training_toolkit.checkpoint.manager import CheckpointLineage, CheckpointManager
from llm_training_toolkit.checkpoint.run import Run
from llm_training_toolkit.checkpoint.state import TrainState
from llm_training_toolkit.config import EvalTaskConfig, parse_config_json
from llm_training_toolkit.data.dataloader import DataLoader
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.data.prepare.epochs import build_data_facts
from llm_training_toolkit.distributed.context import RunContext, StopRequest
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.evaluation.in_training import InTrainingEvaluator
from llm_training_toolkit.plan import make_plan
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.goodput import GoodputTracker
from llm_training_toolkit.train.components import TrainerComponents
from llm_training_toolkit.train.compute_meter import build_compute_meter
from llm_training_toolkit.train.hooks import run_tasks_if_due
from llm_training_toolkit.train.loop import run_training_loop
from llm_training_toolkit.train.profiler import StepProfiler

FAR = 10_000
"""A step whose data is not prepared."""


def build_components(prepared_run: RunDirectory, run: RunDirectory, stop_request: StopRequest) -> TrainerComponents:
    """A run that resumes from step FAR; nothing of its engine and its metrics is reached."""

    def no_more(_dataset_info: DatasetInfo) -> DatasetInfo:
        raise DataError("later epochs cannot be prepared")

    dataset_info = DatasetInfo.from_json(prepared_run.dataset_info_path.read_text())
    config = parse_config_json(prepared_run.resolved_config_path.read_text())
    plan = make_plan(config).with_data(build_data_facts(dataset_info))
    context = RunContext(0, 1, torch.device("cpu"), stop_request_reader=lambda: stop_request)
    more = no_more if stop_request is StopRequest.NONE else lambda dataset_info: dataset_info
    dataloader = DataLoader(dataset_info, global_batch=plan.global_batch, epochs=None, read_newest_info=more)
    absent: Any = SimpleNamespace(owned_fragments=list)
    evaluator = InTrainingEvaluator(Run(run, config, dataset_info), metrics=absent, context=context)
    lineage = CheckpointLineage(2, "step", 0, 1, "c", "d", {}, {})
    saver = CheckpointManager(run, context, absent, lineage, every_steps=1, every_seconds=None, rule=RetentionPolicy(1))
    origin = TrainState(FAR, FAR, FAR * plan.global_batch)
    schedule = replace(plan.build_lr_schedule(), steps=2 * FAR)
    meter = build_compute_meter(plan, context.device)
    return TrainerComponents(
        plan,
        schedule,
        0,
        context,
        absent,
        dataloader,
        saver,
        absent,
        2,
        GoodputTracker(0.0, {}, 0),
        origin,
        evaluator,
        meter,
        StepProfiler(None, run.path, context),
    )


@pytest.mark.parametrize(("stop_request", "status"), [(StopRequest.DRAIN, "drained"), (StopRequest.STOP, "stopped")])
def test_stop_request_during_first_wait_saves_no_checkpoint(
    prepared_run: RunDirectory, tmp_path: Path, stop_request: StopRequest, status: str
) -> None:
    run = RunDirectory(tmp_path)
    ready = build_components(prepared_run, run, stop_request)
    assert run_training_loop(ready) == (status, ready.initial_state)
    assert not run.checkpoints_dir.exists()


def test_data_that_will_never_be_there_ends_it_in_words(prepared_run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="later epochs cannot be prepared"):
        run_training_loop(build_components(prepared_run, RunDirectory(tmp_path), StopRequest.NONE))


@pytest.mark.parametrize("steps_left", [0, 1])
def test_no_task_runs_after_last_step(prepared_run: RunDirectory, tmp_path: Path, steps_left: int) -> None:
    run = RunDirectory(tmp_path)
    ready = build_components(prepared_run, run, StopRequest.STOP)
    config = parse_config_json(prepared_run.resolved_config_path.read_text())
    tasks = config.eval.model_copy(update={"tasks": (EvalTaskConfig(task="perplexity", interval=1),)})
    trained = Run(
        run,
        config.model_copy(update={"eval": tasks}),
        DatasetInfo.from_json(prepared_run.dataset_info_path.read_text()),
    )
    evaluator = InTrainingEvaluator(trained, metrics=ready.metrics, context=ready.context)
    ready = replace(ready, in_training_tasks=evaluator, lr_schedule=replace(ready.lr_schedule, steps=FAR + steps_left))
    run_tasks_if_due(ready, ready.initial_state)
    assert ready.context.heartbeat.get_snapshot().phase.startswith("carrying out") == bool(steps_left)
