"""A pool of real gloo ranks that many tests share: starting two ranks costs about ten seconds, a task milliseconds.

Tasks are module-level functions of `rank_tasks`; every rank runs the same one. A task that fails or
hangs ends the pool, and the next test gets a new one.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from machine_limits import find_free_port

Task = Callable[..., Any]
_CONTEXT = multiprocessing.get_context("spawn")


class RankPool:
    """`world_size` processes in one gloo process group, one thread each."""

    def __init__(self, world_size: int, log: Path) -> None:
        self.world_size = world_size
        port = find_free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            mine, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(rank, world_size, port, theirs, log), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)
        self._collect(120)

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
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """End the ranks, these and no others."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


class _Failure:
    """Error that a rank raised. All ranks raising one of the toolkit's errors together leaves the group usable."""

    def __init__(self, error: BaseException) -> None:
        from llm_training_toolkit.errors import ToolkitError

        self.error = error
        self.harmless = isinstance(error, ToolkitError)
        self.text = traceback.format_exc()


def _serve(rank: int, world_size: int, port: int, pipe: Connection, log: Path) -> None:
    os.environ.update(
        OMP_NUM_THREADS="1",
        LOCAL_RANK=str(rank),
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    from llm_training_toolkit.monitoring.logs import redirect_output

    redirect_output(log / f"ranks_{world_size}_{rank}.log")
    import torch
    import torch.distributed as dist

    from llm_training_toolkit.engine import prepare_deepspeed

    torch.set_num_threads(1)
    prepare_deepspeed("cpu")
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
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
