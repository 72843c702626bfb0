"""Containment by the kernel's namespaces: no other files, no network, no other processes.

The program sees a root of its own that holds the system's libraries and Python, read only, a folder `/tmp` in memory
that ends with it, five device files, and nothing else of the machine. It is process 1 of its own process namespace:
when it ends, the kernel kills whatever it has started.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llm_training_toolkit.evaluation.sandbox.supervisor import syscalls

_NAMESPACES = (
    syscalls.CLONE_NEWUSER
    | syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWCGROUP
)
_NOBODY = 65534
_DEVICES = ("null", "zero", "full", "random", "urandom")


def unshare_namespaces() -> None:
    """Leave every namespace; the next child is process 1 of a new one."""
    syscalls.unshare(_NAMESPACES)


def map_users(process: int) -> None:
    """From outside, give a process that has left its namespaces the user ids 0 and 65534, or 65534 alone.

    Root maps to two users: as root the program's folders are put together, as nobody it runs, because the kernel does
    not limit the number of root's processes. Anyone else has no other user than himself to map to.
    """
    try:
        for name in ("uid_map", "gid_map"):
            _write_kernel_file(f"/proc/{process}/{name}", f"0 0 1\n{_NOBODY} {_NOBODY} 1\n")
    except OSError:
        _write_kernel_file(f"/proc/{process}/uid_map", f"{_NOBODY} {os.geteuid()} 1\n")
        _write_kernel_file(f"/proc/{process}/setgroups", "deny")
        _write_kernel_file(f"/proc/{process}/gid_map", f"{_NOBODY} {os.getegid()} 1\n")


def enter_new_root(root: str, visible: Sequence[str], room: int) -> None:
    """Build the program's root in an empty directory, enter it and become nobody. `room` bytes are free in /tmp."""
    plain = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount("tmpfs", root, "tmpfs", syscalls.MS_NOSUID, "size=1m,mode=755")
    for name in ("proc", "tmp", "dev"):
        Path(root, name).mkdir()
    with suppress(PermissionError):  # in a container whose own /proc is partly hidden there is none to be had
        syscalls.mount("proc", f"{root}/proc", "proc", plain | syscalls.MS_NOEXEC)
    syscalls.mount("tmpfs", f"{root}/tmp", "tmpfs", plain, f"size={room},nr_inodes=4096,mode=1777")
    for name in _DEVICES:
        Path(root, "dev", name).touch()
        syscalls.mount(f"/dev/{name}", f"{root}/dev/{name}", "", syscalls.MS_BIND)
    for path in visible:  # after /tmp, below which a Python may live
        _bind_mount_read_only(path, root)
    syscalls.pivot_root(root)
    with suppress(OSError):  # namespaces within namespaces: nothing gained by them, and more of the kernel to attack
        _write_kernel_file("/proc/sys/user/max_user_namespaces", "0")
    syscalls.make_read_only("/", recursive=False)
    os.chdir("/tmp")
    _become_nobody()


def _bind_mount_read_only(path: str, root: str) -> None:
    """Let a path of the machine be seen under the new root, read only, or be the link it is."""
    target = Path(root + path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if Path(path).is_symlink():
        target.symlink_to(Path(path).readlink())
        return
    if Path(path).is_dir():
        target.mkdir(exist_ok=True)
    else:
        target.touch()
    syscalls.mount(path, str(target), "", syscalls.MS_BIND | syscalls.MS_REC)
    syscalls.make_read_only(str(target), recursive=True)


def _become_nobody() -> None:
    """Where there are two users, be the one without rights; where there is one, he has been it from the start."""
    if os.getuid() != _NOBODY:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    syscalls.drop_privileges()


def _write_kernel_file(path: str, text: str) -> None:
    """Write in one piece, as the kernel's own files want it."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
