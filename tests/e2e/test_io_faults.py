"""A sample of `make drill-io`: a call fails, is half done, kills or loses power, and the next start ends bit for bit.

The whole sweep over every call is experiments/drill_io/run.py.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fault_cases import FAULTS, Sweep, build_library, read_calls

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here for the library of faults"),
]
PLACES = ("metrics.jsonl", "fragments_00000.safetensors", "/manifest.json", "export.writing/")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return Sweep(tmp_path_factory.mktemp("faults").resolve())


@pytest.mark.parametrize("place", PLACES)
def test_a_fault_costs_no_weights_no_sequences_and_no_metrics(sweep: Sweep, place: str) -> None:
    """Every second kind of fault, each at another call for the file; the next place meets the others."""
    calls = [number for number, call in enumerate(sweep.calls, 1) if place.lstrip("/") in call.replace("/.", "/")]
    kinds = list(FAULTS)[PLACES.index(place) % 2 :: 2]
    for turn, kind in enumerate(kinds):
        result = sweep.run_case(kind, calls[turn * len(calls) // len(kinds)])
        assert result.problems == (), result


def test_the_cache_that_a_checkpoint_needs_survives_a_loss_of_power(sweep: Sweep) -> None:
    """The last checkpoint is complete, and the tokenizer that was trained for it lies in the cache alone."""
    result = sweep.run_case(
        "power lost: data and names", sweep.calls.index("remove r/checkpoints/step_000000002_a1") + 1
    )
    assert result.problems == (), result


CALLS = """
import ctypes, os, sys
root, log = sys.argv[1:]
ctypes.CDLL(None).arm_faults(root.encode(), 5, 5, 1, 0, log.encode(), b"")
for call in (os.mkdir, os.mkdir, lambda path: os.open(path, os.O_WRONLY), os.rmdir, os.mkdir):
    try:
        call(f"{root}/a")
    except OSError as error:
        print(error.errno)
os.fsync(os.open(root, os.O_RDONLY))
"""


def test_calls_that_fail_by_themselves_have_numbers_too(tmp_path: Path) -> None:
    root, log = tmp_path / "root", tmp_path / "calls.log"
    root.mkdir()
    environment = os.environ | {"LD_PRELOAD": str(build_library(tmp_path))}
    command = [sys.executable, "-c", CALLS, str(root), str(log)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(errno.EEXIST), str(errno.EISDIR), str(errno.EIO)]
    calls = ["mkdir a", "mkdir a", "open a", "remove a", "mkdir a", "fsync ."]
    assert read_calls(log, root, "call") == dict(enumerate(calls, 1))
    assert read_calls(log, root, "fault") == {5: "mkdir a"}


def test_a_fault_that_no_call_meets_is_a_problem(sweep: Sweep) -> None:
    result = sweep.run_case("SIGKILL", 10 * len(sweep.calls))
    assert (result.what, result.first) == ("", 0)
    assert result.problems == ("the fault was not met", "exit code 0 after SIGKILL")
