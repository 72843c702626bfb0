"""Resolution of `train.precision: auto`: measured on the workers, agreed between them, recorded in resolved.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from llm_training_toolkit.config import Config, dump_config_json, redact_config
from llm_training_toolkit.config.uri import is_uri
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import NoteEvent, WarningEvent
from llm_training_toolkit.plan import (
    PRECISION_KEY,
    Precision,
    ResolvedValue,
    choose_precision,
    format_slow_precision,
    with_precision,
)
from llm_training_toolkit.plan.auto import GPU_ATTENTION
from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.storage.open import get_run_location
from llm_training_toolkit.setup.machine import is_local
from llm_training_toolkit.worker.spec import WorkerSpec, get_torchrun_world_size


def resolve_precision(spec: WorkerSpec, context: RunContext) -> tuple[WorkerSpec, tuple[str, ...]]:
    """Return the spec with the run's precision, measured if it is `auto`, and notes for the plan. Collective.

    Rank 0 records it in resolved.json, so that later attempts and all readers of the run keep it.
    """
    precision = context.broadcast_object(spec.config.train.precision)  # each torchrun rank has read its own file
    if precision == "fp32" or (precision == "bf16" and context.device.type != "cpu"):
        return _apply_given_precision(spec, precision)
    from llm_training_toolkit.distributed.matmul_speed import measure_bf16_slowdown

    slowdowns = context.all_gather_object(measure_bf16_slowdown(context.device))
    if precision == "bf16":
        slow = format_slow_precision(precision, slowdowns)
        if slow is not None and context.is_rank_zero:
            context.report(WarningEvent(slow))
        return _apply_given_precision(spec, precision)
    chosen = choose_precision(slowdowns, context.device.type)
    config = _apply_chosen_precision(spec.config, chosen)
    if context.is_rank_zero:
        write_atomically(spec.directory.resolved_config_path, dump_config_json(redact_config(config)))
        context.report(NoteEvent(str(chosen)))
    return replace(spec, config=config), (str(chosen),)


def _apply_given_precision(spec: WorkerSpec, precision: Precision) -> tuple[WorkerSpec, tuple[str, ...]]:
    kept = replace(spec, config=with_precision(spec.config, precision))
    return kept, read_precision_notes(kept.directory, kept.config)


def read_precision_notes(run: RunDirectory, config: Config) -> tuple[str, ...]:
    """Read the reason for the run's precision from its earlier plan; empty if it was configured."""
    if not run.plan_path.is_file():
        return ()
    reason = f"{PRECISION_KEY} = {config.train.precision} (auto)"
    return tuple(note for note in json.loads(run.plan_path.read_text())["notes"] if note.startswith(reason))


def keep_begun_precision(config: Config) -> Config:
    """Return the configuration with the precision that its run began with, if the run is on this machine's disk."""
    directory = RunDirectory(Path(get_run_location(config)))
    if is_uri(config.run.dir) or not directory.resolved_config_path.is_file():
        return config
    from llm_training_toolkit.setup.resume import read_resume_state  # takes a second, spent only on a begun run

    return read_resume_state(directory).keep_saved_precision(config)


def resolve_local_precision(config: Config) -> tuple[Config, tuple[str, ...]]:
    """Resolve `auto` before the workers exist, if all of them will run on this machine's CPU.

    On a cluster, on other machines of torchrun and on GPUs `auto` stays, for the workers to resolve.
    """
    elsewhere = not is_local() if config.cluster.workers != 0 else get_torchrun_world_size() > 1
    if config.train.precision != "auto" or elsewhere or _needs_gpu(config):
        return config, ()
    import torch  # takes two seconds, spent only on `auto`

    from llm_training_toolkit.distributed.matmul_speed import measure_bf16_slowdown

    if config.cluster.gpus_per_worker != 0 and torch.cuda.device_count() > 0:
        return config, ()
    chosen = choose_precision([measure_bf16_slowdown(torch.device("cpu"))], "cpu")
    return _apply_chosen_precision(config, chosen), (str(chosen),)


def _needs_gpu(config: Config) -> bool:
    """Return whether the configuration runs on GPUs only, here or elsewhere."""
    quantized = config.model.lora is not None and config.model.lora.quantize is not None
    return quantized or config.cluster.gpus_per_worker == 1 or config.model.attn_implementation in GPU_ATTENTION


def _apply_chosen_precision(config: Config, chosen: ResolvedValue) -> Config:
    return with_precision(config, "bf16" if chosen.value == "bf16" else "fp32")
