"""Memory and process limits for a program and all its descendants, by a cgroup if this process may create one."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_PREFIX = "ltt-"  # of a group's name, followed by the pid of its supervisor
_REMOVAL_SECONDS = 2.0


class ControlGroup:
    """Directories of a cgroup: one in v2, one per controller in v1, empty without permission."""

    def __init__(self, memory: int, processes: int) -> None:
        self._directories: list[Path] = []
        for parent, limits in _find_parent_groups(memory, processes):
            _remove_stale_groups(parent)
            directory = parent / f"{_PREFIX}{os.getpid()}"
            with suppress(OSError):
                directory.mkdir()
                self._directories.append(directory)
            for file, value in limits.items():
                with suppress(OSError):  # a kernel without swap lacks its limit file; the other limits still apply
                    (directory / file).write_text(str(value))

    def join_group(self) -> None:
        """Move this process, and so its future children, into the group if permitted."""
        for directory in self._directories:
            with suppress(OSError):
                (directory / "cgroup.procs").write_text("0")

    def remove_group(self) -> None:
        """Remove the group, after waiting up to 2 s for its processes to exit."""
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
    """Remove groups of killed supervisors. The kernel refuses for a group that still has processes."""
    for group in parent.glob(f"{_PREFIX}*"):
        owner = group.name.removeprefix(_PREFIX)
        if owner == str(os.getpid()) or not Path("/proc", owner).exists():
            with suppress(OSError):
                group.rmdir()


def _find_parent_groups(memory: int, processes: int) -> list[tuple[Path, dict[str, int]]]:
    """Return the groups to create a new one in, each with the limit files to write."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    paths = {name: path for _, names, path in lines for name in names.split(",")}
    limits = {"memory": {"memory.limit_in_bytes": memory}, "pids": {"pids.max": processes}}
    if found := [(_ROOT / name / paths[name].lstrip("/"), limits[name]) for name in limits if name in paths]:
        return found
    own = _ROOT / paths.get("", "").lstrip("/")
    # A v2 group holds either processes or groups, so take the nearest ancestor that delegates controllers.
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
