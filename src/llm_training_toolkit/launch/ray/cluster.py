"""Connection to the Ray cluster, and a watch on its head: without a head, Ray kills this process silently."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.exceptions

from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.setup.machine import RAY_HEAD_TIMEOUT_VARIABLE, is_local

_POLL_SECONDS = 1.0
_CONNECT_TIMEOUT_SECONDS = 2.0
_DEFAULT_HEAD_TIMEOUT_SECONDS = 60.0  # Ray's default: its core then kills a process without a head
# Shares of the head timeout: a head that restarts within it, with its state in Redis, finds the run intact.
_SHARE_TO_WARN, _SHARE_TO_END = 0.2, 0.8


def get_head_timeout() -> float:
    """Return the seconds that Ray waits for an unresponsive head."""
    return float(os.environ.get(RAY_HEAD_TIMEOUT_VARIABLE, _DEFAULT_HEAD_TIMEOUT_SECONDS))


@contextmanager
def watch_head(address: str, warn: Callable[[str], None], end: Callable[[str], None]) -> Iterator[None]:
    """Poll the head at `address` (host:port); call `end` from a thread, once, before Ray would kill the process."""
    over = threading.Event()
    threading.Thread(target=_poll_head, args=(address, warn, end, over), daemon=True, name="watch-head").start()
    try:
        yield
    finally:
        over.set()


def _poll_head(address: str, warn: Callable[[str], None], end: Callable[[str], None], over: threading.Event) -> None:
    silent_since, warned = time.monotonic(), False
    while not over.wait(_POLL_SECONDS):
        if _is_head_reachable(address):
            silent_since, warned = time.monotonic(), False
            continue
        silent = time.monotonic() - silent_since
        if silent > _SHARE_TO_END * get_head_timeout():
            end(f"the head of the Ray cluster ({address}) is gone: it has not answered for {silent:.0f} s")
            return
        if silent > _SHARE_TO_WARN * get_head_timeout() and not warned:
            warned = True
            warn(
                f"the head of the Ray cluster ({address}) does not answer; the run waits "
                f"{get_head_timeout():.0f} s for it"
            )


def _is_head_reachable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_SECONDS):
            return True
    except OSError:
        return False


@contextmanager
def connect_to_cluster(console: Console) -> Iterator[None]:
    """Connect to the Ray cluster of RAY_ADDRESS or of this job; otherwise start one on this machine.

    A connection to a cluster stays open until this process ends and later calls share it: connecting takes a second.
    """
    if ray.is_initialized():
        yield
        return
    local = is_local()
    console.update_stage("starting Ray", 0, 1)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    if local:
        options |= {"address": "local", "num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False}
    # TorchTrainer needs torch: the second its import takes overlaps with the start of Ray's servers.
    threading.Thread(target=importlib.import_module, args=("torch",), daemon=True, name="import-torch").start()
    terminates = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
        signal.signal(signal.SIGTERM, terminates)  # Ray's handler exits with an uninformative status
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        where = "on this machine" if local else f"at RAY_ADDRESS={os.environ['RAY_ADDRESS']}"
        raise LaunchError(f"Ray cannot be reached {where}: {error}. `ray status` shows whether it runs") from error
    console.update_stage("starting Ray", 1, 1)
    try:
        yield
    finally:
        if local:
            ray.shutdown()
