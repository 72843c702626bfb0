"""Linux system calls without a wrapper in Python 3.11. Each raises OSError if the kernel refuses."""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
_DETACH = 2

_PDEATHSIG, _CAPBSET_DROP, _CHILD_SUBREAPER, _NO_NEW_PRIVS = 1, 24, 36, 38
_SIGKILL = 9
_MOUNT_SETATTR = 442
_READ_ONLY_ATTRIBUTES = 1 | 2 | 4  # read-only, no set-user-id, no device files
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

_libc = ctypes.CDLL(None, use_errno=True)


def _check_result(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Move this process into new namespaces."""
    _check_result(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Mount, or bind-mount with MS_BIND."""
    words = [text.encode() for text in (source, target, kind)]
    _check_result(_libc.mount(*words, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def make_read_only(target: str, *, recursive: bool) -> None:
    """Make a mount read-only, including submounts if `recursive`. Needs Linux 5.12 or newer."""
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY_ATTRIBUTES, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    flags = _AT_RECURSIVE if recursive else 0
    result = _libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, target.encode(), flags, ctypes.byref(attributes), size)
    _check_result(result, f"make {target} read only")


def pivot_root(directory: str) -> None:
    """Make a mount the root of this process and detach the old root."""
    number = _PIVOT_ROOT.get(os.uname().machine)
    if number is None:
        raise OSError(0, f"pivot_root: its number on {os.uname().machine} is not known")
    os.chdir(directory)
    _check_result(_libc.syscall(number, b".", b"."), "pivot_root")  # stacks the old root on top of the new one
    _check_result(_libc.umount2(b".", _DETACH), "umount of the old root")
    os.chdir("/")


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends. Reset by a change of user."""
    _check_result(_libc.prctl(_PDEATHSIG, _SIGKILL), "prctl")


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    _check_result(_libc.prctl(_CHILD_SUBREAPER, 1), "prctl")


def drop_privileges() -> None:
    """Empty the capability bounding set and set NO_NEW_PRIVS, so that no program it executes gains privileges."""
    for capability in range(64):
        if _libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # past the kernel's last capability, or no right to drop it
    _check_result(_libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
