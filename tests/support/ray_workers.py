"""Forked Ray workers: the workers of the tests' own clusters start without the ten seconds that their imports take.

A server process has imported what workers import and has done nothing with it. The raylet starts a shim
(`ray_worker_shim.py`) with the worker's command. The shim passes arguments, environment, folder, limits and standard
streams to the server, which forks the worker. If one of worker and shim is killed, the other one ends too, and both end
with the raylet; killing by process id and runtime environments work as with plain workers. Different are the worker's
parent (the server), its command line and environment in /proc, and what Python draws once per start. Its job is the
one of workers that Ray starts ahead: none, until it gets its first task.

A worker starts plain if its environment has another variable that libraries may read while they are imported, if its
runtime environment does more than set variables and a folder, on a machine with a GPU, and if PLAIN_RAY_WORKERS is set.
The real start stays proved: all workers are plain in `test_endings`, `test_jobs` (a job's runtime environment changes
PYTHONPATH), `test_local`, `test_memory`, `test_preflight`, `test_foreign_modules` and on the autoscaling cluster of
`test_capacity`. The ranks of `test_micro_batch` are plain because they have a variable of malloc.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fork_server
import ray_worker_shim

_OFF = "PLAIN_RAY_WORKERS"
_MESSAGE = 2**20  # bytes, more than arguments and environment take
_SCRIPTS = {"worker_path": "default_worker.py", "setup_worker_path": ray_worker_shim.SETUP}  # of Ray, by its argument
_SITE = Path(__file__).parent / "ray_site"
_THREADS = "OMP_NUM_THREADS"  # one, as Ray and the toolkit set it for a worker with one CPU
# Prefixes of variables that no library reads while it is imported, apart from those of `prepare_environment`.
_LATE = (
    *(
        "AWS_",
        "PATH",
        "PL_DISABLE_FORK",  # set by Ray Tune for Lightning, which is not installed
        "PYTEST_",
        "RAY_AUTH_TOKEN",
        "RAY_CLIENT_MODE",
        "RAY_JOB_",
        "RAY_LD_PRELOAD",
        "RAY_RAYLET_PID",
        "RAY_TMPDIR",
        "RAY_TRAIN_",
    ),
    *("RAY_WARN_BLOCKING_", "SPT_NOENV", "TMPDIR", "TOKENIZERS_PARALLELISM", "TORCHINDUCTOR_", "TRITON_"),
)
Order = dict[str, Any]


@contextmanager
def forked_workers(environment: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
    """Fork the workers of raylets with this environment; yield the arguments with which Ray starts such raylets."""
    if _are_plain():
        yield {}
        return
    with _links() as links, _server(environment, links):
        yield {name: str(links / script) for name, script in _SCRIPTS.items()}


@contextmanager
def environment_with_forked_workers(environment: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
    """Fork the workers of nodes that commands with the yielded environment start, by `ray start` or by themselves."""
    if _are_plain():
        yield environment
        return
    with _links() as links:
        path = os.pathsep.join(filter(None, [str(_SITE), environment.get("PYTHONPATH")]))
        extended = {**environment, "PYTHONPATH": path, "RAY_WORKER_SHIM_LINKS": str(links)}
        with _server(extended, links):
            yield extended


def _are_plain() -> bool:
    return fork_server.GPU.exists() or bool(os.environ.get(_OFF))


@contextmanager
def _links() -> Iterator[Path]:
    """Link the shim under the names of Ray's two scripts, beside their folder."""
    from ray._private import workers

    [scripts] = workers.__path__
    with tempfile.TemporaryDirectory(prefix="ltt-workers-") as folder:  # not nested: a socket's path must be short
        links = Path(folder)
        (links / "ray").symlink_to(scripts)
        for script in _SCRIPTS.values():
            (links / script).symlink_to(ray_worker_shim.__file__)
        yield links


@contextmanager
def _server(environment: Mapping[str, str], links: Path) -> Iterator[None]:
    """Start the server that forks workers, and end it."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())],
            env={**environment, _THREADS: "1", **_get_variables_of_ray()},
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        ) as server,
    ):
        listener.bind(f"{links}/socket")
        listener.listen(64)
        assert server.stdout is not None
        assert b"ready\n" in iter(server.stdout.readline, b"")  # a raylet gives up a worker after a minute
        yield


def _get_variables_of_ray() -> dict[str, str]:
    """What Ray's C++ part reads while it is imported, for all workers: a job and a process that they do not outlive.

    No job is what workers have that Ray starts ahead. The process is this one; it is the shim that watches the raylet.
    """
    return {"RAY_JOB_ID": "ffffffff", "RAY_RAYLET_PID": str(os.getpid())}


class _Server:
    """The server's side: shims ask over lines of their own."""

    def __init__(self, listener: socket.socket, environment: Mapping[str, str]) -> None:
        """`environment` is what libraries have read."""
        self._listener, self._environment = listener, environment
        self._lines: dict[int, socket.socket] = {}
        self._pids: dict[int, int] = {}  # by line
        self._ends: dict[int, int] = {}  # by pidfd: the line
        self._poll = select.poll()
        for fd in (0, listener.fileno()):
            self._poll.register(fd, select.POLLIN)

    def serve(self) -> Order | None:
        """Fork a worker for each order; the order in the worker, None in the server once the tests have ended."""
        while True:
            for fd, _ in self._poll.poll():
                if fd == 0:
                    for pid in self._pids.values():
                        os.kill(pid, signal.SIGKILL)
                    return None
                if fd == self._listener.fileno():
                    line, _ = self._listener.accept()
                    self._lines[line.fileno()] = line
                    self._poll.register(line, select.POLLIN)
                elif fd in self._ends:
                    self._report_end(fd)
                elif fd in self._pids:
                    self._poll.unregister(fd)
                    os.kill(self._pids[fd], signal.SIGKILL)  # the shim has been killed
                elif fd in self._lines and (order := self._answer(self._lines[fd])) is not None:
                    return order

    def _answer(self, line: socket.socket) -> Order | None:
        """Fork the worker that a shim asks for, or tell it to start that itself; the order in the worker."""
        message, streams, _, _ = socket.recv_fds(line, _MESSAGE, 3)
        order: Order = json.loads(message) if message else {}
        forkable = message and self._fits(order["environment"])
        with suppress(ConnectionError):  # the shim has just been killed, which the line tells next
            line.send(b"forked" if forkable else b"plain")
        pid = os.fork() if forkable else -1
        if pid == 0:
            for number, fd in enumerate(streams):
                os.dup2(fd, number)
            for fd in [*streams, *self._ends]:
                os.close(fd)
            for each in [*self._lines.values(), self._listener]:
                each.close()
            return order
        for fd in streams:
            os.close(fd)
        if forkable:
            self._pids[line.fileno()] = pid
            end = os.pidfd_open(pid)
            self._ends[end] = line.fileno()
            self._poll.register(end, select.POLLIN)
        else:
            self._hang_up(line.fileno())
        return None

    def _fits(self, environment: Mapping[str, str]) -> bool:
        """Whether a worker with this environment would have read from it what this process has read."""
        different = dict(environment.items() ^ self._environment.items())
        return environment.get(_THREADS, "1") == "1" and all(
            name == _THREADS or name.startswith(_LATE) or os.environ.get(name) == environment.get(name)
            for name in different
        )

    def _report_end(self, pidfd: int) -> None:
        line = self._ends.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(self._pids.pop(line), 0)
        with suppress(ConnectionError):
            self._lines[line].send(b"%d" % os.waitstatus_to_exitcode(status))
        self._hang_up(line)

    def _hang_up(self, line: int) -> None:
        with suppress(KeyError):
            self._poll.unregister(line)
        self._lines.pop(line).close()


def _become(order: Order) -> None:
    """Make this process the worker that the shim would have become."""
    os.setpgid(0, 0)  # as Ray does
    for limit, values in order["limits"].items():
        resource.setrlimit(int(limit), tuple(values))
    signal.pthread_sigmask(signal.SIG_SETMASK, order["blocked"])
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    tempfile.tempdir = None
    import numpy as np

    np.random.seed()
    script, *_ = sys.argv = order["arguments"]
    sys.orig_argv = [sys.executable, *sys.argv]
    own = sys.path.index(str(Path(__file__).parent))
    sys.path[own : own + 1] = [] if os.environ.get("PYTHONSAFEPATH") else [str(Path(script).parent)]
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    """Serve on the listening socket whose number is given; in a child, run the worker and leave as it does."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    environment = dict(os.environ)
    fork_server.import_all()
    gc.collect()
    gc.freeze()  # no collection in a worker touches, and so copies, what was imported
    print("ready", flush=True)
    order = _Server(listener, environment).serve()
    if order is not None:
        _become(order)


if __name__ == "__main__":
    main()
