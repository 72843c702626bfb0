"""Starts one sandboxed program, kills it on timeout and outlives all its descendants.

    toolkit -> supervisor -> _run_in_namespaces -> child.py with the program    (the last as PID 1 of its namespace)

The `_run_in_namespaces` process unshares, waits until the child of `_fork_mapper` has mapped its users, and forks the
program's process, which builds its root and executes `child.py`. Each process dies with its parent. Run as a script
with one argument, the orders as JSON. Standard input is the program, standard output its report.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from llm_training_toolkit.evaluation.sandbox.supervisor import namespaces, syscalls, workdir
from llm_training_toolkit.evaluation.sandbox.supervisor.cgroup import ControlGroup

# Exit codes, beside 0. BROKEN: the containment could not be built, and standard error has the reason.
TIMED_OUT, BROKEN = 3, 4
_KILL_SECONDS = 5.0
_POLL_SECONDS = 0.02  # between two counts of files: some thousand can be made meanwhile


def main() -> None:
    """Execute the orders."""
    orders = json.loads(sys.argv[1])
    syscalls.die_with_parent()
    if os.getppid() != orders["parent"]:
        sys.exit(BROKEN)  # the toolkit died before die_with_parent() took effect
    syscalls.adopt_orphans()
    deadline = time.monotonic() + orders["seconds"]
    group = ControlGroup(orders["memory"], orders["processes"])
    home = workdir.create_workdir()
    try:
        child = _fork_child(lambda: _STARTERS[orders["kind"]](orders, group, home))
        # bubblewrap's /tmp takes no limit of files: they are counted from outside.
        limit = orders["tmp_files"] if orders["kind"] == "bubblewrap" else None
        status = _wait_for_child(child, deadline, limit)
        _kill_descendants()
    finally:
        group.remove_group()
        shutil.rmtree(home, ignore_errors=True)
    if status is None:
        sys.exit(TIMED_OUT)
    sys.exit(BROKEN if os.WIFEXITED(status) and os.WEXITSTATUS(status) == BROKEN else 0)


def _fork_child(work: Callable[[], None]) -> int:
    """Fork a child that runs `work`, which execs or exits, and that dies with this process."""
    own = os.getpid()
    child = os.fork()
    if child:
        return child
    code = BROKEN
    try:
        syscalls.die_with_parent()
        if os.getppid() in {own, 0}:  # 0 = the parent is in another process namespace
            work()
            code = 0
    except OSError as error:
        sys.stderr.write(f"{error}\n")
    finally:
        os._exit(code)  # never return into the parent's code


def _run_in_namespaces(orders: dict[str, Any], group: ControlGroup, home: str) -> None:
    """Unshare the namespaces and fork PID 1 of the new ones."""
    group.join_group()
    left, mapped = os.pipe(), os.pipe()
    helper = _fork_mapper(os.getpid(), left, mapped)
    namespaces.unshare_namespaces()
    os.write(left[1], b".")
    answer = os.read(mapped[0], 1)
    os.waitpid(helper, 0)
    if answer != b".":
        raise OSError(0, "no users can be mapped into a namespace")
    child = _fork_child(lambda: _run_first_process(orders, home))
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _fork_mapper(process: int, left: tuple[int, int], mapped: tuple[int, int]) -> int:
    """Fork a child that stays outside and maps the users of `process` once it has unshared."""

    def map_unshared_users() -> None:
        os.close(left[1])
        if os.read(left[0], 1):
            namespaces.map_users(process)
            os.write(mapped[1], b".")

    helper = _fork_child(map_unshared_users)
    os.close(mapped[1])
    return helper


def _run_first_process(orders: dict[str, Any], home: str) -> None:
    namespaces.enter_new_root(home, orders["visible"], orders["tmp_bytes"], orders["tmp_files"])
    syscalls.die_with_parent()  # reset by the change to nobody
    _exec_command(orders["command"], "/tmp")


def _run_in_bubblewrap(orders: dict[str, Any], group: ControlGroup, home: str) -> None:
    group.join_group()
    _exec_command(orders["command"], home)


def _run_uncontained(orders: dict[str, Any], group: ControlGroup, home: str) -> None:
    """Run with the limits and a working directory, without containment."""
    group.join_group()
    os.chdir(home)
    _exec_command(orders["command"], home)


_STARTERS = {"namespaces": _run_in_namespaces, "bubblewrap": _run_in_bubblewrap, "none": _run_uncontained}


def _exec_command(command: list[str], home: str) -> NoReturn:
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": home,
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
    }
    os.execve(command[0], command, environment)  # noqa: S606 - no shell is wanted


def _wait_for_child(child: int, deadline: float, tmp_files: int | None) -> int | None:
    """Wait for a child and return its status, or None if it was killed at the deadline.

    With `tmp_files` the child is killed when the /tmp of its descendants holds more files.
    """
    watched = os.pidfd_open(child)
    is_over = False
    while not (is_over or time.monotonic() > deadline):
        left = max(deadline - time.monotonic(), 0.0)
        is_over = bool(select.select([watched], [], [], left if tmp_files is None else min(left, _POLL_SECONDS))[0])
        if not is_over and tmp_files is not None and _count_tmp_files(child) > tmp_files:
            os.kill(child, signal.SIGKILL)
            is_over = True
    os.close(watched)
    if not is_over:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status if is_over else None


def _count_tmp_files(child: int) -> int:
    """Return the number of files in the /tmp of a child's descendants; 0 before it is mounted."""
    processes, own = [child], os.stat("/tmp").st_dev  # noqa: PTH116 - pathlib would be another import
    for process in processes:
        processes += _list_children(process)
    for process in processes:
        with suppress(OSError):
            place = f"/proc/{process}/root/tmp"
            if os.stat(place).st_dev != own:  # noqa: PTH116
                found = os.statvfs(place)
                return found.f_files - found.f_ffree
    return 0


def _kill_descendants() -> None:
    """Kill all remaining descendants: orphans are reparented to this process, so each round reaches one level more."""
    end = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < end:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        for child in _list_children(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def _list_children(process: int) -> list[int]:
    """Return the children of a process; none if it is gone."""
    try:
        with open(f"/proc/{process}/task/{process}/children") as file:  # noqa: PTH123 - pathlib would be another import
            return [int(word) for word in file.read().split()]
    except OSError:
        return []
