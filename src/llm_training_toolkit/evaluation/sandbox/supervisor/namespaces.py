"""Containment by kernel namespaces: own files, own processes, an empty network.

The program sees its own root: system libraries and Python read-only, a `/tmp` in memory that disappears with it, and
five device files. Its process is PID 1 of its own PID namespace, so the kernel kills all its descendants when it exits.
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
_KERNEL_SETTINGS = ("sys", "sysrq-trigger", "irq", "bus")
_DEVICES = ("null", "zero", "full", "random", "urandom")


def unshare_namespaces() -> None:
    """Leave all namespaces. The next child becomes PID 1 of a new one."""
    syscalls.unshare(_NAMESPACES)


def map_users(process: int) -> None:
    """From outside, map user ids into a process that called `unshare_namespaces`: 0 and 65534, or 65534 alone.

    Root maps two users. The root file system is built as root, and the program runs as `nobody`, because the kernel
    leaves root's process count unlimited. An unprivileged user can map only itself.
    """
    try:
        for name in ("uid_map", "gid_map"):
            _write_kernel_file(f"/proc/{process}/{name}", f"0 0 1\n{_NOBODY} {_NOBODY} 1\n")
    except OSError:
        _write_kernel_file(f"/proc/{process}/uid_map", f"{_NOBODY} {os.geteuid()} 1\n")
        _write_kernel_file(f"/proc/{process}/setgroups", "deny")
        _write_kernel_file(f"/proc/{process}/gid_map", f"{_NOBODY} {os.getegid()} 1\n")


def enter_new_root(root: str, visible: Sequence[str], tmp_bytes: int, tmp_files: int) -> None:
    """Build the program's root in an empty directory, pivot into it and become nobody."""
    plain = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.mount("tmpfs", root, "tmpfs", syscalls.MS_NOSUID, "size=1m,mode=755")
    for name in ("proc", "tmp", "dev"):
        Path(root, name).mkdir()
    with suppress(PermissionError):  # refused inside a container with a partly masked /proc
        syscalls.mount("proc", f"{root}/proc", "proc", plain | syscalls.MS_NOEXEC)
    bounds = f"size={tmp_bytes},nr_inodes={tmp_files},mode=1777"
    syscalls.mount("tmpfs", f"{root}/tmp", "tmpfs", plain, bounds)
    for name in _DEVICES:
        Path(root, "dev", name).touch()
        syscalls.mount(f"/dev/{name}", f"{root}/dev/{name}", "", syscalls.MS_BIND)
    for path in visible:  # after the /tmp mount, which would hide a Python below /tmp
        _bind_mount_read_only(path, root)
    syscalls.pivot_root(root)
    with suppress(OSError):  # nested namespaces are of no use to programs and widen the kernel's attack surface
        _write_kernel_file("/proc/sys/user/max_user_namespaces", "0")
    _cover_kernel_settings()
    syscalls.make_read_only("/", recursive=False)
    os.chdir("/tmp")
    _become_nobody()


def _cover_kernel_settings() -> None:
    """Make the files of /proc read-only that act on the whole machine, even for a user that the kernel takes for root.

    Some are absent, and a container may have masked them all.
    """
    for name in _KERNEL_SETTINGS:
        path = f"/proc/{name}"
        if os.path.exists(path):  # noqa: PTH110 - pathlib would raise for a masked one
            syscalls.mount(path, path, "", syscalls.MS_BIND | syscalls.MS_REC)
            syscalls.make_read_only(path, recursive=True)


def _bind_mount_read_only(path: str, root: str) -> None:
    """Bind-mount a path read-only under the new root, or recreate it if it is a symlink."""
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
    """Switch to user 65534 and drop privileges. With a single mapped user the process already is 65534."""
    if os.getuid() != _NOBODY:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    syscalls.drop_privileges()


def _write_kernel_file(path: str, text: str) -> None:
    """Write with a single write call, which kernel files require."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
