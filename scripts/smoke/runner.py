"""Runs tasks in processes of their own, within a limit of time for each and for all of them together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smoke.forked import ForkedProcess

Values = dict[str, Any]
_SCRIPTS = Path(__file__).resolve().parent.parent
_SOURCES = _SCRIPTS.parent / "src"
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher around this process may have set: here every task says for itself how many ranks it has."""
_POLL = 0.05
_MOURNING = 5.0
"""Seconds the other ranks may continue after one has failed, to say what they saw."""
_TAIL = 3000
"""Characters of a log that are kept."""


@dataclass(frozen=True)
class Task:
    """Something to run: a module of `smoke`, and the arguments of its stages, which run one after another."""

    name: str
    module: str
    stages: Sequence[Values]
    needs: float
    """Seconds it takes at least: with less time left it is not begun."""
    limit: float
    """Seconds after which a stage counts as hanging."""
    ranks: int = 1
    """Processes of a stage, side by side, as torchrun would start them."""


@dataclass(frozen=True)
class Done:
    """What rank 0 of each stage gave."""

    stages: list[Values]
    seconds: float


@dataclass(frozen=True)
class Failed:
    """What went wrong, in a line, and the end of the logs."""

    reason: str
    log: str = ""


@dataclass(frozen=True)
class Skipped:
    """Why it was not done."""

    reason: str


Result = Done | Failed | Skipped
Process = subprocess.Popen[bytes] | ForkedProcess


class _NotDoneError(Exception):
    """A stage ended without a result."""

    def __init__(self, result: Failed | Skipped) -> None:
        super().__init__(result.reason)
        self.result = result


@dataclass
class Runner:
    """Starts the processes of tasks, and ends those that are left when it is closed."""

    work: Path
    device: str
    deadline: float
    """On the clock of time.monotonic."""
    forks: bool = False
    """Whether tasks are forked from a process that has imported torch (`forked.py`): only where no GPU is used."""
    _started: list[Process] = field(default_factory=list)

    def left(self) -> float:
        """Seconds until the deadline."""
        return max(self.deadline - time.monotonic(), 0.0)

    def run(self, task: Task) -> Result:
        """Run the stages of a task; what goes wrong in them is in the result."""
        if self.left() < task.needs:
            return Skipped(f"out of time: takes about {task.needs:.0f} s, {self.left():.0f} s are left")
        began = time.monotonic()
        try:
            stages = [self._stage(task, number, arguments) for number, arguments in enumerate(task.stages)]
        except _NotDoneError as error:
            return error.result
        return Done(stages, time.monotonic() - began)

    def close(self) -> None:
        """Begin nothing more, and end every process that is still there."""
        self.deadline = 0.0
        for process in self._started:
            _end(process)

    def _stage(self, task: Task, number: int, arguments: Values) -> Values:
        place = self.work / "tasks" / f"{task.name}_{number}"
        place.mkdir(parents=True)
        (place / "arguments.json").write_text(json.dumps(arguments, indent=1))
        processes = self._start(task, place)
        try:
            self._wait(processes, task.limit)
        finally:
            for process in processes:
                _end(process)
        return _answer(place, [process.returncode for process in processes], arguments)

    def _start(self, task: Task, place: Path) -> list[Process]:
        port = _free_port()
        processes: list[Process] = []
        for rank in range(task.ranks):
            arguments = [str(place / "arguments.json"), str(place / f"result_{rank}.json")]
            environment = _environment(self.device) | _rank_environment(rank, task.ranks, port)
            start = ForkedProcess if self.forks else _start_anew
            process = start(f"smoke.{task.module}", arguments, place / f"log_{rank}.txt", environment)
            processes.append(process)
            self._started.append(process)
        return processes

    def _wait(self, processes: Sequence[Process], limit: float) -> None:
        """Wait until all have ended, or one has failed and the others had the time to say so."""
        ends = time.monotonic() + limit
        while any(process.poll() is None for process in processes):
            if time.monotonic() > self.deadline:
                raise _NotDoneError(Skipped("out of time: it was stopped"))
            if time.monotonic() > ends:
                if any(process.returncode for process in processes):
                    return
                raise _NotDoneError(Failed(f"hangs: no result within {limit:.0f} s"))
            if any(process.returncode for process in processes):
                ends = min(ends, time.monotonic() + _MOURNING)
            time.sleep(_POLL)


def _start_anew(
    module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module, *arguments]
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def _environment(device: str) -> dict[str, str]:
    """The surroundings of every task: the code beside this file, no network, no launcher."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    paths = [str(_SCRIPTS), str(_SOURCES), *filter(None, [kept.get("PYTHONPATH")])]
    kept |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return kept if device == "cuda" else kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def _rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank; nothing where there is one alone."""
    if ranks == 1:
        return {}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(process: Process) -> None:
    """End a process of ours, and what it started in its session, if it is still there."""
    if process.poll() is None:
        with suppress(ProcessLookupError):  # just forked, it has no session of its own yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


def _answer(place: Path, codes: Sequence[int | None], arguments: Values) -> Values:
    """Rank 0's result, if every rank gave one and ended well."""
    files = [place / f"result_{rank}.json" for rank in range(len(codes))]
    answers: list[Values] = [json.loads(file.read_text()) if file.is_file() else {} for file in files]
    for answer in answers:
        if "error" in answer:
            raise _NotDoneError(Failed(answer["error"], f"{answer['traceback']}\n{_logs(place, arguments)}"))
    for rank, answer in enumerate(answers):
        if not answer or codes[rank]:
            when = "after its work" if answer else "without a result"
            raise _NotDoneError(Failed(f"rank {rank} ended {when}, exit code {codes[rank]}", _logs(place, arguments)))
    return answers[0]


def _logs(place: Path, arguments: Values) -> str:
    """The end of what the processes printed, and of the newest log of the run they trained."""
    run = arguments.get("config", {}).get("run", {})
    found = sorted(place.glob("log_*.txt"))
    if run:
        logs = (Path(run["dir"]) / run["name"] / "logs").rglob("*.log")
        found += sorted(logs, key=lambda log: log.stat().st_mtime)[-1:]
    return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-_TAIL:]}" for log in found)
