"""Tests in two lanes, `pytest -n 2 --dist loadgroup`: who shares a lane, and who has the machine to itself.

Tests on Ray clusters stay in one lane: most of them share one, and Ray's start of several at once fails now and then.
They mostly wait, so that the other lane has the processors meanwhile. Tests on the pools of ranks share these. All
others stay together by file, for their fixtures. A test marked `alone` measures the machine: the other lane pauses
while it runs.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_DOOR, _MACHINE = 0, 1  # bytes of the lock file
_FIRST = ("cluster", "ranks")  # marks, in the order of their time: what is left at the end should be short


class Lanes:
    """Plugin of a worker of pytest-xdist."""

    def __init__(self, session: str) -> None:
        self._path = Path(tempfile.gettempdir()) / f"pytest-lanes-{session}"
        self._lock = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)

    @pytest.hookimpl(tryfirst=True)  # before xdist itself, which reads the groups
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            item.add_marker(pytest.mark.xdist_group(_group(item)))
        items.sort(key=_rank)

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of the test's own timeout
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        with self._machine(fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH):
            return (yield)

    @contextmanager
    def _machine(self, kind: int) -> Iterator[None]:
        # Who waits for the whole machine holds the door, or the other lane's tests would never let it in.
        fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, _DOOR)
        fcntl.lockf(self._lock, kind, 1, _MACHINE)
        fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, _DOOR)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, _MACHINE)

    def pytest_sessionfinish(self) -> None:
        self._path.unlink(missing_ok=True)  # the other lane has it open


def _group(item: pytest.Item) -> str:
    return next((mark for mark in _FIRST if item.get_closest_marker(mark)), item.nodeid.partition("::")[0])


def _rank(item: pytest.Item) -> int:
    group = _group(item)
    return _FIRST.index(group) if group in _FIRST else 2 if item.get_closest_marker("slow") else 3
