"""The micro-batch of an attempt where the configuration says `auto`, and what an out-of-memory means for the next.

An attempt takes what the one before it took, so that a resume repeats every bit; half of it if that ran out of
memory; and what the plan's estimate fits into the devices where no attempt was like this one.
"""

from __future__ import annotations

import socket
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch

from llm_training_toolkit.config import Config
from llm_training_toolkit.context import RunContext
from llm_training_toolkit.errors import TrainingError
from llm_training_toolkit.launch.place import Place
from llm_training_toolkit.plan import fitting_micro_batch, settled, smaller_micro_batch
from llm_training_toolkit.runs import RunDirectory, attempt_record, last_attempt

_CGROUP = Path("/sys/fs/cgroup")
_CPU_ALLOCATOR = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "bad_alloc")
"""What torch says on CPU, where it has no exception class for it."""


class SmallerMicroBatch(Exception):  # noqa: N818 - what happens next, not what went wrong
    """Memory ran out; the next attempt of this run takes a smaller micro-batch and needs no other help."""


def load_of(config: Config, context: RunContext) -> dict[str, Any]:
    """What the memory of a device depends on, the micro-batch apart."""
    return {
        "workers": context.world_size,
        "device": context.device.type,
        "zero": config.engine.zero,
        "attention": config.model.attention,
        "activation_checkpointing": config.model.activation_checkpointing,
    }


def with_micro_batch(place: Place, context: RunContext) -> Config:
    """The configuration with a number for `train.micro_batch`, the same on every rank. Collective."""
    config = place.config
    if config.train.micro_batch != "auto":
        return config
    smallest = min(context.gather(_free_share(context)))
    rows = context.broadcast(_choose(place.run, config, context, smallest) if context.is_first else 0)
    return settled(config, rows)


def _choose(run: RunDirectory, config: Config, context: RunContext, free: float) -> int:
    before = attempt_record(run, last_attempt(run))
    if before.get("load") == load_of(config, context) and "micro_batch" in before:
        rows = int(before["micro_batch"])
        if before.get("out_of_memory"):
            return smaller_micro_batch(config, context.world_size, rows) or 1
        return rows
    rows = fitting_micro_batch(config, context.world_size, free)
    message = f"micro-batches of {rows}: by the estimate they fit into the {free / 1e9:.3g} GB a worker has free"
    context.report({"kind": "note", "message": message})
    return rows


def _free_share(context: RunContext) -> float:
    """Bytes this rank may take: its GPU's free memory, or its share of what the machine or its container has free."""
    if context.device.type == "cuda":
        return float(torch.cuda.mem_get_info(context.device)[0])
    hosts = Counter(context.gather(socket.gethostname()))
    free = min(float(psutil.virtual_memory().available), _container_free(_CGROUP))
    return free / hosts[socket.gethostname()]


def _container_free(group: Path) -> float:
    """Bytes left under the memory limit of a container (cgroup v2, in the folder `group`); infinite without one."""
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines()).get("inactive_file", 0)
    except (OSError, ValueError):
        return float("inf")
    return float("inf") if limit == "max" else float(int(limit) - used + int(cached))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of the device is full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_ALLOCATOR)


def after_out_of_memory(asked: Config, taken: Config, workers: int) -> SmallerMicroBatch | TrainingError:
    """What follows when an attempt of `taken` ran out of memory: a smaller micro-batch, or the end of the run."""
    rows = taken.train.micro_batch
    assert rows != "auto"
    smaller = smaller_micro_batch(taken, workers, rows)
    if asked.train.micro_batch == "auto" and smaller:
        return SmallerMicroBatch(f"out of memory with micro-batches of {rows}; the next attempt takes {smaller}")
    ways = ["set model.activation_checkpointing: true"] if not taken.model.activation_checkpointing else []
    ways += ["raise engine.zero, with more cluster.workers"] if taken.engine.zero < 3 else ["use more cluster.workers"]
    if smaller:
        ways.insert(0, "lower train.micro_batch, or set it to auto")
    return TrainingError(f"out of memory with micro-batches of {rows}: {'; or '.join(ways)}. The same command resumes")
