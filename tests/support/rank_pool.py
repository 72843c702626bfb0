"""A pool of real gloo ranks that many tests share: starting two ranks costs seconds, a task milliseconds.

Tasks are module-level functions of `rank_tasks`; every rank runs the same one. A task that fails or
hangs ends the pool, and the next test gets a new one.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import fork_server
from machine_limits import find_free_port

Task = Callable[..., Any]
_START = (
    "import sys; path, *given = sys.argv[1:]; sys.path[:] = path.split(':'); import rank_pool; rank_pool.serve(*given)"
)
_START_SECONDS = 120.0


class RankPool:
    """`world_size` processes in one gloo process group, one thread each.

    Ranks are forked from a process that has imported torch and DeepSpeed (`fork_server`). The third starts by itself,
    as real ranks do: its seed of hashes is another, so that a set with an order of its own on each rank is noticed.
    """

    def __init__(self, world_size: int, log: Path) -> None:
        self.world_size = world_size
        port = find_free_port()
        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen[str]] = []
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/socket")
            listener.listen(world_size)
            listener.settimeout(_START_SECONDS)
            for rank in range(world_size):
                given = [":".join(sys.path), str(rank), str(world_size), str(port), f"{folder}/socket", str(log)]
                start = fork_server.popen if rank < 2 else _start
                self._processes.append(start([sys.executable, "-c", _START, *given], stdin=subprocess.DEVNULL))
            self._pipes = self._accept(listener)
        self._collect(_START_SECONDS)

    def _accept(self, listener: socket.socket) -> list[Connection]:
        """The ranks' pipes, in the order of ranks."""
        pipes: dict[int, Connection] = {}
        try:
            for _ in self._processes:
                pipe = Connection(listener.accept()[0].detach())
                pipes[pipe.recv()] = pipe
        except TimeoutError:
            self.close()
            raise
        return [pipes[rank] for rank in range(self.world_size)]

    def run(self, task: Task, *, timeout: float = 600, **arguments: Any) -> list[Any]:
        """Run a task on every rank; what each returned, in the order of ranks."""
        for pipe in self._pipes:
            pipe.send((task, arguments))
        return self._collect(timeout)

    def _collect(self, timeout: float) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                self.close()
                raise TimeoutError(f"rank {rank} of {self.world_size} gave no answer within {timeout} s")
            answers.append(pipe.recv())
        failures = [answer for answer in answers if isinstance(answer, _Failure)]
        if failures:
            if not all(failure.harmless for failure in failures) or len(failures) < self.world_size:
                self.close()
            raise failures[0].error from RuntimeError(failures[0].text)
        return answers

    @property
    def alive(self) -> bool:
        """Whether it can take another task."""
        return bool(self._processes) and all(process.poll() is None for process in self._processes)

    def close(self) -> None:
        """End the ranks, these and no others."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes = []


class _Failure:
    """Error that a rank raised. All ranks raising one of the toolkit's errors together leaves the group usable."""

    def __init__(self, error: BaseException) -> None:
        from llm_training_toolkit.errors import ToolkitError

        self.error = error
        self.harmless = isinstance(error, ToolkitError)
        self.text = traceback.format_exc()


def _start(command: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(command, text=True, **options)


def serve(rank: str, world_size: str, port: str, address: str, log: str) -> None:
    """Be a rank until the pool is closed: join the process group, then run one task after another."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(address)
        pipe = Connection(line.detach())
    pipe.send(int(rank))
    os.environ.update(
        OMP_NUM_THREADS="1",
        LOCAL_RANK=rank,
        RANK=rank,
        WORLD_SIZE=world_size,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )
    from llm_training_toolkit.monitoring.logs import redirect_output

    redirect_output(Path(log) / f"ranks_{world_size}_{rank}.log")
    import torch
    import torch.distributed as dist

    from llm_training_toolkit.engine import prepare_deepspeed

    torch.set_num_threads(1)
    prepare_deepspeed("cpu")
    dist.init_process_group("gloo", rank=int(rank), world_size=int(world_size))
    pipe.send("ready")
    while True:
        try:
            task, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(task(**arguments))
        except BaseException as error:  # noqa: BLE001 - the test gets it, whatever it is
            pipe.send(_Failure(error))
