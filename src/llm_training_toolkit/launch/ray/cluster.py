"""Connection to the Ray cluster, and watches on its head and on the raylet of this node.

Without either, Ray kills this process silently.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.ray.private_api import InstalledCodeConfig
from llm_training_toolkit.launch.signals import kill_sessions_after_death, start_processes_in_own_session
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.user_directory import create_user_directory
from llm_training_toolkit.setup.machine import RAY_HEAD_TIMEOUT_VARIABLE, is_local

_POLL_SECONDS = 1.0
_CONNECT_TIMEOUT_SECONDS = 2.0
_DEFAULT_HEAD_TIMEOUT_SECONDS = 60.0  # Ray's default: its core then kills a process without a head
_REFUSALS_TO_END = 2  # in a row, before the raylet counts as gone
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
    try:
        _open_connection(address)
    except OSError:
        return False
    return True


def get_raylet_address() -> str:
    """Return the address (host:port) of Ray's process on this node, the raylet, which a driver cannot outlive."""
    own = ray.get_runtime_context().get_node_id()
    [node] = [node for node in ray.nodes() if node["NodeID"] == own]
    return f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"


@contextmanager
def watch_raylet(address: str, end: Callable[[str], None]) -> Iterator[None]:
    """Poll the raylet at `address`; call `end` from a thread, once, if it is gone: Ray then kills this process."""
    over = threading.Event()
    threading.Thread(target=_poll_raylet, args=(address, end, over), daemon=True, name="watch-raylet").start()
    try:
        yield
    finally:
        over.set()


def _poll_raylet(address: str, end: Callable[[str], None], over: threading.Event) -> None:
    refusals = 0
    while not over.wait(_POLL_SECONDS):
        try:
            _open_connection(address)
        except ConnectionRefusedError:  # nothing listens there; a busy raylet would time out instead
            refusals += 1
        except OSError:
            continue
        else:
            refusals = 0
        if refusals == _REFUSALS_TO_END:
            end(f"Ray's process on this node (raylet, {address}) is gone: killed from outside, or crashed")
            return


def _open_connection(address: str) -> None:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_SECONDS):
        pass


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
    options: dict[str, Any] = {
        "job_config": InstalledCodeConfig(),
        "log_to_driver": False,
        "logging_level": "error",
        "configure_logging": True,
    }
    if local:
        options |= {"address": "local", "num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False}
    # TorchTrainer needs torch: the second its import takes overlaps with the start of Ray's servers.
    threading.Thread(target=importlib.import_module, args=("torch",), daemon=True, name="import-torch").start()
    terminates = signal.getsignal(signal.SIGTERM)
    try:
        with start_processes_in_own_session() as sessions:
            ray.init(**options)
        signal.signal(signal.SIGTERM, terminates)  # Ray's handler exits with an uninformative status
    except Exception as error:  # of any type: a node that does not start in time is a plain Exception of Ray's
        where = "on this machine" if local else f"at RAY_ADDRESS={os.environ['RAY_ADDRESS']}"
        raise LaunchError(f"Ray cannot be reached {where}: {error}. `ray status` shows whether it runs") from error
    console.update_stage("starting Ray", 1, 1)
    with kill_sessions_after_death(sessions):
        try:
            yield
        finally:
            if local:
                ray.shutdown()


def get_ray_directory(run: RunDirectory) -> Path:
    """Return Ray Train's storage path: in the run's logs, or a temporary folder for a run in a store."""
    is_here = run.uri == str(run.path)
    return run.path / "logs" / "ray" if is_here else create_user_directory("llm-training-toolkit-ray")
