"""A shell in which `ltt` is forked warm: scripts run as typed, without the seconds that imports take.

A small program named `ltt` comes first on the shell's PATH. It passes arguments, environment, folder and standard
streams to the tests, which fork the command (`fork_server`). SIGINT and SIGTERM reach the command.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import fork_server

FORKS = "LTT_FORKS"  # variable with the address of the tests
_MESSAGE = 2**20  # bytes, more than arguments and environment take
_OWN = ("_", "OLDPWD", "PATH", "PWD", "SHLVL")  # a shell sets these; the fork server is one for each environment
_PROGRAM = f"""#!{sys.executable} -IS
import json, os, signal, socket, sys
tests = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
tests.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, {_MESSAGE})
tests.connect(os.environ.pop({FORKS!r}))
order = {{"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}}
socket.send_fds(tests, [json.dumps(order).encode()], [0, 1, 2])
pid = int(tests.recv(64))
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda received, _: os.kill(pid, received))
code = int(tests.recv(64))
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextmanager
def shell_environment(folder: Path, environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield the environment of shells with the forked `ltt`. `folder` holds the program and its socket."""
    program, address = folder / "ltt", folder / "forks"
    program.write_text(_PROGRAM)
    program.chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(address))
        listening.listen()
        own = {name: environment[name] for name in _OWN if name in environment}
        threading.Thread(target=_accept, args=[listening, own], daemon=True).start()
        yield {**environment, "PATH": path, FORKS: str(address)}


def _accept(listening: socket.socket, own: Mapping[str, str]) -> None:
    while True:
        try:
            asking, _ = listening.accept()
        except OSError:  # the tests have closed it
            return
        threading.Thread(target=_serve, args=[asking, own], daemon=True).start()


def _serve(asking: socket.socket, own: Mapping[str, str]) -> None:
    """Fork one command, and report its process id and its exit code."""
    with asking:
        message, streams, _, _ = socket.recv_fds(asking, _MESSAGE, 3)
        order = json.loads(message)
        environment = {name: value for name, value in order["environment"].items() if name not in _OWN} | dict(own)
        command = [str(Path(sys.executable).parent / "ltt"), *order["arguments"]]
        stdin, stdout, stderr = streams
        options = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
        process = fork_server.popen(command, env=environment, cwd=order["folder"], **options)
        for stream in streams:
            os.close(stream)
        asking.send(b"%d" % process.pid)
        asking.send(b"%d" % process.wait())


def run_script(script: str, folder: Path, environment: Mapping[str, str], seconds: float) -> tuple[int, str]:
    """Run a bash script in a folder; return its exit code and what it printed, standard error included.

    What it has left in the background gets SIGTERM.
    """
    with subprocess.Popen(
        ["bash", "-c", script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
    return process.returncode, output
