"""Starts one contained program, ends it when its time is up, and outlives everything it started.

    toolkit -> supervisor -> doorkeeper -> driver and program        (the last as process 1 of its own namespace)

The doorkeeper leaves the namespaces, waits until the supervisor has mapped its users, and starts the program's process,
which builds its root and becomes the driver. Each dies with the one before it. Called as a script with one argument,
the orders as JSON; the program is the standard input, what it reports the standard output.
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

TIMED_OUT, BROKEN = 3, 4
"""Exit codes: the time was up; the containment could not be built, as the standard error says. 0 otherwise."""
_KILL_SECONDS = 5.0


def main() -> None:
    """Carry out the orders."""
    orders = json.loads(sys.argv[1])
    syscalls.die_with_parent()
    if os.getppid() != orders["parent"]:
        sys.exit(BROKEN)  # the toolkit was gone before this process could say that it wants to die with it
    syscalls.adopt_orphans()
    deadline = time.monotonic() + orders["seconds"]
    group = ControlGroup(orders["memory"], orders["processes"])
    home = workdir.create_workdir()
    try:
        child = _fork_child(lambda: _STARTERS[orders["kind"]](orders, group, home))
        status = _wait_for_child(child, deadline)
        _kill_descendants()
    finally:
        group.remove_group()
        shutil.rmtree(home, ignore_errors=True)
    if status is None:
        sys.exit(TIMED_OUT)
    sys.exit(BROKEN if os.WIFEXITED(status) and os.WEXITSTATUS(status) == BROKEN else 0)


def _fork_child(work: Callable[[], None]) -> int:
    """A child that does some work, which ends in another program or in its own end, and dies with this process."""
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
        os._exit(code)  # never back into the parent's code


def _run_in_namespaces(orders: dict[str, Any], group: ControlGroup, home: str) -> None:
    """The doorkeeper: leaves the namespaces and starts process 1 of new ones."""
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
    """A child that stays outside and maps the users of a process once that has left its namespaces."""

    def map_unshared_users() -> None:
        os.close(left[1])
        if os.read(left[0], 1):
            namespaces.map_users(process)
            os.write(mapped[1], b".")

    helper = _fork_child(map_unshared_users)
    os.close(mapped[1])
    return helper


def _run_first_process(orders: dict[str, Any], home: str) -> None:
    namespaces.enter_new_root(home, orders["visible"], orders["room"])
    syscalls.die_with_parent()  # becoming nobody has undone it
    _exec_command(orders["command"], "/tmp")


def _run_in_bubblewrap(orders: dict[str, Any], group: ControlGroup, home: str) -> None:
    group.join_group()
    _exec_command(orders["command"], home)


def _run_uncontained(orders: dict[str, Any], group: ControlGroup, home: str) -> None:
    """No containment but limits and the folder the program begins in."""
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


def _wait_for_child(child: int, deadline: float) -> int | None:
    """The status a child ended with; None where it was killed because the time was up."""
    watched = os.pidfd_open(child)
    ready, _, _ = select.select([watched], [], [], max(deadline - time.monotonic(), 0.0))
    os.close(watched)
    if not ready:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status if ready else None


def _kill_descendants() -> None:
    """End whatever is left: orphans become children of this process, and of theirs in the next round."""
    end = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < end:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        for child in _list_children():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def _list_children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:  # noqa: PTH123 - pathlib would be another import
        return [int(word) for word in file.read().split()]
