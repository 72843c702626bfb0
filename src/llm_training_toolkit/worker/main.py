"""Main function of a rank: builds the components, resumes and trains; rank 0 exports and samples at the end.

The code is the same for a Ray Train worker, a torchrun rank and a single process: they differ in the RunContext.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from llm_training_toolkit import families
from llm_training_toolkit.checkpoint import CheckpointReader
from llm_training_toolkit.checkpoint.hub_commit import HUB_KEY, HubCommit, find_hub_commit
from llm_training_toolkit.checkpoint.restore import find_latest_valid_checkpoint
from llm_training_toolkit.checkpoint.state import TrainState
from llm_training_toolkit.config import Config
from llm_training_toolkit.data.dataloader import DataLoader
from llm_training_toolkit.data.prepare.epochs import build_data_facts, read_latest_dataset_info
from llm_training_toolkit.data.sample_log import SampleLog
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import CheckpointEvent, EvalEvent, Event, NoteEvent, WarningEvent
from llm_training_toolkit.distributed.flight_recorder import set_flight_record_directory
from llm_training_toolkit.distributed.heartbeat import NO_TIMEOUT
from llm_training_toolkit.evaluation.in_training import InTrainingEvaluator
from llm_training_toolkit.models.layer_compiler import is_compile_error
from llm_training_toolkit.models.memory import is_out_of_memory, is_out_of_shared_memory, set_allocator_options
from llm_training_toolkit.monitoring.logs import RANK_LOGGER, log_to_file, redirect_output
from llm_training_toolkit.monitoring.metrics import Metrics
from llm_training_toolkit.monitoring.trackers import open_trackers
from llm_training_toolkit.plan import Plan, check_plan, make_plan
from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.runs.attempts import (
    begin_attempt,
    end_attempt,
    fail_attempt,
    find_last_attempt,
    find_takeover,
    mark_out_of_memory,
    read_attempt_record,
    update_attempt,
)
from llm_training_toolkit.runs.goodput import GoodputState, GoodputTracker, load_goodput_state
from llm_training_toolkit.setup.hub_weights import ensure_known_size
from llm_training_toolkit.train.components import TrainerComponents
from llm_training_toolkit.train.compute_meter import build_compute_meter
from llm_training_toolkit.train.loop import run_training_loop
from llm_training_toolkit.train.profiler import StepProfiler
from llm_training_toolkit.worker.attention import resolve_attention
from llm_training_toolkit.worker.build import build_run_model
from llm_training_toolkit.worker.checkpoints import build_checkpoint_manager
from llm_training_toolkit.worker.compilation import build_compile_error, build_shared_memory_error, resolve_compilation
from llm_training_toolkit.worker.devices import RankPlacement, check_placement
from llm_training_toolkit.worker.finish import finish_run
from llm_training_toolkit.worker.micro_batch import (
    build_out_of_memory_error,
    check_host_memory,
    describe_memory_load,
    measure_device_memory_gb,
    resolve_memory_settings,
)
from llm_training_toolkit.worker.precision import resolve_precision
from llm_training_toolkit.worker.spec import WorkerSpec


def run_worker(spec: WorkerSpec, context: RunContext) -> dict[str, Any]:
    """Run the rank until the run finishes or stops, and return `{"status", "step"}` on every rank.

    Raises SmallerMicroBatch if memory ran out and the next attempt will use less.
    """
    set_allocator_options(context.device)
    placements = check_placement(spec, context)
    spec = replace(spec, config=families.recall_plan(spec.config, spec.directory.path))
    ensure_known_size(spec.config)
    requested, precision_note = resolve_precision(spec, context)
    requested, attention_note = resolve_attention(requested, context)
    spec, memory_notes = resolve_memory_settings(requested, context)
    check_host_memory(spec.config, context)
    attempt, goodput_tracker = _begin_attempt(spec, context, requested.config, placements)
    log = spec.directory.get_rank_log_path(attempt, context.rank)
    with log_to_file(RANK_LOGGER, log, f"attempt {attempt} rank {context.rank}"):
        RANK_LOGGER.info("started on %s, one of %d ranks", context.device, context.world_size)
        notes = (*precision_note, *attention_note, *memory_notes)
        return _run_attempt(
            spec, _log_events(context), requested.config, attempt=attempt, goodput_tracker=goodput_tracker, notes=notes
        )


def _run_attempt(
    spec: WorkerSpec,
    context: RunContext,
    requested: Config,
    *,
    attempt: int,
    goodput_tracker: GoodputTracker,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Train as one attempt and record its end; `requested` is the configuration before `resolve_memory_settings`."""
    record = read_attempt_record(spec.directory, attempt) if context.is_rank_zero else {}
    run_id = context.broadcast_object(str(record.get("run_id", "")))
    try:
        components = _build_components(spec, context, attempt, goodput_tracker, notes, run_id=run_id)
        status, step = _train_and_finish(components, spec, requested)
    except Exception as error:  # outermost handler of a rank: records every failure
        RANK_LOGGER.error("failed: %s: %s", type(error).__name__, error)
        # A full disk must not hide the original error.
        with suppress(OSError, ValueError):
            spec.directory.storage.refresh_directory(spec.directory.attempts_dir)
            if not find_takeover(spec.directory, attempt, run_id):  # the record may be a new run's by now
                fail_attempt(spec.directory, attempt, f"rank {context.rank}: {type(error).__name__}: {error}")
        raise
    if context.is_rank_zero:
        end_attempt(spec.directory, attempt, status, step=step)
    context.heartbeat.mark_done()
    RANK_LOGGER.info("%s at step %d", status, step)
    return {"status": status, "step": step}


def _log_events(context: RunContext) -> RunContext:
    """Log notes, warnings, evaluations and checkpoints that this rank reports."""

    def report_event(event: Event) -> None:
        match event:
            case NoteEvent():
                RANK_LOGGER.info("%s", event.message)
            case WarningEvent():
                RANK_LOGGER.warning("%s", event.message)
            case EvalEvent() | CheckpointEvent():
                RANK_LOGGER.info("%s", event)
        context.report(event)

    return replace(context, event_listener=report_event)


def _train_and_finish(components: TrainerComponents, spec: WorkerSpec, requested: Config) -> tuple[str, int]:
    try:
        status, step = _train_and_export(components, spec, requested)
    except BaseException:
        components.metrics.close(failed=True)
        raise
    components.metrics.close()
    return status, step


def _train_and_export(components: TrainerComponents, spec: WorkerSpec, requested: Config) -> tuple[str, int]:
    context = components.context
    try:
        status, state = run_training_loop(components)
    except Exception as error:
        if is_out_of_memory(error):
            mark_out_of_memory(spec.directory, components.attempt)
            device_gb = measure_device_memory_gb(context.device)
            raise build_out_of_memory_error(requested, spec.config, context.world_size, device_gb) from error
        if components.plan.compile and is_compile_error(error):
            raise build_compile_error(error) from error
        if is_out_of_shared_memory(error):
            compiled = components.plan.compile
            raise build_shared_memory_error(error, spec.config, compiled=compiled) from error
        raise
    if status == "finished" and spec.config.export.at_end and context.is_rank_zero:
        context.heartbeat.set_phase("exporting", NO_TIMEOUT)
        components.goodput_tracker.enter_category("checkpoint")
        finish_run(spec, metrics=components.metrics, context=context)
    components.metrics.write(state.step, components.goodput_tracker.compute_metrics())
    return status, state.step


def _begin_attempt(
    spec: WorkerSpec, context: RunContext, requested: Config, placements: Sequence[RankPlacement]
) -> tuple[int, GoodputTracker]:
    """Agree on the attempt's number, redirect library output to its log and set up torch."""
    config = spec.config
    goodput_state = (
        load_goodput_state(spec.directory, spec.requested_at) if context.is_rank_zero else GoodputState({}, 0)
    )
    rank_pids = context.all_gather_object(os.getpid())
    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "processes": rank_pids,
        "ranks": [placement.to_json() for placement in placements],
        "workers": context.world_size,
        "micro_batch": config.train.micro_batch_size,
        "asked": requested.train.micro_batch_size,
        "zero": config.engine.zero_stage,
        "activation_checkpointing": config.model.activation_checkpointing,
        "load": describe_memory_load(requested, context),
        "began": spec.requested_at,
        "group_began": spec.group_started_at,
        "reached": goodput_state.last_completed_step,
    }
    attempt = context.broadcast_object(begin_attempt(spec.directory, record) if context.is_rank_zero else 0)
    redirect_output(spec.directory.get_rank_log_path(attempt, context.rank))
    set_flight_record_directory(spec.directory.get_log_dir(attempt))
    torch.set_num_threads(config.cluster.cpus_per_worker)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)
    return attempt, goodput_state.start_tracker(spec.requested_at)


def _build_components(
    spec: WorkerSpec,
    context: RunContext,
    attempt: int,
    goodput_tracker: GoodputTracker,
    notes: Sequence[str],
    *,
    run_id: str,
) -> TrainerComponents:
    run, config = spec.directory, spec.config
    context.heartbeat.set_phase("looking for a checkpoint")
    checkpoint = find_latest_valid_checkpoint(run, context)
    train_state = _get_train_state(checkpoint)
    if context.is_rank_zero:
        update_attempt(run, attempt, resumed=checkpoint.directory.name if checkpoint else None)
    plan = _make_attempt_plan(spec, context, checkpoint, notes)
    context.heartbeat.set_phase("building the model and loading its state")
    built = build_run_model(spec, plan, context, checkpoint, _find_recorded_commit(spec, context, checkpoint))
    if context.is_rank_zero and built.hub is not None:
        update_attempt(run, attempt, **{HUB_KEY: built.hub.to_json()})
    context.heartbeat.set_phase("opening the data")
    trackers = open_trackers(spec.config, run, run_id, context.metric_exporter) if context.is_rank_zero else ()
    metrics = Metrics(run, attempt, train_state.step, context, trackers)
    checkpoint_manager = build_checkpoint_manager(
        spec, context, plan, built, checkpoint, attempt=attempt, run_id=run_id, metrics=metrics
    )
    metrics.add_text(train_state.step, "configuration", f"```json\n{run.resolved_config_path.read_text()}\n```")
    return TrainerComponents(
        plan,
        plan.build_lr_schedule(),
        config.run.seed,
        context,
        built.engine,
        _build_dataloader(spec, context, plan, train_state, attempt),
        checkpoint_manager,
        metrics,
        attempt=attempt,
        goodput_tracker=goodput_tracker,
        initial_state=train_state,
        in_training_tasks=InTrainingEvaluator(spec, metrics=metrics, context=context),
        compute_meter=build_compute_meter(plan, context.device),
        step_profiler=_build_step_profiler(spec, context, train_state, attempt),
        on_spike=config.failures.on_loss_spike,
    )


def _make_attempt_plan(
    spec: WorkerSpec, context: RunContext, checkpoint: CheckpointReader | None, notes: Sequence[str]
) -> Plan:
    """Return the plan at this number of workers, from `checkpoint` on; rank 0 writes it, with `auto` resolved."""
    state = _get_train_state(checkpoint)
    data_facts = build_data_facts(spec.dataset_info, state.step, state.sequences)
    plan = make_plan(spec.config, ranks=context.world_size).with_data(data_facts)
    plan = check_plan(plan).with_notes(notes)
    plan = resolve_compilation(spec.config, plan, context, checkpoint.manifest if checkpoint else None)
    if context.is_rank_zero:
        write_atomically(spec.directory.plan_path, json.dumps(plan.to_json(), indent=1))
    return plan


def _build_dataloader(spec: WorkerSpec, context: RunContext, plan: Plan, state: TrainState, attempt: int) -> DataLoader:
    run, config = spec.directory, spec.config
    # Ranks of one replica fetch the same sequences.
    logs_samples = config.failures.log_samples and context.rank % plan.ranks_per_replica == 0
    return DataLoader(
        spec.dataset_info,
        global_batch=plan.global_batch,
        epochs=config.train.epochs,
        origin=(state.step, state.sequences),
        read_newest_info=partial(read_latest_dataset_info, run),
        sample_log=SampleLog(run.sample_log_dir, attempt, context.rank) if logs_samples else None,
        pinned_for=context.device if context.device.type == "cuda" else None,
    )


def _build_step_profiler(spec: WorkerSpec, context: RunContext, state: TrainState, attempt: int) -> StepProfiler:
    steps = None if spec.config.profile is None else spec.config.profile.steps
    profiler = StepProfiler(steps, spec.directory.get_profile_dir(attempt), context)
    profiler.warn_of_past_steps(state.step)
    return profiler


def _find_recorded_commit(
    spec: WorkerSpec, context: RunContext, checkpoint: CheckpointReader | None
) -> HubCommit | None:
    """Return the commit in the checkpoint, or before the first one that of the newest attempt which had found it."""
    model = spec.config.model
    if model.path is None:
        return None
    if checkpoint is not None:
        return find_hub_commit(checkpoint.manifest.extra, model)
    found = None
    if context.is_rank_zero:
        last = find_last_attempt(spec.directory)
        records = (read_attempt_record(spec.directory, number) for number in range(last, 0, -1))
        found = next((commit for record in records if (commit := find_hub_commit(record, model))), None)
    return context.broadcast_object(found)


def _get_train_state(checkpoint: CheckpointReader | None) -> TrainState:
    """Return the state to resume from."""
    if checkpoint is None:
        return TrainState()
    manifest = checkpoint.manifest
    return TrainState(manifest.step, manifest.tokens, manifest.sequences, manifest.skips, manifest.recent)
