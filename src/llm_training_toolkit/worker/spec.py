"""Spec of a worker (run directory, configuration, data), and its rank under torchrun."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llm_training_toolkit.checkpoint.run import Run

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def _read_boot_id() -> str:
    """Return an id that differs between machines with one host name; containers of a machine share it."""
    with suppress(OSError):
        return _BOOT.read_text().strip()
    return ""


@dataclass(frozen=True)
class WorkerSpec(Run):
    """A run as one rank sees it: on its node, in its worker group."""

    requested_at: float = field(default_factory=time.time)
    """Time of the request for these ranks, in seconds since 1970; the first ones are requested by the command."""
    group_started_at: float = field(default_factory=time.time)
    """Time when their worker group was started, after everything before it was settled."""
    node: str = field(default_factory=socket.gethostname)
    """Node of this rank, as its cluster names it."""
    machine: str = field(default_factory=_read_boot_id)


def get_torchrun_world_size() -> int:
    """Return the number of torchrun ranks, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Return whether this process is rank 0 of torchrun, or a single process."""
    return int(os.environ.get("RANK", "0")) == 0
