"""cluster/start.py refuses a file that cannot start here; docs/cluster.md names the command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CLUSTER = ROOT / "cluster"
START = [sys.executable, str(CLUSTER / "start.py")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("cluster_name: x\nprovider: {type: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2]}", "names other machines"),
        ("cluster_name: x\nprovider: {type: local, head_ip: 127.0.0.1, worker_ips: []}\nnodes: 1", "'nodes'"),
        ("cluster_name: x\nprovider: {type: local, head_ip: 127.0.0.1, worker_ips: []}", "head_start_ray_commands"),
        ("provider: {", "is no cluster file"),
    ],
)
def test_a_file_that_cannot_start_here_is_refused_in_words(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    done = subprocess.run([*START, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def read_walk() -> tuple[str, list[str]]:
    """The command of the first terminal in docs/cluster.md, and the lines of the second."""
    section = (ROOT / "docs" / "cluster.md").read_text().split("## This machine")[1].split("\n## ")[0]
    first, second = re.findall(r"```\n(.*?)\n```", section, re.DOTALL)
    return first.split("#")[0].strip(), [line.split("  #")[0] for line in second.splitlines()]


def test_the_first_line_of_the_walk_starts_the_file() -> None:
    first, _ = read_walk()
    assert first == "make cluster"
    recipe = subprocess.run(["make", "-n", "cluster"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "/python cluster/start.py\n" in recipe
