"""Selects the containment by a self-check on this machine: kernel namespaces, bubblewrap, or none."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from functools import cache
from pathlib import Path

from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.evaluation.sandbox.run import SandboxKind, SandboxLimits, run_program
from llm_training_toolkit.evaluation.sandbox.supervisor.workdir import remove_stale_workdirs

_LIMITS = SandboxLimits(seconds=20.0)
_SANDBOX_NAMES = {
    "bubblewrap": "bubblewrap",
    "namespaces": "the kernel's namespaces",
    "none": "nothing but limits of memory and time (--unsafe)",
}
_SELF_CHECK = """
import os, socket, time
outside, port, processes = {outside!r}, {port}, {processes}
if os.path.exists(outside):
    raise RuntimeError("it sees files outside of its folder")
for folder in ("/", "/usr", "/etc", "/dev", "/dev/shm", {prefix!r}):
    try:
        open(folder + "/ltt-probe", "w")
    except OSError:
        continue
    raise RuntimeError(f"it can write into {{folder}}")
for setting in ("kernel/core_pattern", "kernel/modprobe", "fs/lease-break-time", "vm/overcommit_memory"):
    try:
        open("/proc/sys/" + setting, "r+")
    except OSError:
        continue
    raise RuntimeError(f"it can change the kernel's setting {{setting}}")
try:
    os.setxattr("/tmp", "user.ltt", b"x")
except OSError:
    pass
else:
    raise RuntimeError("it can keep data in attributes of files, which no limit counts")
try:
    socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
except OSError:
    pass
else:
    raise RuntimeError("it reaches the hypervisor (AF_VSOCK)")
try:
    for number in range({files}):
        with open(f"/tmp/{{number}}", "wb") as file:
            file.write(bytes({file_bytes}))
except OSError:
    pass
else:
    raise RuntimeError("it can fill more than the room of /tmp")
try:
    socket.create_connection(("127.0.0.1", port), timeout=2)
except OSError:
    pass
else:
    raise RuntimeError("it reaches the network")
try:
    os.kill({parent}, 0)
except ProcessLookupError:
    pass
else:
    raise RuntimeError("it sees other processes")
children = []
try:
    while len(children) <= processes:
        child = os.fork()
        if not child:
            time.sleep(10)
            os._exit(0)
        children.append(child)
except OSError:
    pass
else:
    raise RuntimeError(f"it may start more than {{processes}} processes")
finally:
    for child in children:
        os.kill(child, 9)
"""

_MANY_FILES = """
for number in range(30_000):
    open(f"/tmp/{number}", "w").close()
"""


def format_sandbox_kind(kind: SandboxKind) -> str:
    """Return the containment's name for users."""
    return _SANDBOX_NAMES[kind]


def find_sandbox_kind(*, unsafe: bool = False) -> SandboxKind:
    """Return the first containment that passes its self-check, which runs once a process.

    Raises LaunchError with the problems found if all fail. With `unsafe` returns "none" instead.
    """
    remove_stale_workdirs()
    found: dict[str, str] = {}
    # bubblewrap second: its program is, to the kernel, the user who started it, and its /tmp has no limit of files.
    kinds: tuple[SandboxKind, ...] = ("namespaces", "bubblewrap")
    for kind in kinds:
        problem = find_sandbox_problem(kind)
        if not problem:
            return kind
        found[_SANDBOX_NAMES[kind]] = problem
    if unsafe:
        return "none"
    listed = "; ".join(f"{name}: {problem}" for name, problem in found.items())
    raise LaunchError(
        f"programs that a model wrote cannot be contained on this machine ({listed}). Install bubblewrap, allow user "
        "namespaces, or say --unsafe where losing everything that this user may write is no loss"
    )


@cache
def find_sandbox_problem(kind: SandboxKind) -> str:
    """Return why a containment is unusable here, tested by a program that tries to escape; empty if it holds."""
    if kind == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    with tempfile.TemporaryDirectory(prefix="ltt-") as folder, socket.create_server(("127.0.0.1", 0)) as server:
        outside = Path(folder, "outside")
        outside.touch()
        program = _SELF_CHECK.format(
            outside=str(outside),
            port=server.getsockname()[1],
            processes=_LIMITS.processes,
            prefix=sys.prefix,
            parent=os.getpid(),
            files=_LIMITS.tmp_bytes // _LIMITS.max_file_bytes + 2,
            file_bytes=_LIMITS.max_file_bytes,
        )
        try:
            ended = run_program(program, kind, _LIMITS)
            many = run_program(_MANY_FILES, kind, _LIMITS)
        except LaunchError as error:
            return f"it cannot be built here ({error})"
    if ended.end == "passed":
        return "it may make any number of files" if many.end == "passed" else ""
    return ended.error.removeprefix("RuntimeError: ") or f"its check {ended.end}"
