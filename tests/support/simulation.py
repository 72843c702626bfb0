"""Deterministic simulation of processes: their threads run one at a time, and a test chooses who goes on, and how far.

Real code runs in real threads. Each one stops before a request to the store, a sleep or a lock, until the test lets it
go on: `Simulation.advance` by one request, `Simulation.pass_time` fairly and for a while. `patch_modules` puts the
simulated clock, threads and processes into the modules of storage.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Literal, TypeVar

import pytest

from llm_training_toolkit.runs.storage import lease, s3_client, s3_storage
from llm_training_toolkit.runs.storage import open as open_storage

Fate = Literal["arrives", "lost", "answer lost", "sent twice", "killed after"]
FATES: tuple[Fate, ...] = ("lost", "answer lost", "sent twice", "killed after")
T = TypeVar("T")
_HERE = threading.local()


class Killed(BaseException):
    """Raised in the threads of a process that was killed; whatever they still try does not arrive."""


@dataclass(eq=False, repr=False)
class SimulatedProcess:
    """A process: its machine, its threads, and whether it is killed or stopped (SIGSTOP)."""

    simulation: Simulation
    number: int
    machine: str
    is_killed: bool = False
    is_stopped: bool = False
    threads: list[SimulatedThread] = field(default_factory=list)
    result: object = None

    def __repr__(self) -> str:
        return self.identity

    @property
    def identity(self) -> str:
        """In the form of `lease._get_process_identity`."""
        return f"{self.machine}/{self.number}@1"

    @property
    def is_alive(self) -> bool:
        """Whether one of its threads has something left to do."""
        return not self.is_killed and any(not thread.is_done for thread in self.threads)

    def kill(self) -> None:
        """End all threads where they are."""
        self.is_killed = True
        for thread in self.threads:
            while not thread.is_done:
                thread.go_on("arrives")


class SimulatedThread:
    """A thread of a process that runs only between `go_on` and its next `wait`."""

    def __init__(self, process: SimulatedProcess, work: Callable[[], object]) -> None:
        self.process, self.is_done = process, False
        self.is_ready: Callable[[], bool] = lambda: True
        self.wakes_at: float | None = None
        self.fate: Fate = "arrives"
        self.newest_seen: tuple[int, int] | None = None  # free to use for what it has read
        self._failure: BaseException | None = None
        self._work = work
        self._turn, self._back = threading.Lock(), threading.Lock()  # released by the other side
        self._turn.acquire()
        self._back.acquire()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._name = f"{process} thread {len(process.threads)}"
        process.threads.append(self)
        self._thread.start()

    def __repr__(self) -> str:
        return self._name

    def _run(self) -> None:
        _HERE.thread = self
        self._turn.acquire()
        try:
            if not self.process.is_killed:
                self._work()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again in the thread of the test
            self._failure = error
        self.is_done = True
        self._back.release()

    def go_on(self, fate: Fate) -> None:
        """Run to the next wait, or to the end. Raises the error of the thread."""
        self.fate = fate
        self._turn.release()
        self._back.acquire()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self, is_ready: Callable[[], bool], wakes_at: float | None = None) -> None:
        """Give the turn back until the test goes on with this thread. Raises Killed."""
        if not self.process.is_killed:
            self.is_ready, self.wakes_at = is_ready, wakes_at
            self._back.release()
            self._turn.acquire()
            self.is_ready, self.wakes_at = (lambda: True), None
        if self.process.is_killed:
            raise Killed

    def can_go_on(self) -> bool:
        """Whether it has something to do now."""
        return not self.is_done and not self.process.is_stopped and self.is_ready()


class Simulation:
    """All processes, and the one clock that the store and they share."""

    def __init__(self) -> None:
        self.now = 0.0
        self.processes: list[SimulatedProcess] = []

    def start(self, machine: str, work: Callable[[SimulatedProcess], object]) -> SimulatedProcess:
        """Start a process; `work` is its main thread."""
        process = SimulatedProcess(self, len(self.processes) + 1, machine)
        self.processes.append(process)

        def run() -> None:
            process.result = work(process)

        SimulatedThread(process, run)
        return process

    def list_ready(self) -> list[SimulatedThread]:
        """Threads that can go on, in a fixed order."""
        return [thread for process in self.processes for thread in process.threads if thread.can_go_on()]

    def advance(self, thread: SimulatedThread, fate: Fate = "arrives") -> None:
        """Let a thread do its next request, which meets `fate`."""
        thread.go_on(fate)
        if thread.process.is_killed:
            thread.process.kill()

    def pass_time(self, seconds: float) -> None:
        """Let the clock run; every process that is not stopped does all it can meanwhile."""
        until = self.now + seconds
        while True:
            while ready := self.list_ready():
                for thread in ready:
                    if thread.can_go_on():
                        self.advance(thread)
            sleeping = [t.wakes_at for p in self.processes for t in p.threads if t.wakes_at is not None]
            later = [time for time in sleeping if time > self.now]
            if not later or min(later) > until:
                break
            self.now = min(later)
        self.now = until

    def is_process_alive(self, process: str) -> bool:
        """In place of `lease._is_process_alive`."""
        return any(each.is_alive for each in self.processes if each.identity.endswith(f"/{process}"))

    def end(self) -> None:
        """Kill all processes."""
        for process in self.processes:
            process.kill()

    def request(self, answer: Callable[[], T], lost: Callable[[], Exception]) -> T:
        """Answer a request to the store, unless the fate of its thread is another."""
        thread = find_thread()
        if thread is None:
            return answer()  # of the test itself
        thread.wait(lambda: True)
        fate = thread.fate
        if fate == "lost":
            raise lost()
        answered = answer()
        if fate == "answer lost":
            raise lost()
        if fate == "killed after":
            thread.process.is_killed = True
            raise Killed
        return answer() if fate == "sent twice" else answered

    def sleep(self, seconds: float) -> None:
        """In place of `time.sleep`."""
        until = self.now + seconds
        get_thread().wait(lambda: self.now >= until, until)


def get_thread() -> SimulatedThread:
    """Return the simulated thread that calls."""
    thread: SimulatedThread = _HERE.thread
    return thread


def find_thread() -> SimulatedThread | None:
    """Return the simulated thread that calls, or None in the test itself."""
    return getattr(_HERE, "thread", None)


def _get_process_identity() -> str:
    """Of the test itself it is one that no process has."""
    thread = find_thread()
    return thread.process.identity if thread else "test/0@1"


class _Event:
    """In place of `threading.Event`."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation, self._is_set = simulation, False

    def set(self) -> None:
        self._is_set = True

    def wait(self, timeout: float) -> bool:
        until = self._simulation.now + timeout
        get_thread().wait(lambda: self._is_set or self._simulation.now >= until, until)
        return self._is_set


class _Lock:
    """In place of `threading.RLock`."""

    def __init__(self) -> None:
        self._owner: SimulatedThread | None = None
        self._depth = 0

    def __enter__(self) -> None:
        thread = find_thread()
        if thread is not None and self._owner not in {None, thread}:
            thread.wait(lambda: self._owner is None)
        self._owner, self._depth = thread, self._depth + 1

    def __exit__(self, *_error: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None


class _ThreadHandle:
    """In place of `threading.Thread`."""

    def __init__(self, target: Callable[..., object], args: tuple[object, ...], **_names: object) -> None:
        self._work = lambda: target(*args)

    def start(self) -> None:
        self._thread = SimulatedThread(get_thread().process, self._work)

    def join(self) -> None:
        get_thread().wait(lambda: self._thread.is_done)


@contextmanager
def patch_modules() -> Iterator[Simulation]:
    """Simulate time, threads and processes in the modules of storage. All processes end with the block."""
    simulation = Simulation()
    time = SimpleNamespace(sleep=simulation.sleep, monotonic=lambda: simulation.now)
    threads = SimpleNamespace(
        Thread=_ThreadHandle, Event=lambda: _Event(simulation), RLock=_Lock, get_ident=threading.get_ident
    )
    modules: tuple[ModuleType, ...] = (lease, open_storage, s3_client, s3_storage)
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name, simulated in (("time", time), ("threading", threads)):
                if hasattr(module, name):
                    patch.setattr(module, name, simulated)
        patch.setattr(lease, "_get_process_identity", _get_process_identity)
        patch.setattr(lease, "_is_process_alive", simulation.is_process_alive)
        try:
            yield simulation
        finally:
            simulation.end()
