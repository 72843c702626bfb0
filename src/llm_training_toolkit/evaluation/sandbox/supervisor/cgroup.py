"""Limits for a program and all it starts together, by a control group, where this process may make one."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_PREFIX = "ltt-"
"""Of a group's name, before the number of the process that made it."""
_REMOVAL_SECONDS = 2.0


class ControlGroup:
    """A group's directories: one in version 2, one for each controller in version 1; none where none is allowed."""

    def __init__(self, memory: int, processes: int) -> None:
        self._directories: list[Path] = []
        for parent, limits in _find_parent_groups(memory, processes):
            _remove_stale_groups(parent)
            directory = parent / f"{_PREFIX}{os.getpid()}"
            with suppress(OSError):
                directory.mkdir()
                self._directories.append(directory)
            for file, value in limits.items():
                with suppress(OSError):  # a kernel without swap has no limit of it, and the others hold still
                    (directory / file).write_text(str(value))

    def join_group(self) -> None:
        """Put this process, and what it starts from now on, into the group, where that is allowed."""
        for directory in self._directories:
            with suppress(OSError):
                (directory / "cgroup.procs").write_text("0")

    def remove_group(self) -> None:
        """Take the group away, once nothing is in it."""
        end = time.monotonic() + _REMOVAL_SECONDS
        for directory in self._directories:
            while directory.is_dir():
                with suppress(OSError):
                    directory.rmdir()
                    break
                if time.monotonic() > end:
                    return
                time.sleep(0.01)


def _remove_stale_groups(parent: Path) -> None:
    """Remove the groups of supervisors that were killed; where processes are in one, the kernel refuses."""
    for group in parent.glob(f"{_PREFIX}*"):
        owner = group.name.removeprefix(_PREFIX)
        if owner == str(os.getpid()) or not Path("/proc", owner).exists():
            with suppress(OSError):
                group.rmdir()


def _find_parent_groups(memory: int, processes: int) -> list[tuple[Path, dict[str, int]]]:
    """The groups that a new one may be made in, each with what is written into it."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    paths = {name: path for _, names, path in lines for name in names.split(",")}
    limits = {"memory": {"memory.limit_in_bytes": memory}, "pids": {"pids.max": processes}}
    if found := [(_ROOT / name / paths[name].lstrip("/"), limits[name]) for name in limits if name in paths]:
        return found
    own = _ROOT / paths.get("", "").lstrip("/")
    # In version 2 a group holds either processes or groups: the nearest one above that may hold groups.
    for group in (own, *own.parents):
        if group.is_relative_to(_ROOT) and _can_hold_groups(group):
            return [(group, {"memory.max": memory, "memory.swap.max": 0, "pids.max": processes})]
    return []


def _can_hold_groups(group: Path) -> bool:
    try:
        controllers = (group / "cgroup.subtree_control").read_text().split()
    except OSError:
        return False
    return {"memory", "pids"} <= set(controllers) and os.access(group, os.W_OK)
