"""Durations of tests: written to a file, and an unmarked test that takes too long fails."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

MARKS = ("slow", "cluster", "ranks")
FILE = ".pytest_durations.json"
_LOOP_SECONDS = 0.0055  # of `_loop_seconds` on a Xeon with AMX, 2026-11-30


@dataclass(eq=False)  # pluggy keeps plugins in sets
class Durations:
    """Plugin of one session."""

    root: Path
    limit: float  # seconds of processor time, or three times as many by the clock: a busy machine takes longer
    _seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    _began: tuple[float, float] = (0.0, 0.0)

    def pytest_runtest_setup(self) -> None:
        self._began = _clocks()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when != "call" or not report.passed or any(item.get_closest_marker(mark) for mark in MARKS):
            return report
        processor, clock = (now - before for now, before in zip(_clocks(), self._began, strict=True))
        if processor > self.limit or clock > 3 * self.limit:
            report.outcome = "failed"
            report.longrepr = (
                f"took {processor:.1f} s of processor time and {clock:.1f} s by the clock, more than {self.limit:g} s "
                f"and {3 * self.limit:g} s: make it faster, or mark it as one of {', '.join(MARKS)}"
            )
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds.setdefault(report.nodeid, {})[report.when] = round(report.duration, 3)

    def pytest_sessionfinish(self) -> None:
        """Write the durations, slowest first. Those of other tests stay: CI runs the tests in several sessions."""
        if not self._seconds:
            return
        path = self.root / FILE
        with path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # the other lane may end at the same moment
            self._add_to(path)

    def _add_to(self, path: Path) -> None:
        before = json.loads(path.read_text() or "{}")
        there = {test: found for test, found in before.items() if (self.root / test.partition("::")[0]).exists()}
        ordered = sorted((there | self._seconds).items(), key=lambda each: -sum(each[1].values()))
        path.write_text(json.dumps(dict(ordered), indent=1) + "\n")


def slowness() -> float:
    """How many times longer this processor takes for plain Python than a Xeon with AMX; at least 1.

    A limit in seconds alone would fail on the slower of two machines with the same tests.
    """
    fastest = min(_loop_seconds() for _ in range(5))
    return max(1.0, fastest / _LOOP_SECONDS)


def _loop_seconds() -> float:
    began = time.process_time()
    total = 0
    for number in range(200_000):
        total += number
    return time.process_time() - began


def _clocks() -> tuple[float, float]:
    """Processor time of this process and the children it has waited for, and the time of the clock."""
    return sum(os.times()[:4]), time.monotonic()
