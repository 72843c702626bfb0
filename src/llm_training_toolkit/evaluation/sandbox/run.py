"""Runs programs in the sandbox, several in parallel, and returns the outcome of each."""

from __future__ import annotations

import json
import os
import secrets
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, Literal

from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.evaluation.sandbox.supervisor.supervisor import TIMED_OUT

SandboxKind = Literal["bubblewrap", "namespaces", "none"]
ProgramOutcome = Literal["passed", "failed", "timed out", "crashed"]
MEGABYTE = 1 << 20
# Paths that Python needs besides its own directories.
_SYSTEM_PATHS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/nix/store", "/etc/ld.so.cache")
# A report has two short lines. More output comes from a program that found a way to write, and stays unread.
_REPORT_BYTES = 4096
_GRACE_SECONDS = 20.0  # for the supervisor to kill everything after the timeout


@dataclass(frozen=True)
class SandboxLimits:
    """Resource limits of one program."""

    seconds: float = 10.0
    """Wall-clock timeout."""
    memory: int = 1024 * MEGABYTE
    """Bytes, for each process; with control groups also for all processes together."""
    processes: int = 16
    """Maximum threads and processes at a time."""
    max_file_bytes: int = 16 * MEGABYTE
    """Maximum size of one file."""
    max_open_files: int = 64
    """Maximum files open at a time."""
    tmp_bytes: int = 64 * MEGABYTE
    """Maximum bytes of all files together."""
    tmp_files: int = 4096
    """Maximum files and directories together: each takes memory of the kernel, even an empty one."""

    def to_rlimits(self) -> dict[str, int]:
        """Return the limits by the constant names of Python's `resource` module."""
        return {
            "RLIMIT_AS": self.memory,
            "RLIMIT_CPU": int(self.seconds) + 1,
            "RLIMIT_FSIZE": self.max_file_bytes,
            "RLIMIT_NOFILE": self.max_open_files,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True)
class ProgramResult:
    """Outcome of a program. `crashed`: it died before it could report a verdict."""

    end: ProgramOutcome
    error: str = ""
    """Exception of a failed program."""


def run_programs(
    programs: Sequence[str],
    kind: SandboxKind,
    limits: SandboxLimits,
    at_a_time: int,
    done: Callable[[int], None] | None = None,
) -> list[ProgramResult]:
    """Run programs, `at_a_time` in parallel. `done` receives the number finished so far."""
    ends: list[ProgramResult] = []
    with ThreadPoolExecutor(at_a_time) as threads:
        try:
            for ended in threads.map(partial(run_program, kind=kind, limits=limits), programs):
                ends.append(ended)
                if done is not None:
                    done(len(ends))
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return ends


def run_program(program: str, kind: SandboxKind, limits: SandboxLimits) -> ProgramResult:
    """Run one Python program until it exits or times out.

    Raises LaunchError with the machine's error message if the containment cannot be built.
    """
    secret = secrets.token_hex(16)
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(f"{secret}\n".encode() + program.encode(errors="replace"))
        given.seek(0)
        orders = json.dumps(_build_orders(kind, limits))
        command = [sys.executable, "-I", "-S", "-B", "-c", _SUPERVISOR_CODE, str(_SOURCE_ROOT), orders]
        with subprocess.Popen(
            command, stdin=given, stdout=subprocess.PIPE, stderr=said, cwd="/", start_new_session=True
        ) as supervisor:
            assert supervisor.stdout is not None
            try:
                end = time.monotonic() + limits.seconds + _GRACE_SECONDS
                report = _read_pipe(supervisor.stdout, end)
                code = _wait_for_exit(supervisor, end)
            finally:
                supervisor.kill()
        said.seek(0)
        return _parse_report(report.decode(errors="replace"), secret, code, said.read(2000).decode(errors="replace"))


def _parse_report(report: str, secret: str, code: int, said: str) -> ProgramResult:
    lines = [line.removeprefix(f"{secret} ") for line in report.splitlines() if line.startswith(f"{secret} ")]
    if "started" not in lines:
        if code == TIMED_OUT:
            return ProgramResult("timed out")
        raise LaunchError(said.strip() or f"the program's supervisor ended with {code} and said nothing")
    verdict, _, error = lines[-1].partition(" ")
    if code == TIMED_OUT:
        return ProgramResult("timed out")
    if verdict == "passed":
        return ProgramResult("passed")
    return ProgramResult("failed", error) if verdict == "failed" else ProgramResult("crashed")


def _read_pipe(pipe: IO[bytes], end: float) -> bytes:
    """Read until end of file, `_REPORT_BYTES` or `end` of the monotonic clock, whichever comes first."""
    found = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(found) < _REPORT_BYTES and selector.select(max(end - time.monotonic(), 0.0)):
            piece = os.read(pipe.fileno(), _REPORT_BYTES)
            if not piece:
                break
            found += piece
    return found


def _wait_for_exit(supervisor: subprocess.Popen[bytes], end: float) -> int:
    with suppress(subprocess.TimeoutExpired):
        return supervisor.wait(max(end - time.monotonic(), 0.0))
    supervisor.kill()
    return supervisor.wait()


_SOURCE_ROOT = Path(__file__).parents[3]
# Run with -I -S: unaffected by the environment and installed packages, and starts in 10 ms.
_SUPERVISOR_CODE = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from llm_training_toolkit.evaluation.sandbox.supervisor.supervisor import main; main()"
)


@cache
def _read_driver_code() -> str:
    return Path(__file__).with_name("child.py").read_text(encoding="utf-8")


def _build_orders(kind: SandboxKind, limits: SandboxLimits) -> dict[str, object]:
    command = [sys.executable, "-I", "-B", "-c", _read_driver_code(), json.dumps(limits.to_rlimits())]
    return {
        "kind": kind,
        "parent": os.getpid(),
        "seconds": limits.seconds,
        "memory": limits.memory,
        "processes": limits.processes,
        "tmp_bytes": limits.tmp_bytes,
        "tmp_files": limits.tmp_files,
        "visible": find_visible_paths(),
        "command": [*_build_bwrap_arguments(limits), *command] if kind == "bubblewrap" else command,
    }


@cache
def find_visible_paths() -> list[str]:
    """Return the paths visible in the sandbox: system libraries, and this Python with its packages."""
    own = {sys.prefix, sys.base_prefix, sys.exec_prefix}
    own |= {os.path.realpath(path) for path in own}
    seen = [path for path in _SYSTEM_PATHS if Path(path).exists()]
    for path in sorted(own):
        if not any(Path(path).is_relative_to(other) for other in seen):
            seen.append(path)
    return seen


@cache
def _find_bwrap_command() -> tuple[str, ...]:
    """Return the bwrap command, with nested user namespaces disabled if it is 0.8 or newer."""
    path = shutil.which("bwrap") or "bwrap"
    known = subprocess.run([path, "--help"], capture_output=True, text=True, check=False).stdout
    return (path, "--disable-userns") if "--disable-userns" in known else (path,)


def _build_bwrap_arguments(limits: SandboxLimits) -> Iterator[str]:
    yield from _find_bwrap_command()
    yield from ("--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--cap-drop", "ALL")
    # To the kernel, nobody here is the user who started bwrap. Of root's processes it allows every setting.
    yield from ("--uid", "65534", "--gid", "65534", "--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys")
    yield from ("--dev", "/dev")
    yield from ("--remount-ro", "/dev")  # a tmpfs without a size limit, /dev/shm included
    yield from ("--size", str(limits.tmp_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp", "--setenv", "HOME", "/tmp")
    for path in find_visible_paths():  # after the /tmp mount, which would hide a Python below /tmp
        link = Path(path).is_symlink()
        yield from ("--symlink", str(Path(path).readlink()), path) if link else ("--ro-bind", path, path)
    yield from ("--remount-ro", "/", "--")
