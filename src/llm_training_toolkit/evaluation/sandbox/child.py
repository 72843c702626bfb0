"""Runs one program inside the sandbox and reports the outcome.

`run.py` passes this file's text to Python. Standard input: a secret on the first line, then the program. Argument: the
limits as JSON. A report must repeat the secret, and the program's own output goes to /dev/null. Imports the standard
library only. Before the program starts, a seccomp filter blocks the system calls that would bypass its limits, for
itself and all descendants.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import struct
import sys
import types

_MAX_ERROR_CHARACTERS = 200  # of an error message in the report
# Column in the tables of calls, and the kernel's AUDIT_ARCH value.
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
# System calls (numbers on x86_64, aarch64) that allocate memory outside every per-process limit.
_UNACCOUNTED_MEMORY_CALLS = {
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "io_uring_setup": (425, 425),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
}
# System calls with a history of kernel exploits that no such program needs.
_ATTACK_SURFACE_CALLS = {
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "fsopen": (430, 430),
    "open_tree": (428, 428),
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
}
_CLONE, _PRCTL, _SOCKET = (56, 220), (157, 167), (41, 198)
_CLONE3, _NEW_NAMESPACES, _OTHER_CALLS = 435, 0x7E020000, 0x40000000
_AF_ALG, _AF_VSOCK = 38, 40  # the kernel's ciphers; the hypervisor, which network namespaces do not hide
_PDEATHSIG, _SECCOMP, _FILTER, _NO_NEW_PRIVS = 1, 22, 2, 38
_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000


def main() -> None:
    """Report `started`, run the program, then report `passed` or `failed` with the error."""
    secret, source = sys.stdin.buffer.read().split(b"\n", 1)
    _install_seccomp_filter(os.uname().machine)
    report, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    for name, value in json.loads(sys.argv[1]).items():
        resource.setrlimit(getattr(resource, name), (value, value))
    os.write(report, secret + b" started\n")
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "program", "exec"), module.__dict__)  # noqa: S102 - what this file is for
        verdict = "passed"
    except BaseException as error:  # noqa: BLE001 - the program may raise whatever there is
        verdict = f"failed {_format_error(error)}"
    os.write(report, secret + b" " + verdict.encode(errors="replace") + b"\n")
    os._exit(0)  # does not wait for threads of the program


def _install_seccomp_filter(machine: str) -> None:
    """Install the seccomp filter. Acts only on architectures with a table of call numbers."""
    if machine not in _ARCHITECTURES:
        return
    code = b"".join(
        struct.pack("HBBI", *instruction) for instruction in _build_seccomp_filter(*_ARCHITECTURES[machine])
    )
    held = ctypes.create_string_buffer(code)

    class SockFprog(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    program = SockFprog(len(code) // 8, ctypes.addressof(held))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)
    if prctl(_NO_NEW_PRIVS, 1, None, 0, 0) or prctl(_SECCOMP, _FILTER, ctypes.addressof(program), 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


def _build_seccomp_filter(column: int, machine: int) -> list[tuple[int, int, int, int]]:
    """Return the filter as BPF instructions (operation, skip if true, skip if false, operand)."""
    refuse, allow = (_RETURN, 0, 0, _REFUSE | errno.EPERM), (_RETURN, 0, 0, _ALLOW)
    number, architecture, first_argument = 0, 4, 16  # offsets in struct seccomp_data
    found = [(_LOAD, 0, 0, architecture), (_EQUAL, 1, 0, machine), refuse]
    found += [(_LOAD, 0, 0, number), (_ABOVE, 0, 1, _OTHER_CALLS), refuse]
    for numbers in (_UNACCOUNTED_MEMORY_CALLS | _ATTACK_SURFACE_CALLS).values():
        found += [(_EQUAL, 0, 1, numbers[column]), refuse]
    # A filter cannot read clone3's flags, which are in memory. After ENOSYS the C library falls back to clone.
    found += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _REFUSE | errno.ENOSYS)]
    # A program that resets PDEATHSIG would outlive a killed toolkit.
    for call, test, refused in (
        (_CLONE, _ANY_BIT, (_NEW_NAMESPACES,)),
        (_PRCTL, _EQUAL, (_PDEATHSIG,)),
        (_SOCKET, _EQUAL, (_AF_ALG, _AF_VSOCK)),
    ):
        tests = [part for value in refused for part in ((test, 0, 1, value), refuse)]
        body = [(_LOAD, 0, 0, first_argument), *tests, allow]
        found += [(_EQUAL, 0, len(body), call[column]), *body]
    return [*found, allow]


def _format_error(error: BaseException) -> str:
    try:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
    except BaseException:  # noqa: BLE001 - the error's own text is the program's, too
        text = type(error).__name__
    return " ".join(text[:_MAX_ERROR_CHARACTERS].split())


if __name__ == "__main__":
    main()
