"""Containment: what a hostile program does stays without effect, and counts as a failure."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from hostile import PROGRAMS
from llm_training_toolkit.evaluation.sandbox import run as running
from llm_training_toolkit.evaluation.sandbox.isolation import find_sandbox_problem
from llm_training_toolkit.evaluation.sandbox.run import (
    MEGABYTE,
    ProgramResult,
    SandboxKind,
    SandboxLimits,
    run_program,
    run_programs,
)
from llm_training_toolkit.evaluation.sandbox.supervisor import workdir as folder

MARK = 16 * MEGABYTE + 4711
"""A limit no one else sets: it stands in the command line of every process of these tests' programs."""
LIMITS = SandboxLimits(seconds=3.0, memory=256 * MEGABYTE, max_file_bytes=MARK)
REFUSED = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
for call, arguments in {
    "shmget": (0, 4096, 0o1600), "semget": (0, 1, 0o1600), "msgget": (0, 0o1600), "memfd_create": (b"x", 0),
    "unshare": (0x10000000,), "prctl": (1, 0), "mount": (b"none", b"/tmp", b"tmpfs", 0, None),
}.items():
    assert getattr(libc, call)(*arguments) < 0 and ctypes.get_errno() == errno.EPERM, call
"""
"""Shared memory, files without a name, namespaces, and living on when the toolkit is dead."""
Report = Mapping[str, ProgramResult]


CHOICES: tuple[SandboxKind, ...] = ("bubblewrap", "namespaces")
KINDS = [kind for kind in CHOICES if not find_sandbox_problem(kind)]
"""The containments of this machine."""


def left_over() -> list[str]:
    """Processes of contained programs that still live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(MARK) in command and path.parent.name != str(os.getpid()):
            found.append(command[-200:])
    return found


@pytest.fixture(scope="module", params=KINDS)
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Report]:
    """How each hostile program ended, all of them run side by side; what lies outside is as it was."""
    kind: SandboxKind = request.param
    outside = tmp_path_factory.mktemp("outside")
    (outside / "file").write_text("as it was")
    os.environ["LTT_TEST_SECRET"] = "secret"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0ltt-test-{os.getpid()}")
        abstract.listen()
        given = {
            "OUTSIDE": repr(str(outside)),
            "PORT": server.getsockname()[1],
            "PARENT": os.getpid(),
            "HOME": repr(str(Path.home())),
        }
        head = "".join(f"{name} = {value}\n" for name, value in given.items())
        programs = [head + text.replace("ltt-test-PARENT", f"ltt-test-{os.getpid()}") for text in PROGRAMS.values()]
        ends = run_programs(programs, kind, LIMITS, at_a_time=6)
    del os.environ["LTT_TEST_SECRET"]
    assert left_over() == []
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "as it was"
    yield dict(zip(PROGRAMS, ends, strict=True))
    assert left_over() == []


@pytest.mark.slow
def test_a_hostile_program_is_a_counted_failure(report: Report) -> None:
    assert [name for name, ended in report.items() if ended.end == "passed"] == []
    assert report.keys() == PROGRAMS.keys()


@pytest.mark.slow
def test_what_never_ends_is_ended(report: Report) -> None:
    for name in ("an endless loop", "a long sleep", "stopping itself", "output without end"):
        assert report[name].end == "timed out", name


@pytest.mark.slow
def test_what_ends_early_has_not_passed(report: Report) -> None:
    for name in ("an early end", "another program", "a crash", "a daemon", "an end like its keeper's"):
        assert report[name].end == "crashed", name
    assert report["a polite early end"] == ProgramResult("failed", "SystemExit: 0")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_honest_programs_pass(kind: SandboxKind) -> None:
    programs = {
        "nothing": "",
        "a file of its own": "open('mine', 'w').write('x')\nassert open('/tmp/mine').read() == 'x'",
        "a temporary file": "import tempfile\nwith tempfile.NamedTemporaryFile() as f: f.write(b'x')",
        "output": "print('hello')\nimport sys\nprint('x' * 100_000, file=sys.stderr)",
        "a thread and a process": """
import subprocess, sys, threading
threading.Thread(target=print).start()
assert subprocess.run([sys.executable, '-c', 'print(7)'], capture_output=True, text=True).stdout == '7\\n'
""",
        "dataclasses": "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1) == A(1)",
        "text of every kind": "assert len('漢字 😀') == 4",
        "calls that get round limits are refused": REFUSED,
    }
    assert dict(zip(programs, run_programs(list(programs.values()), kind, LIMITS, 2), strict=True)) == dict.fromkeys(
        programs, ProgramResult("passed")
    )


@pytest.mark.slow
def test_without_containment_time_and_memory_are_limited_still() -> None:
    chosen = [PROGRAMS[name] for name in ("an endless loop", "memory", "a daemon", "output without end", "a crash")]
    ends = [ended.end for ended in run_programs(chosen, "none", LIMITS, at_a_time=3)]
    assert ends == ["timed out", "failed", "crashed", "timed out", "crashed"]
    assert left_over() == []


@pytest.mark.slow
def test_a_toolkit_that_is_killed_leaves_nothing_behind() -> None:
    kind: SandboxKind = "none" if find_sandbox_problem("namespaces") else "namespaces"
    code = (
        "import sys\nfrom llm_training_toolkit.evaluation.sandbox.run import SandboxLimits, run_program\n"
        "program = 'import ctypes, time; ctypes.CDLL(None).prctl(1, 0); time.sleep(99)'\n"
        f"run_program(program, {kind!r}, SandboxLimits(seconds=99.0, max_file_bytes={MARK}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    end = time.monotonic() + 120
    while len(left_over()) < 3 and time.monotonic() < end:  # supervisor, keeper, program
        time.sleep(0.05)
    assert left_over()
    process.kill()
    process.wait()
    while left_over() and time.monotonic() < end:
        time.sleep(0.05)
    assert left_over() == []


@pytest.mark.slow
def test_a_program_that_floods_its_report_has_all_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_GRACE_SECONDS", 1.5)
    assert (
        run_program(PROGRAMS["output everywhere"], "none", SandboxLimits(seconds=2.0, max_file_bytes=MARK)).end
        == "timed out"
    )


def test_what_a_killed_supervisor_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    held, left, young = Path(folder.create_workdir()), tmp_path / "ltt-program-left", tmp_path / "ltt-program-young"
    for path in (left, young):
        path.mkdir()
    (left / "file").touch()
    for path in (held, left):
        os.utime(path, (0, 0))
    folder.remove_stale_workdirs()
    assert sorted(tmp_path.iterdir()) == sorted([held, young])


def test_errors_are_told() -> None:
    assert run_program("assert 1 == 2, 'one is not two'", "none", LIMITS) == ProgramResult(
        "failed", "AssertionError: one is not two"
    )
