"""Activation checkpointing, micro-batch and ZeRO stage of an attempt if they are `auto`, and recovery from OOM.

An attempt takes the values of the previous one, so that a resume repeats every bit. After an out-of-memory it takes
half the micro-batch, the next ZeRO stage or more recomputation. Without a comparable attempt it takes the fastest
values that fit by the plan's estimate.
"""

from __future__ import annotations

import math
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.schema import EngineConfig
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import NoteEvent
from llm_training_toolkit.errors import PlanError, TrainingError
from llm_training_toolkit.plan import (
    CUDA_LIBRARY_BYTES,
    MemorySettings,
    choose_memory_settings,
    estimate_host_bytes,
    estimate_loading_bytes,
    estimate_memory,
    find_smaller_micro_batch,
    find_smaller_settings,
    plan_workload,
)
from llm_training_toolkit.runs.attempts import find_last_attempt, has_run_out_of_memory, read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.json_lines import read_newest_rows
from llm_training_toolkit.worker.spec import WorkerSpec

_CGROUPS = Path("/sys/fs/cgroup")


class SmallerMicroBatch(Exception):  # noqa: N818 - what happens next, not what went wrong
    """Memory ran out; the next attempt of this run uses less and needs no other change."""


def describe_memory_load(config: Config, context: RunContext) -> dict[str, Any]:
    """Return what device memory depends on, except the micro-batch; other `auto` values as configured."""
    return {
        "workers": context.world_size,
        "device": context.device.type,
        "model": config.model.model_dump(mode="json"),
        "sequence_length": config.data.sequence_length,
        "global_batch": config.train.global_batch_size,
        "precision": config.train.precision,
        # Without defaults, so that a field of a later version changes nothing for a run that has begun.
        "engine": config.engine.model_dump(mode="json", exclude_defaults=True),
    }


def resolve_memory_settings(spec: WorkerSpec, context: RunContext) -> tuple[WorkerSpec, tuple[str, ...]]:
    """Choose what the memory of the devices decides for all ranks, with notes for the plan. Collective."""
    config = spec.config
    if "auto" not in _get_configured_settings(config):
        return spec, ()
    free = min(context.all_gather_object(_measure_free_memory(context)))
    found = context.broadcast_object(
        _choose_settings(spec.directory, config, context, free) if context.is_rank_zero else None
    )
    assert found is not None, "rank 0 chooses"
    settings, said = found
    return replace(spec, config=settings.apply_to_config(config)), said


def check_host_memory(config: Config, context: RunContext) -> None:
    """Check that every node has the host memory that its ranks take beside their devices'. Collective.

    Raises PlanError on every rank: the kernel would kill a rank in the middle of its first steps. On CPUs only
    `engine.offload` is checked: the rest is part of what the micro-batch is chosen by.
    """
    offloads = config.engine.offload != "none"
    if context.device.type == "cpu" and not offloads:
        return
    load = plan_workload(config, context.world_size)
    in_training = f"engine.offload = {config.engine.offload}" if offloads else "the copy of a checkpoint"
    parts = {
        in_training: estimate_host_bytes(load),
        "the largest tensor, while the model is built,": estimate_loading_bytes(load),
    }
    largest = max(parts, key=lambda part: parts[part])
    needed = parts[largest]
    free = context.all_gather_object(_measure_free_host_memory(context))
    least = min(range(len(free)), key=lambda rank: free[rank])
    if needed > free[least]:
        raise PlanError(
            f"{largest} takes {needed / 1e9:.3g} GB of host memory for each worker, and rank {least} has "
            f"{free[least] / 1e9:.3g} GB free. Use more workers, fewer of them on a node, or nodes with more memory"
        )


def _get_configured_settings(config: Config) -> tuple[object, ...]:
    return config.model.activation_checkpointing, config.train.micro_batch_size, config.engine.zero_stage


def _choose_settings(
    run: RunDirectory, config: Config, context: RunContext, free: float
) -> tuple[MemorySettings, tuple[str, ...]]:
    previous = _find_previous_settings(run, config, context)
    if previous is not None:
        settings, said = previous, _format_kept_settings(config, previous)
    else:
        if context.device.type == "cpu":  # also holds the copy of a checkpoint during its write
            free -= estimate_host_bytes(plan_workload(config, context.world_size))
        choice = choose_memory_settings(config, context.world_size, free)
        settings, said = choice.settings, tuple(str(reason) for reason in choice.reasons)
    for message in said:
        context.report(NoteEvent(message))
    return settings, said


def _format_kept_settings(config: Config, previous: MemorySettings) -> tuple[str, ...]:
    keys = ("model.activation_checkpointing", "train.micro_batch_size", "engine.zero_stage")
    values = (previous.checkpointing, previous.micro_batch, previous.zero)
    configured = zip(keys, _get_configured_settings(config), values, strict=True)
    return tuple(f"{key} = {value} (auto): as before" for key, given, value in configured if given == "auto")


def _drop_engine_defaults(load: Any) -> Any:  # noqa: ANN401 - of an attempt's record
    """Return a recorded load without the defaults of its engine section, which earlier versions wrote."""
    if not isinstance(load, dict) or not isinstance(load.get("engine"), dict):
        return load
    defaults = EngineConfig().model_dump(mode="json")
    engine = {key: value for key, value in load["engine"].items() if key not in defaults or defaults[key] != value}
    return load | {"engine": engine}


def _find_previous_settings(run: RunDirectory, config: Config, context: RunContext) -> MemorySettings | None:
    """Return the settings that follow from the newest attempt under the same load, or None without one."""
    load = describe_memory_load(config, context)
    for number in range(find_last_attempt(run), 0, -1):
        record = read_attempt_record(run, number)
        if _drop_engine_defaults(record.get("load")) != load or "activation_checkpointing" not in record:
            continue
        tried = MemorySettings(record["activation_checkpointing"], int(record["micro_batch"]), int(record["zero"]))
        given = config.train.micro_batch_size
        least = replace(tried, micro_batch=1 if given == "auto" else given)
        killed = (
            number == find_last_attempt(run) and context.device.type == "cpu" and _died_before_first_step(run, record)
        )
        if killed or has_run_out_of_memory(run, number):
            return find_smaller_settings(config, tried, context.world_size) or least
        if given != "auto":
            return least
        if record["asked"] == "auto":  # a number that was configured for one attempt is not kept
            return tried
    return None


def _died_before_first_step(run: RunDirectory, record: Mapping[str, Any]) -> bool:
    """Return whether an attempt was killed before its first step, the kernel's reaction to out-of-memory on CPU."""
    kind = record.get("failure", {}).get("kind")
    killed = kind in {"killed", "oom"} if kind else record["state"] in {"running", "lost"}
    rows = read_newest_rows(run.metrics_path)
    return killed and not any(row["attempt"] == record["attempt"] and "train/loss" in row for row in rows)


def _measure_free_memory(context: RunContext) -> float:
    """Return the bytes this rank may use: free GPU memory, or its share of the machine's or container's free memory."""
    if context.device.type == "cuda":
        # The context is there already; cuBLAS and NCCL allocate when they are first used.
        return max(float(torch.cuda.mem_get_info(context.device)[0]) - CUDA_LIBRARY_BYTES, 0.0)
    return _measure_free_host_memory(context)


def _measure_free_host_memory(context: RunContext) -> float:
    """Return this rank's share of the bytes that are free on its machine or in its container. Collective."""
    hosts = Counter(context.all_gather_object(socket.gethostname()))
    own = Path("/proc/self/cgroup")
    left = read_container_free_memory(own.read_text(), _CGROUPS) if own.exists() else math.inf
    return min(float(psutil.virtual_memory().available), left) / hosts[socket.gethostname()]


def read_container_free_memory(membership: str, root: Path) -> float:
    """Return the bytes left under the memory limits of a process's cgroups, or infinity without a limit.

    `membership` is the text of /proc/self/cgroup. The limit may be set in any cgroup from the process's own upwards:
    Slurm and systemd set it there, a container sees its own as the root. Reads cgroup v2 and v1.
    """
    free = math.inf
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in {"", "memory"} and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        group = base / path.lstrip("/")
        while True:
            free = min(free, _read_cgroup_free_memory(group, "v1" if controllers else "v2"))
            if group == base:
                break
            group = group.parent
    return free


_FILES = {
    "v2": ("memory.max", "memory.current", "inactive_file"),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _read_cgroup_free_memory(group: Path, version: str) -> float:
    """Return the bytes left in one cgroup; cached file contents count as left."""
    limit_file, used_file, cached_name = _FILES[version]
    try:
        limit, used = (group / limit_file).read_text().strip(), int((group / used_file).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return math.inf
    return math.inf if limit == "max" else float(int(limit) - used + int(statistics.get(cached_name, 0)))


def build_out_of_memory_error(
    requested: Config, taken: Config, workers: int, device_gb: float
) -> SmallerMicroBatch | TrainingError:
    """Return the exception for an out-of-memory with `taken`: retry with less memory, or fail the run."""
    rows, stage, kind = taken.train.micro_batch_size, taken.engine.zero_stage, taken.model.activation_checkpointing
    assert rows != "auto"
    assert stage != "auto"
    counted = _format_memory_plan(taken, workers, device_gb)
    assert kind != "auto"
    less = find_smaller_settings(requested, MemorySettings(kind, rows, stage), workers)
    if less is not None:
        what = (
            f"activation checkpointing {less.checkpointing}"
            if less.checkpointing != kind
            else f"ZeRO {less.zero}"
            if less.zero != stage
            else f"{less.micro_batch}"
        )
        return SmallerMicroBatch(
            f"out of memory with micro-batches of {rows}; the next attempt takes {what}. {counted}"
        )
    ways = ["set model.activation_checkpointing to full or auto"] if kind != "full" else []
    if taken.engine.tensor_parallel > 1:
        ways.append("raise engine.tensor_parallel, or use more cluster.workers at ZeRO 1")
    else:
        ways += ["raise engine.zero_stage, with more cluster.workers"] if stage < 3 else ["use more cluster.workers"]
    if find_smaller_micro_batch(taken, workers, rows):
        ways.insert(0, "lower train.micro_batch_size, or set it to auto")
    what = f"out of memory with micro-batches of {rows}: {'; or '.join(ways)}. The same command resumes"
    return TrainingError(f"{what}. {counted}")


def _format_memory_plan(taken: Config, workers: int, device_gb: float) -> str:
    """Format the memory that the plan counts, its three largest parts, and the memory of the device."""
    memory_gb = estimate_memory(plan_workload(taken, workers)).to_gigabytes()
    largest = sorted(memory_gb, key=lambda part: memory_gb[part], reverse=True)[:3]
    listed = ", ".join(f"{part} {memory_gb[part]:.3g}" for part in largest)
    return f"The plan counts {sum(memory_gb.values()):.3g} GB, of them {listed}; the device has {device_gb:.3g}"


def measure_device_memory_gb(device: torch.device) -> float:
    """Return the memory of the GPU, or of this machine, in 10^9 bytes."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory) / 1e9
    return float(psutil.virtual_memory().total) / 1e9
