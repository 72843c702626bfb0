"""The micro-batch of an attempt where the configuration says `auto`, and what an out-of-memory means for the next.

An attempt takes what the one before it took, so that a resume repeats every bit; half of it if that ran out of
memory; and what the plan's estimate fits into the devices where no attempt was like this one.
"""

from __future__ import annotations

import math
import socket
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from llm_training_toolkit.config import Config
from llm_training_toolkit.context import RunContext
from llm_training_toolkit.errors import TrainingError
from llm_training_toolkit.launch.place import Place
from llm_training_toolkit.overview import newest_rows
from llm_training_toolkit.plan import checkpoint_copy, fitting_micro_batch, make_plan, settled, smaller_micro_batch
from llm_training_toolkit.runs import RunDirectory, attempt_record, last_attempt, ran_out_of_memory

_CGROUPS = Path("/sys/fs/cgroup")
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cuda failure 'out of memory'",
)
"""What torch, cuBLAS and NCCL say where there is no exception class for it: on CPU, and outside torch's allocator."""


class SmallerMicroBatch(Exception):  # noqa: N818 - what happens next, not what went wrong
    """Memory ran out; the next attempt of this run takes a smaller micro-batch and needs no other help."""


def load_of(config: Config, context: RunContext) -> dict[str, Any]:
    """What the memory of a device depends on, the micro-batch apart."""
    return {
        "workers": context.world_size,
        "device": context.device.type,
        "model": config.model.model_dump(mode="json"),
        "sequence_length": config.data.sequence_length,
        "global_batch": config.train.global_batch,
        "precision": config.train.precision,
        "engine": config.engine.model_dump(mode="json"),
    }


def with_micro_batch(place: Place, context: RunContext) -> Config:
    """The configuration with a number for `train.micro_batch`, the same on every rank. Collective."""
    config = place.config
    if config.train.micro_batch != "auto":
        return config
    free = min(context.gather(_free_share(context)))
    rows = context.broadcast(_choose(place.run, config, context, free) if context.is_first else 0)
    return settled(config, rows)


def _choose(run: RunDirectory, config: Config, context: RunContext, free: float) -> int:
    rows = _from_attempts(run, config, context)
    why = "as before"
    if rows is None:
        if context.device.type == "cpu":  # where the copy of a checkpoint that is being written lies as well
            free -= checkpoint_copy(make_plan(config).trainable_parameters, context.world_size)
        rows = fitting_micro_batch(config, context.world_size, free)
        why = f"by the estimate they fit into the {free / 1e9:.3g} GB a worker has free"
    context.report({"kind": "note", "message": f"micro-batches of {rows}: {why}"})
    return rows


def _from_attempts(run: RunDirectory, config: Config, context: RunContext) -> int | None:
    """What the newest attempt under the same load teaches; None where there is none."""
    load = load_of(config, context)
    for number in range(last_attempt(run), 0, -1):
        record = attempt_record(run, number)
        if record.get("load") != load:
            continue
        rows = int(record["micro_batch"])
        killed = number == last_attempt(run) and context.device.type == "cpu" and _died_before_a_step(run, record)
        if killed or ran_out_of_memory(run, number):
            return smaller_micro_batch(config, context.world_size, rows) or 1
        if record["asked"] == "auto":  # a number that somebody asked for once is not ours to keep
            return rows
    return None


def _died_before_a_step(run: RunDirectory, record: Mapping[str, Any]) -> bool:
    """Whether an attempt was killed before its first step: on CPU the system's answer to too much memory."""
    killed = record["state"] in {"running", "lost"}
    rows = newest_rows(run.metrics)
    return killed and not any(row["attempt"] == record["attempt"] and "train/loss" in row for row in rows)


def _free_share(context: RunContext) -> float:
    """Bytes this rank may take: its GPU's free memory, or its share of what the machine or its container has free."""
    if context.device.type == "cuda":
        return float(torch.cuda.mem_get_info(context.device)[0])
    hosts = Counter(context.gather(socket.gethostname()))
    own = Path("/proc/self/cgroup")
    left = container_free(own.read_text(), _CGROUPS) if own.exists() else math.inf
    return min(float(psutil.virtual_memory().available), left) / hosts[socket.gethostname()]


def container_free(membership: str, root: Path) -> float:
    """Bytes left under the memory limits of the groups a process is in; infinite where none has a limit.

    `membership` is the text of /proc/self/cgroup. A limit may stand in any group from the process's own upwards:
    Slurm and systemd set it there, a container shows its own as the root. Reads cgroup v2 and v1.
    """
    free = math.inf
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in {"", "memory"} and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        group = base / path.lstrip("/")
        while True:
            free = min(free, _group_free(group, "v1" if controllers else "v2"))
            if group == base:
                break
            group = group.parent
    return free


_FILES = {
    "v2": ("memory.max", "memory.current", "inactive_file"),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _group_free(group: Path, version: str) -> float:
    """Bytes left in one group; what is cached of files counts as left."""
    limit_file, used_file, cached_name = _FILES[version]
    try:
        limit, used = (group / limit_file).read_text().strip(), int((group / used_file).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return math.inf
    return math.inf if limit == "max" else float(int(limit) - used + int(statistics.get(cached_name, 0)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of the device is full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def after_out_of_memory(taken: Config, workers: int, *, adaptable: bool) -> SmallerMicroBatch | TrainingError:
    """What follows when an attempt of `taken` ran out of memory: a smaller micro-batch, or the end of the run."""
    rows = taken.train.micro_batch
    assert rows != "auto"
    smaller = smaller_micro_batch(taken, workers, rows)
    if adaptable and smaller:
        return SmallerMicroBatch(f"out of memory with micro-batches of {rows}; the next attempt takes {smaller}")
    ways = ["set model.activation_checkpointing: true"] if not taken.model.activation_checkpointing else []
    ways += ["raise engine.zero, with more cluster.workers"] if taken.engine.zero < 3 else ["use more cluster.workers"]
    if smaller:
        ways.insert(0, "lower train.micro_batch, or set it to auto")
    return TrainingError(f"out of memory with micro-batches of {rows}: {'; or '.join(ways)}. The same command resumes")
