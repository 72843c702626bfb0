"""Tutorials on Ray: their commands work as typed, and print the lines that the pages show."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path

import pytest

from launching import Environment
from machine_limits import find_free_port
from shell_commands import FORKS, run_script, shell_environment
from tutorials import build_script, find_missing_lines, read_steps, split_output

pytestmark = pytest.mark.slow


def test_the_tutorial_of_a_search_works_as_typed(ray_environment: Environment, tmp_path: Path) -> None:
    """Typed as written, on the tests' own cluster."""
    steps = read_steps("learning-rate")
    with tempfile.TemporaryDirectory() as short, shell_environment(Path(short), ray_environment) as environment:
        code, output = run_script(build_script(steps), tmp_path, environment, seconds=1200)
    assert code == 0, output
    missing = [find_missing_lines(step, text) for step, text in zip(steps, split_output(output), strict=True)]
    assert [lines for lines in missing if lines] == []


def test_the_tutorial_of_a_cluster_works_as_typed(tmp_path: Path) -> None:
    """Typed as written, but for the ports, and for the resumed run, which ends sooner."""
    code, output, logs = _type_cluster_tutorial(tmp_path / "first")
    if "timed out during startup" in logs:  # Ray gives a node 30 s, also on a machine that others keep busy
        code, output, logs = _type_cluster_tutorial(tmp_path / "second")
    assert code == 0, output + logs
    assert "Task was destroyed" not in output, "a pipe that was closed"
    steps = read_steps("cluster")
    printed = split_output(output)
    missing = {step.commands: find_missing_lines(step, text) for step, text in zip(steps, printed, strict=True)}
    assert {commands: lines for commands, lines in missing.items() if lines} == {}


def _type_cluster_tutorial(folder: Path) -> tuple[int, str, str]:
    """Return the exit code, the output and the logs of the page's commands in an empty folder."""
    folder.mkdir()
    with tempfile.TemporaryDirectory() as short:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        plain |= {"HOME": short, "RAY_worker_niceness": "0"}  # Ray keeps the token at home
        plain["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "1"  # in place of 30 s for the head
        with shell_environment(Path(short), plain) as environment:
            code, output = run_script(_adapt(build_script(read_steps("cluster"))), folder, environment, seconds=1200)
    return code, output, "".join(log.read_text() for log in sorted(folder.glob("*.log")))


def _adapt(script: str) -> str:
    """Return the script on ports that no other cluster of this machine has, with 100 steps after the resume.

    Ray starts the job's `ltt` by itself: only the shell's own commands are forked.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    stopped = "10#$(ls runs/walk/checkpoints | tail -n 1 | cut -c 6-14)"
    client, agent = find_free_port(), find_free_port()
    replaced = {
        "ray start": f"env -u {FORKS} {shlex.quote(f'PATH={path}')} ray start",
        "--head": f"--head --ray-client-server-port {client} --dashboard-agent-listen-port {agent}",
        "6379": str(find_free_port()),
        "8265": str(find_free_port()),
        "6006": str(find_free_port()),
        "5240$1": "${agents[$1]}",
        "ltt jobs resume walk": f"ltt submit walk.yaml run.dir=$PWD/runs train.steps=$(({stopped} + 100)) --extend",
    }
    for written, typed in replaced.items():
        assert written in script, written
        script = script.replace(written, typed)
    return f"agents=(0 {find_free_port()} {find_free_port()})\n{script}"
