"""Fork server for commands: `run` and `popen` are those of subprocess, without the seconds that imports take.

A server process has imported torch, transformers, deepspeed, ray and the toolkit, and has done nothing with them: it
has no threads of theirs, and it never calls `ray.init`. For each command it forks a child with the arguments, the
environment, the folder and the standard streams that were asked for; signals, process id and exit code are the
child's own. Shared with other commands are what Python draws once per start (the seed of hashes) and what
libraries read while they are imported: there is one server for each environment, apart from the variables in `_LATE`.

A command is one of `python -m MODULE ...`, `python -c CODE ...` and the installed `ltt ...`. Tests of the start itself
(what is imported, limits of memory, torchrun, jobs of Ray) use subprocess.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

# Prefixes of variables that no library reads while it is imported, or that say what the server knows anyway.
_LATE = (
    *("AWS_", "DS_ACCELERATOR", "LOCAL_RANK", "MLFLOW_", "PYTEST_", "RAY_ADDRESS", "TMPDIR"),
    *("TORCHINDUCTOR_", "TORCH_EXTENSIONS_", "TRITON_"),
)
_SERVERS = 3  # alive at a time, 0.5 GB each
GPU = Path("/dev/nvidiactl")  # a process that has seen a GPU cannot be forked: with one, every start is a cold one
_MESSAGE = 2**20  # bytes, more than arguments and environment take
Order = dict[str, Any]
_TOOLKIT = """
    cli.app runs.table commands.train launch.torchrun commands.evaluate export.export_run generation.load
    commands.show_batch launch.ray.run launch.tune.trainable launch.tune.tuner search.outputs launch.jobs.submit
    launch.jobs.client
"""
_OTHERS = """
    deepspeed.runtime.zero.stage3 deepspeed.runtime.zero.stage_1_and_2 peft ray.job_submission ray.train.torch ray.tune
    torch._dynamo torch.utils.tensorboard transformers.models.qwen3.modeling_qwen3
"""


class _Server:
    """A server process as seen from the tests; it ends when the tests do, because its socket closes."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MESSAGE)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self.commands: list[_Forked] = []

    @property
    def is_busy(self) -> bool:
        """Whether a command is running, which would end with the server."""
        self.commands = [command for command in self.commands if command.poll() is None]
        return bool(self.commands)

    def close(self) -> None:
        self.socket.close()
        self._process.wait()


_servers: dict[str, _Server] = {}


def _server(environment: Mapping[str, str]) -> _Server:
    """The server of an environment, started when it is first asked for."""
    early = {name: value for name, value in environment.items() if not name.startswith(_LATE)}
    key = json.dumps(early, sort_keys=True)
    server = _servers.pop(key, None) or _Server(early)
    idle = [other for other, each in _servers.items() if not each.is_busy]
    for other in idle[: max(0, len(_servers) + 1 - _SERVERS)]:
        _servers.pop(other).close()
    _servers[key] = server  # the last one used is the last one closed
    return server


class _Forked(subprocess.Popen[str]):
    """A command in a child of the server. Pipes and `communicate` are inherited; start and wait are replaced."""

    def __init__(self, args: Sequence[str], **options: Any) -> None:
        self._report = -1
        super().__init__(args, text=True, **options)

    def _execute_child(self, *given: Any) -> None:
        _self, *names = inspect.signature(subprocess.Popen._execute_child).parameters  # type: ignore[attr-defined]
        asked = dict(zip(names, given, strict=True))
        left_out = {"executable", "preexec_fn", "pass_fds", "shell"} & {*filter(asked.get, asked)}
        assert not left_out, f"not for a forked command: {left_out}"
        order: Order = {
            "arguments": [str(each) for each in asked["args"]],
            "environment": dict(os.environ if asked["env"] is None else asked["env"]),
            "folder": str(Path(asked["cwd"] or "").absolute()),
            "session": asked["start_new_session"],
        }
        streams = [asked[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        self._report, theirs = os.pipe()
        try:
            fds = [fd if fd >= 0 else number for number, fd in enumerate(streams)]
            server = _server(order["environment"])
            socket.send_fds(server.socket, [json.dumps(order).encode()], [*fds, theirs])
            server.commands.append(self)
        finally:
            os.close(theirs)
            ends = [name for name in names if name.startswith(("p2c", "c2p", "err"))]
            self._close_pipe_fds(*(asked[name] for name in ends))  # type: ignore[attr-defined]
        self.pid = self._reported()
        self._child_created = True

    def _reported(self) -> int:
        """The next number that the server reports of the child: its process id, then its exit code."""
        line = b""
        while not line.endswith(b"\n"):
            piece = os.read(self._report, 1)
            assert piece, "the fork server has ended"
            line += piece
        return int(line)

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            if not select.select([self._report], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.returncode = self._reported()
            os.close(self._report)
        return int(self.returncode)

    def _internal_poll(self, *_: object, **__: object) -> int | None:
        try:
            return self._wait(0) if self._report >= 0 else None
        except subprocess.TimeoutExpired:
            return None


def popen(args: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start a command, as `subprocess.Popen` does; its pipes are text."""
    if GPU.exists():
        return subprocess.Popen(args, text=True, **options)
    return _Forked(args, **options)


def run(
    args: Sequence[str],
    *,
    check: bool = False,
    capture_output: bool = False,
    input: str | None = None,  # noqa: A002 - as in subprocess
    timeout: float | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as `subprocess.run` does; what it writes is text."""
    pipes: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) if capture_output else {}
    if input is not None:
        pipes["stdin"] = subprocess.PIPE
    with popen(args, **pipes, **options) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(list(args), process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def import_all() -> None:
    """Import what the commands import, in the order that the toolkit keeps to."""
    from llm_training_toolkit.launch.backend import prepare_environment

    prepare_environment()
    from llm_training_toolkit.engine import prepare_deepspeed

    prepare_deepspeed("cpu")
    with _ray_generator_unseeded():
        for name in _TOOLKIT.split():
            importlib.import_module(f"llm_training_toolkit.{name}")
        for name in _OTHERS.split():
            importlib.import_module(name)


@contextmanager
def _ray_generator_unseeded() -> Iterator[None]:
    """Draw the ids of Ray's actor classes from the system, so that Ray's own generator is first used after a fork.

    Forked with its state, it gave all workers the same id for the object with which each begins. Of two that started
    within milliseconds one crashed, and the raylet waited a minute before it started another.
    """
    import ray.actor

    with mock.patch.object(ray.actor, "ActorClassID", _SystemActorClassID):
        yield


class _SystemActorClassID:
    """Actor class id drawn from the system."""

    @staticmethod
    def from_random() -> object:
        from ray import ActorClassID

        return ActorClassID(os.urandom(ActorClassID.size()))


def _serve(control: socket.socket) -> Order | None:
    """Fork a child for each order; the order in the child, None in the server once the tests have ended."""
    children: dict[int, tuple[int, int]] = {}  # by pidfd: process id, where its end is reported
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready != control.fileno():
                poll.unregister(ready)
                pid, report = children.pop(ready)
                _, status = os.waitpid(pid, 0)
                _tell(report, os.waitstatus_to_exitcode(status))
                os.close(report)
                os.close(ready)
                continue
            message, fds, _, _ = socket.recv_fds(control, _MESSAGE, 4)
            if not message:
                for pid, _ in children.values():
                    os.kill(pid, signal.SIGKILL)
                return None
            pid = os.fork()
            if pid == 0:
                for number, fd in enumerate(fds[:3]):
                    os.dup2(fd, number)
                for fd in [*fds, *children, *(report for _, report in children.values()), control.fileno()]:
                    os.close(fd)
                order: Order = json.loads(message)
                return order
            _tell(fds[3], pid)
            for fd in fds[:3]:
                os.close(fd)
            pidfd = os.pidfd_open(pid)
            children[pidfd] = (pid, fds[3])
            poll.register(pidfd, select.POLLIN)


def _tell(report: int, number: int) -> None:
    with suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(report, b"%d\n" % number)


def _become(order: Order) -> None:
    """Make this process what the order would have started."""
    if order["session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["folder"])
    tempfile.tempdir = None
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    import numpy as np

    np.random.seed()
    executable, *arguments = order["arguments"]
    sys.orig_argv = [executable, *arguments]
    sys.path[0] = order["folder"]
    if executable != sys.executable:
        sys.argv, sys.path[0] = [executable, *arguments], str(Path(executable).parent)
        runpy.run_path(executable, run_name="__main__")
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        assert arguments[0] == "-c", arguments
        sys.argv, sys.path[0] = ["-c", *arguments[2:]], ""
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})


def main() -> None:
    """Serve on the socket whose number is given; in a child, run its command and leave as it does."""
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the tests is not for the server
    import_all()
    gc.collect()
    gc.freeze()  # no collection in a child touches, and so copies, what was imported
    control = socket.socket(fileno=int(sys.argv[1]))
    order = _serve(control)
    if order is not None:
        control.detach()
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the shell of the tests ignores
        _become(order)


if __name__ == "__main__":
    main()
