"""Start a Ray worker: forked by the server of `ray_workers.py`, or as Ray does where that server cannot.

Raylets of tests run this file by two links, named as the two scripts of Ray that it stands for. It imports next to
nothing, stays the raylet's child as long as the worker lives, and ends as the worker has ended; a worker whose shim is
killed is killed too.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

SETUP = "setup_worker.py"
"""Ray's script for workers with a runtime environment, also its name for the raylet, which leaves it out otherwise."""
_CONTEXT = "--serialized-runtime-env-context="
_ENVIRONMENT = {"command_prefix", "env_vars", "py_executable", "override_worker_entrypoint", "java_jars"}


def main() -> None:
    """Become the shim of a forked worker, or the worker as Ray starts it."""
    links, name = os.path.split(sys.argv[0])
    scripts = os.path.realpath(f"{links}/ray")
    given = [
        word.replace(f"{links}/", f"{scripts}/") if word.startswith(f"{links}/") else word for word in sys.argv[1:]
    ]
    order = _set_up(given) if name == SETUP else _order([f"{scripts}/{name}", *given], {})
    if order is not None:
        _be_shim(f"{links}/socket", order)
    os.execv(sys.executable, [sys.executable, f"{scripts}/{name}", *given])


def _set_up(words: list[str]) -> dict[str, Any] | None:
    """What `setup_worker.py` makes of its arguments, if the runtime environment has variables and a folder alone."""
    [serialized] = [word.removeprefix(_CONTEXT) for word in words if word.startswith(_CONTEXT)] or ["{}"]
    context = json.loads(serialized)
    variables, prefix = context.get("env_vars") or {}, context.get("command_prefix") or []
    moves = len(prefix) == 3 and (prefix[0], prefix[2]) == ("cd", "&&")
    if (
        context.keys() - _ENVIRONMENT
        or (prefix and not moves)
        or context.get("py_executable", sys.executable) != sys.executable
        or context.get("override_worker_entrypoint")
        or any("$" in value for value in variables.values())  # Ray replaces variables in them
        or "--language=PYTHON" not in words
    ):
        return None
    if moves:
        os.chdir(prefix[1])
    return _order([word for word in words if not word.startswith((_CONTEXT, "--language="))], variables)


def _order(arguments: list[str], variables: dict[str, str]) -> dict[str, Any]:
    limits = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
    return {
        "arguments": arguments,
        "environment": dict(os.environ) | variables,
        "folder": os.getcwd(),  # noqa: PTH109 - pathlib takes a tenth of a second here
        "limits": {limit: resource.getrlimit(limit) for limit in limits},
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    }


def _be_shim(server: str, order: dict[str, Any]) -> None:
    """Have a worker forked, wait for its end and end like it; return if it is not forked."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
        try:
            line.connect(server)
            socket.send_fds(line, [json.dumps(order).encode()], [0, 1, 2])
            answer = line.recv(16)
        except OSError:
            return
        if answer != b"forked":
            return
        ended = _wait(line)
    if ended < 0:
        if -ended not in {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(-ended, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-ended])
        os.kill(os.getpid(), -ended)
    os._exit(ended)


def _wait(line: socket.socket) -> int:
    """The exit code of the worker, negative for a signal. Like a plain worker, it does not outlive its raylet."""
    raylet = int(os.environ["RAY_RAYLET_PID"])
    line.settimeout(1)
    while os.getppid() == raylet:
        with suppress(TimeoutError):
            return int(line.recv(16) or b"1")  # nothing: the server has ended, and its workers with it
    return 1


if __name__ == "__main__":
    main()
