"""Run directory: its paths, its lock and its environment record.

The only owner of the layout in PROJECT_STRUCTURE.md. The driver locks the directory, rank 0 begins an attempt, `ltt
runs` and the next start read the files.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from llm_training_toolkit.config.uri import redact_text
from llm_training_toolkit.errors import CheckpointError, LaunchError
from llm_training_toolkit.runs.atomic_write import create_directory
from llm_training_toolkit.runs.storage.storage import LocalStorage, Storage

_CHECKPOINT = re.compile(r"step_(\d{9})_a(\d+)")
_PACKAGES = (
    *("llm-training-toolkit", "torch", "deepspeed", "ray", "transformers", "peft"),
    *("tokenizers", "numpy", "pyarrow"),
)


class RunLock(Protocol):
    """Lock or lease of a run, as its holder sees it."""

    def is_lost(self) -> bool:
        """Return whether the run was taken over or removed since."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run, and the storage behind them."""

    path: Path
    storage: Storage = field(default_factory=LocalStorage, compare=False, repr=False)
    lock: RunLock | None = field(default=None, compare=False, repr=False)
    """Set if this process locked the run."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    @property
    def uri(self) -> str:
        """Location of the run, valid on every machine."""
        return self.storage.get_uri(self.path)

    @property
    def config_path(self) -> Path:
        """YAML file as the user wrote it."""
        return self.path / "config.yaml"

    @property
    def resolved_config_path(self) -> Path:
        """Full configuration as workers read it."""
        return self.path / "resolved.json"

    @property
    def plan_path(self) -> Path:
        """Plan as printed by `ltt plan --json`."""
        return self.path / "plan.json"

    @property
    def environment_path(self) -> Path:
        """Versions and machine of the newest attempt."""
        return self.path / "env.json"

    @property
    def metrics_path(self) -> Path:
        """Metrics, one JSON object a line, append-only."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard_dir(self) -> Path:
        """TensorBoard event files."""
        return self.path / "tb"

    @property
    def dataset_info_path(self) -> Path:
        """`DatasetInfo`: counts of the preparation and paths of the tokens."""
        return self.path / "data" / "dataset_info.json"

    @property
    def fault_report_path(self) -> Path:
        """Documents that the preparation skipped, by kind, with their places. Absent if there are none."""
        return self.path / "data" / "faults.json"

    @property
    def preparation_state_path(self) -> Path:
        """State of the background preparation of later data: working, done, or failed with the reason."""
        return self.path / "data" / "preparation.json"

    @property
    def attempts_dir(self) -> Path:
        """Attempt records, one JSON file each."""
        return self.path / "attempts"

    @property
    def checkpoints_dir(self) -> Path:
        """Checkpoints, one directory each."""
        return self.path / "checkpoints"

    @property
    def export_dir(self) -> Path:
        """Hugging Face directory written when the run finishes."""
        return self.path / "export"

    @property
    def task_export_dir(self) -> Path:
        """Temporary export of an intermediate step, while tasks measure it."""
        return self.path / "export_for_tasks"

    @property
    def base_weights_dir(self) -> Path:
        """Base weights of adapters as a Hugging Face directory, unless they came from one."""
        return self.path / "base"

    @property
    def evaluations_dir(self) -> Path:
        """Evaluation results, one JSON file for each task, step, data and settings."""
        return self.path / "eval"

    @property
    def sample_log_dir(self) -> Path:
        """Sample log of each rank of each attempt, if `failures.log_samples` is set."""
        return self.path / "samples"

    def check_lock(self) -> None:
        """Raise LaunchError if another command has taken the run since this process locked it, or it was removed."""
        if self.lock is not None and self.lock.is_lost():
            raise LaunchError(
                f"{self.uri}: another command has taken over this run, or it was removed while this command worked on "
                "it. This command ends and leaves the directory as it is"
            )

    def get_profile_dir(self, attempt: int) -> Path:
        """Return the directory with the profile of each rank, if `profile` is set."""
        return self.path / "profile" / f"attempt_{attempt}"

    @property
    def driver_log_path(self) -> Path:
        """Log of the driver, and of Ray's output on it."""
        return self.path / "logs" / "driver.log"

    def get_rank_log_path(self, attempt: int, rank: int) -> Path:
        """Return a rank's log: our messages, and the output of libraries."""
        return self.get_log_dir(attempt) / f"rank_{rank}.log"

    def get_log_dir(self, attempt: int) -> Path:
        """Return the directory with one log file a rank."""
        return self.path / "logs" / f"attempt_{attempt}"

    def get_checkpoint_dir(self, step: int, attempt: int) -> Path:
        """Return the directory of the checkpoint that `attempt` writes after `step` steps."""
        return self.checkpoints_dir / f"step_{step:09d}_a{attempt}"


def parse_checkpoint_name(path: Path) -> tuple[int, int] | None:
    """Return (step, attempt) from the name of a checkpoint directory, or None for other names."""
    match = _CHECKPOINT.fullmatch(path.name)
    return (int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class _FileLock:
    """Lock file that this process locked; a run begun anew in its place has another."""

    path: Path
    device: int
    inode: int
    note: bytes
    """Content of the file: this process, and a token by which it knows its own lock."""

    def is_lost(self) -> bool:
        """Return whether another file, or none, has the name; False if the file system does not tell.

        Some file systems number a file anew at each look: then the content decides.
        """
        try:
            found = self.path.stat()
            is_same = (found.st_dev, found.st_ino) == (self.device, self.inode)
            return not is_same and self.path.read_bytes() != self.note
        except OSError as error:
            return isinstance(error, FileNotFoundError)


@contextmanager
def lock_run_directory(run: RunDirectory) -> Iterator[RunDirectory]:
    """Lock the run for this process and yield it with its lock, which ends with the process, however it ends.

    Raises LaunchError if another process holds it: two writers would interleave their checkpoints.
    """
    try:
        create_directory(run.path)
        lock = (run.path / "lock").open("a+b", buffering=0)
    except OSError as error:
        raise LaunchError(f"run directory {run.path}: cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder, _, _ = lock.read().decode().partition("\n")
            raise LaunchError(
                f"run {run.path} is already running ({holder or 'holder unknown'}): "
                "wait for it or stop it, or give this one another run.name"
            ) from None
        except OSError as error:
            raise LaunchError(
                f"run directory {run.path}: its file system keeps no locks ({error.strerror}), so nothing would keep "
                "two processes out of one run. Mount it with them (Lustre: -o flock), or set run.dir elsewhere"
            ) from error
        note = f"process {os.getpid()} on {socket.gethostname()}\n{secrets.token_hex(8)}\n".encode()
        with suppress(OSError):  # the note is a courtesy, and a full disk may have room again in a moment
            lock.truncate(0)
            lock.write(note)
        opened = os.fstat(lock.fileno())
        yield replace(run, lock=_FileLock(run.path / "lock", opened.st_dev, opened.st_ino, note))


def collect_environment() -> dict[str, Any]:
    """Return the facts needed to repeat the run elsewhere: versions, machine, command."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "host": socket.gethostname(),
        "command": [redact_text(word) for word in sys.argv],
        "versions": versions,
    }


def find_model_directory(path: Path) -> Path:
    """Return the exported directory at a path, or that of the run there. Raises CheckpointError without either."""
    path = path.expanduser().absolute()  # a model may be the working directory
    run = RunDirectory(path)
    if run.resolved_config_path.is_file():
        if not run.export_dir.is_dir():
            raise CheckpointError(
                f"{path} is a run without an export: ltt export {path} makes one of its newest checkpoint"
            )
        return run.export_dir
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise CheckpointError(
            f"{path}: neither a run nor a model there: name a run's directory, or an exported one such as RUN/export"
        )
    return path


def check_run(run: RunDirectory) -> RunDirectory:
    """Return the run. Raises CheckpointError if there is none in its directory."""
    if not run.resolved_config_path.is_file():
        raise CheckpointError(
            f"{run.path}: no run there (no resolved.json): name a run's directory, such as runs/my-run"
        )
    return run
