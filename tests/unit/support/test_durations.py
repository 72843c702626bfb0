"""The limit of unmarked tests, and the file of durations, in a session of pytest's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import durations

_CONFTEST = """
from durations import Durations

def pytest_configure(config):
    config.pluginmanager.register(Durations(config.rootpath, limit=0.5))
"""
_TESTS = """
import time
import pytest

def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def test_quick():
    pass

def test_that_works():
    work(0.6)

def test_that_waits():
    time.sleep(1.6)

def test_that_waits_less():
    time.sleep(0.1)

@pytest.mark.slow
def test_marked():
    work(0.6)
"""


def test_an_unmarked_test_over_the_limit_fails_and_durations_are_kept(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(_CONFTEST)
    (tmp_path / "test_these.py").write_text(_TESTS)
    (tmp_path / "inner").mkdir()  # with hooks that are not for the other tests
    (tmp_path / "inner" / "conftest.py").touch()
    (tmp_path / "inner" / "test_inner.py").write_text("def test_inside():\n    pass\n")
    kept = {"test_gone.py::test": {"call": 1}, "test_these.py::test_other": {"call": 9}}
    (tmp_path / durations.FILE).write_text(json.dumps(kept))
    command = [sys.executable, "-m", "pytest", "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "-rA", "."]
    paths = {"PYTHONPATH": str(Path(durations.__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **paths}, capture_output=True, text=True, check=False
    )
    failed = [line.split("::")[1].split()[0] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    assert failed == ["test_that_works", "test_that_waits"], done.stdout
    assert "make it faster, or mark it as one of slow, cluster, ranks" in done.stdout
    found = json.loads((tmp_path / durations.FILE).read_text())
    assert next(iter(found)) == "test_these.py::test_other", "slowest first, with those of another session"
    assert len(found) == 7
    assert found["test_these.py::test_that_waits"]["call"] >= 1.6
