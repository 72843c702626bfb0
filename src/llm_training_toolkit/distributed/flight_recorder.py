"""Flight recorder of torch: the last collectives of a rank, in a file beside its log when a run hangs.

The recorder is on by default in torch (2,000 entries, `TORCH_FR_BUFFER_SIZE`), and NCCL's watchdog writes it when a
collective times out. This module sets where, and writes it earlier: at a hang the workers are killed before that.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_training_toolkit.distributed.events import Event, WarningEvent

FLIGHT_RECORD_PREFIX = "flight_record_rank_"  # torch appends the rank
# Names for where torch writes the record, the newer one first.
_PREFIX_VARIABLES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


def set_flight_record_directory(directory: Path) -> None:
    """Have torch write this process's record to a directory, unless a person has set another place."""
    given = next((os.environ[name] for name in _PREFIX_VARIABLES if os.environ.get(name)), "")
    if not given or Path(given).name == FLIGHT_RECORD_PREFIX:  # of an earlier attempt in this process
        os.environ[_PREFIX_VARIABLES[0]] = str(directory / FLIGHT_RECORD_PREFIX)


def get_flight_record_path(directory: Path, rank: int) -> Path:
    """Return the record of a rank in the directory of its log."""
    return directory / f"{FLIGHT_RECORD_PREFIX}{rank}"


def write_flight_record(rank: int) -> None:
    """Write the newest collectives of this process as torch's watchdog would. Raises OSError.

    Writes only with a process group and after `set_flight_record_directory`.
    """
    prefix = next((os.environ[name] for name in _PREFIX_VARIABLES if os.environ.get(name)), "")
    import torch  # noqa: PLC0415 - the driver imports this module as well
    import torch.distributed as dist  # noqa: PLC0415

    if not prefix or not dist.is_initialized():
        return
    recorders: Any = torch._C._distributed_c10d  # noqa: SLF001 - its only name
    # torch keeps two records: of NCCL's collectives (in builds for CUDA alone), and of gloo's.
    dump = recorders._dump_nccl_trace if dist.get_backend() == "nccl" else recorders._dump_fr_trace  # noqa: SLF001
    path = Path(f"{prefix}{rank}")
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(dump())
    partial.replace(path)


def build_flight_record_writer(rank: int, report: Callable[[Event], None]) -> Callable[[], None]:
    """Return a function that writes the record, or reports that it cannot."""

    def write_record() -> None:
        try:
            write_flight_record(rank)
        except (OSError, RuntimeError) as error:
            report(WarningEvent(f"the flight record of rank {rank} cannot be written: {error}"))

    return write_record
