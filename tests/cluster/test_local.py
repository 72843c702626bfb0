"""cluster/start.py and cluster/local.yaml start a cluster of this machine, as docs/cluster.md says."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from machine_limits import find_free_port
from unit.cluster.test_local import CLUSTER, ROOT, START, read_walk


@dataclass(frozen=True)
class Started:
    """The cluster of cluster/local.yaml, on other ports."""

    address: str
    environment: Mapping[str, str]
    folder: Path
    process: subprocess.Popen[bytes]
    log: Path


def _mentioning(folder: Path) -> list[psutil.Process]:
    """Processes whose command line names a folder: every server of a Ray session names its session's."""
    processes = psutil.process_iter(["cmdline"])
    return [process for process in processes if str(folder) in " ".join(process.info["cmdline"] or [])]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    """The documented command, with a token that it makes itself; ended by its process."""
    folder = Path(tempfile.gettempdir()) / f"ltt-local-{os.getpid()}"  # a socket's path must be short
    port, dashboard = str(find_free_port()), str(find_free_port())
    own = f"--port {port} --temp-dir {folder} --ray-client-server-port {find_free_port()}"
    own += f" --dashboard-agent-listen-port {find_free_port()} --num-cpus 2"
    text = (CLUSTER / "local.yaml").read_text()
    assert "--port 6379" in text
    assert "--dashboard-port 8265" in text
    file = tmp_path / "local.yaml"
    file.write_text(text.replace("--port 6379", own).replace("--dashboard-port 8265", f"--dashboard-port {dashboard}"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["HOME"] = str(tmp_path)  # where Ray keeps the token
    log = tmp_path / "log"
    with (
        log.open("w") as out,
        subprocess.Popen([*START, str(file)], env=environment, stdout=out, stderr=out) as process,
    ):
        try:
            address = f"http://127.0.0.1:{dashboard}"
            yield Started(address, {**environment, "RAY_AUTH_MODE": "token"}, folder, process, log)
        finally:
            process.terminate()
            process.wait(timeout=300)
    shutil.rmtree(folder, ignore_errors=True)


def _answer(address: str, token: str) -> int:
    """The status with which the head answers the question for its jobs; 0 while nobody answers."""
    question = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(question, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def _wait_for_jobs(cluster: Started) -> str:
    """Wait until the head takes jobs; its token."""
    kept = Path(cluster.environment["HOME"]) / ".ray" / "auth_token"
    end = time.monotonic() + 300
    while not kept.is_file() or _answer(cluster.address, kept.read_text()) != 200:
        assert cluster.process.poll() is None, cluster.log.read_text()
        assert time.monotonic() < end, cluster.log.read_text()
        time.sleep(0.2)
    return kept.read_text()


def test_the_walk_works_as_written_and_the_cluster_leaves_nothing_behind(
    started: Started, corpus: Path, tmp_path: Path
) -> None:
    """Typed as written, but for the port, the place of the environment, and a smaller run."""
    token = _wait_for_jobs(started)
    assert _answer(started.address, "0" * len(token)) in {401, 403}
    _, lines = read_walk()
    smaller = [
        f"data.sources=[{{path: {corpus}, format: code}}]",
        "model.config_overrides.hidden_size=64",
        "train.steps=2",
    ]
    smaller += ["data.sequence_length=64", "tokenizer.train.vocab_size=512", "cluster.workers=1"]
    replaced = {
        "http://127.0.0.1:8265": started.address,
        ".venv/bin/activate": str(Path(sys.prefix) / "bin" / "activate"),
        "ltt submit configs/quickstart.yaml": f"ltt submit configs/quickstart.yaml {shlex.join(smaller)}",
    }
    for written, typed in replaced.items():
        assert sum(written in line for line in lines) == 1
        lines = [line.replace(written, typed) for line in lines]
    environment = {name: value for name, value in started.environment.items() if name != "RAY_AUTH_MODE"}
    script = "set -e\n" + "\n".join(f"echo '>>> {number}'\n{line}" for number, line in enumerate(lines))
    done = subprocess.run(
        ["bash", "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr + started.log.read_text()
    said = dict(part.split("\n", maxsplit=1) for part in done.stdout.split(">>> ")[1:])
    assert "time           about" in said["3"]
    assert "submitted as job quickstart-" in said["4"]
    assert "succeeded" in said["5"]
    assert "step 2/2" in said["6"]
    assert "finished" in said["7"]

    assert _mentioning(started.folder)
    started.process.terminate()
    started.process.wait(timeout=300)
    end = time.monotonic() + 15
    while (left := _mentioning(started.folder)) and time.monotonic() < end:
        time.sleep(0.5)
    assert not left
