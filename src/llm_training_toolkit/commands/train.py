"""Driver side of `ltt train`: check, lock, prepare, launch."""

from __future__ import annotations

from typing import Any

from llm_training_toolkit.checkpoint import find_latest_checkpoint
from llm_training_toolkit.config import Config, load_config
from llm_training_toolkit.config.uri import redact_text
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.data.prepare.epochs import build_data_facts, format_dataset_info, prepare_epochs
from llm_training_toolkit.launch.backend import check_cluster_nodes, create_dataset_builder, launch_training
from llm_training_toolkit.launch.request import TrainRequest, TrainResult
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.monitoring.logs import log_driver
from llm_training_toolkit.plan import Plan, check_plan, format_mixture, format_plan, make_plan
from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.goodput import format_goodput, record_command_end
from llm_training_toolkit.runs.status import read_goodput
from llm_training_toolkit.runs.storage.open import get_run_location, join_run, lock_run
from llm_training_toolkit.setup.background_prep import prepare_in_background
from llm_training_toolkit.setup.hub_weights import ask_for_size, ensure_known_size
from llm_training_toolkit.setup.machine import check_attention, check_compilation, check_machine, check_quantization
from llm_training_toolkit.setup.resume import (
    ResumeState,
    check_checkpoint_size,
    check_documents_unchanged,
    check_run_unchanged,
    read_resume_state,
)
from llm_training_toolkit.setup.run_files import write_run_files
from llm_training_toolkit.setup.stored_plan import recall_stored_plan
from llm_training_toolkit.setup.weights import check_initial_weights, find_moved_branch
from llm_training_toolkit.worker.precision import read_precision_notes, resolve_local_precision
from llm_training_toolkit.worker.spec import get_torchrun_world_size, is_first_rank


def start_run(request: TrainRequest, console: Console) -> TrainResult:
    """Start or resume the run of the request, or skip a finished one. Raises ToolkitError."""
    config = recall_stored_plan(load_config(request.config, request.overrides))
    ranks = get_torchrun_world_size() if config.cluster.workers == 0 else None
    if config.cluster.workers == 0 and not is_first_rank():
        ensure_known_size(config)
        plan = check_plan(make_plan(config, ranks))
        with join_run(get_run_location(config), console.print_line) as run:
            return _join_training(run, plan, console)
    hub_answer = ask_for_size(config, console.print_line)
    plan = check_plan(make_plan(config, ranks))  # before an impossible run gets a directory
    with lock_run(get_run_location(config), console.print_line) as run, log_driver(run):
        resume_state = read_resume_state(run)
        plan = _resolve_precision(plan, run, resume_state, ranks)
        config = plan.config
        plan = check_plan(plan.with_data(resume_state.build_data_facts(config)))
        check_run_unchanged(resume_state, config, request.accept, extend=request.extend)
        check_checkpoint_size(resume_state, plan)
        if resume_state.is_finished(plan):
            return _skip_finished_run(run, config, resume_state, console)
        for line in format_plan(plan):
            console.print_line(line)
        check_quantization(config)
        check_attention(config)
        check_compilation(config)
        check_initial_weights(config, plan, resume_state, hub_answer)
        if moved := find_moved_branch(config, resume_state):
            console.print_line(moved)
        if config.cluster.workers != 0:
            check_machine(config)
            check_cluster_nodes(run, config, console)
        dataset_info = _prepare_data(config, resume_state, request, console)
        data_facts = build_data_facts(dataset_info, resume_state.step, resume_state.sequences)
        plan = check_plan(plan.with_data(data_facts))
        write_atomically(run.config_path, redact_text(request.config.read_text(encoding="utf-8-sig")))
        write_run_files(run, config, plan, dataset_info)
        for line in format_mixture(plan):
            console.print_line(line)
        with prepare_in_background(run, config, data_facts, console):
            result = launch_training(run, config, console)
        record_command_end(run)
        console.print_line(format_goodput(read_goodput(run)))
        return _build_result(run, result)


def _join_training(run: RunDirectory, plan: Plan, console: Console) -> TrainResult:
    """Train as torchrun rank 1 or higher, which waits for rank 0: that one alone prepares and writes."""
    resume_state = read_resume_state(run)
    if resume_state.is_finished(plan.with_data(resume_state.build_data_facts(plan.config))):
        return _build_result(run, {"status": "finished", "step": resume_state.step})
    return _build_result(run, launch_training(run, plan.config, console))


def _resolve_precision(plan: Plan, run: RunDirectory, resume_state: ResumeState, ranks: int | None) -> Plan:
    """Return the plan with the precision that the run began with, or that this machine measures for `auto`."""
    config, notes = resolve_local_precision(resume_state.keep_saved_precision(plan.config))
    if config.train.precision != plan.config.train.precision:
        plan = make_plan(config, ranks)
    return plan.with_notes(notes or read_precision_notes(run, config))


def _prepare_data(config: Config, resume_state: ResumeState, request: TrainRequest, console: Console) -> DatasetInfo:
    """Return the dataset info: reuse it if its epochs last to the end of the run, otherwise prepare now."""
    dataset_info = resume_state.find_reusable_dataset(config, request.accept)
    if dataset_info is None:
        builder = create_dataset_builder(config, console)
        check_documents_unchanged(resume_state, config, builder, request.accept)
        if builder.partition_note is not None:
            console.print_line(builder.partition_note)
        dataset_info = prepare_epochs(
            builder, config, resume_state.step, resume_state.sequences, until=resume_state.step + 1
        ).dataset_info
    for row in format_dataset_info(dataset_info):
        console.print_line(row)
    return dataset_info


def _build_result(run: RunDirectory, result: dict[str, Any]) -> TrainResult:
    directory = find_latest_checkpoint(run.checkpoints_dir)
    checkpoint = run.storage.get_uri(directory) if directory else None
    return TrainResult(run=run.uri, step=result["step"], status=result["status"], checkpoint=checkpoint)


def _skip_finished_run(run: RunDirectory, config: Config, resume_state: ResumeState, console: Console) -> TrainResult:
    """Leave a finished run unchanged, except for an export that is missing or of an earlier end."""
    console.print_line(f"run {run.name} is finished: {resume_state.step:,} steps, in {run.uri}")
    if config.export.at_end:
        from llm_training_toolkit.worker.finish import complete_interrupted_finish, is_run_finished

        if not is_run_finished(run, config):
            complete_interrupted_finish(run, config, console.show_event)
    return _build_result(run, {"status": "finished", "step": resume_state.step})
