"""Where a run takes place: its directory, its configuration, its data, and the ranks torchrun may have started."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llm_training_toolkit.config import Config
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.runs.directory import RunDirectory

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def _read_boot_id() -> str:
    """What tells machines of one host name apart; containers of a machine have it in common."""
    with suppress(OSError):
        return _BOOT.read_text().strip()
    return ""


@dataclass(frozen=True)
class WorkerSpec:
    """Where a rank finds everything."""

    run: RunDirectory
    config: Config
    receipt: DatasetInfo
    began: float = field(default_factory=time.time)
    """When these ranks were asked for, in seconds since 1970: the first ones by the command."""
    group_began: float = field(default_factory=time.time)
    """When their group was started, once everything before it was settled."""
    node: str = field(default_factory=socket.gethostname)
    """This rank's, as its cluster names it."""
    machine: str = field(default_factory=_read_boot_id)


def get_torchrun_world_size() -> int:
    """Ranks that torchrun started this process among; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this process is rank 0 of its torchrun, or alone."""
    return int(os.environ.get("RANK", "0")) == 0
