"""Training without Ray, for debugging or where Ray is absent: one process, or the ranks of torchrun."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist

from llm_training_toolkit.checkpoint import find_latest_checkpoint
from llm_training_toolkit.config import Config
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.distributed.context import RunContext, StopRequest
from llm_training_toolkit.distributed.events import WarningEvent
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.request import EXIT_CODES
from llm_training_toolkit.launch.signals import on_stop_signal
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.monitoring.logs import restore_output
from llm_training_toolkit.runs.directory import RunDirectory, parse_checkpoint_name
from llm_training_toolkit.runs.goodput import get_process_start_time
from llm_training_toolkit.worker.main import run_worker
from llm_training_toolkit.worker.micro_batch import SmallerMicroBatch
from llm_training_toolkit.worker.spec import WorkerSpec, get_torchrun_world_size, is_first_rank

_PROCESS_GROUP_TIMEOUT = timedelta(hours=1)  # covers data preparation, for which the other ranks wait


@contextmanager
def open_process_group(gpus: Literal["auto", 0, 1]) -> Iterator[torch.device]:
    """Open the process group of the ranks; yield this rank's device."""
    os.environ.setdefault("LOCAL_RANK", "0")  # required by DeepSpeed
    device = _select_device(gpus)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if get_torchrun_world_size() > 1:
        dist.init_process_group(backend, timeout=_PROCESS_GROUP_TIMEOUT)
    else:
        # DeepSpeed requires a process group even for one rank; an in-memory store needs no port.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _select_device(gpus: Literal["auto", 0, 1]) -> torch.device:
    if gpus == 1 and not torch.cuda.is_available():
        raise LaunchError("cluster.gpus_per_worker = 1: torch finds no GPU here; set it to 0, or to auto")
    if gpus == 0 or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def run_without_ray(run: RunDirectory, config: Config, console: Console) -> dict[str, Any]:
    """Train in this process, alone or as one of torchrun's ranks; return the result of `run_worker`.

    The other ranks wait in the rendezvous until the first has prepared the data.
    """
    stop = threading.Event()
    os.environ.update(config.cluster.env)
    with open_process_group(config.cluster.gpus_per_worker) as device, on_stop_signal(stop.set):
        context = RunContext(
            rank=int(os.environ.get("RANK", "0")),
            world_size=get_torchrun_world_size(),
            device=device,
            event_listener=console.show_event if is_first_rank() else None,
            stop_request_reader=lambda: StopRequest.STOP if stop.is_set() else StopRequest.NONE,
        )
        if not is_first_rank():
            run.storage.refresh_directory(run.path)  # the first rank has written files meanwhile
        worker_spec = WorkerSpec(
            run, config, DatasetInfo.from_json(run.dataset_info_path.read_text()), get_process_start_time()
        )
        try:
            return run_worker(worker_spec, context)
        except SmallerMicroBatch as after:
            if stop.is_set() and context.world_size == 1:
                return _build_stopped_result(run)
            run.storage.flush(last=True)
            _restart_process(after, context, console)


def _restart_process(after: SmallerMicroBatch, context: RunContext, console: Console) -> NoReturn:
    """Replace this process by a new one of the same command, which reads from the attempts how to use less memory.

    DeepSpeed keeps a failed engine alive, so its memory cannot be freed in this process. With several ranks each one
    exits at once instead: the others block in a collective with it, and so would destroying the process group.
    torchrun then kills or restarts all ranks.
    """
    restore_output()
    if context.world_size > 1:
        sys.stderr.write(f"rank {context.rank}: {after}: start it again, or let torchrun do so with --max-restarts\n")
        sys.stderr.flush()
        os._exit(EXIT_CODES["stopped"])
    console.show_event(WarningEvent(str(after)))
    console.close()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - no shell is wanted


def _build_stopped_result(run: RunDirectory) -> dict[str, Any]:
    """Return the result of a run that failed after a stop request: stopped at its newest checkpoint."""
    newest_one = find_latest_checkpoint(run.checkpoints_dir)
    step_and_attempt = parse_checkpoint_name(newest_one) if newest_one else None
    return {"status": "stopped", "step": step_and_attempt[0] if step_and_attempt else 0}
