"""The Slurm script and the Dockerfile: sound by their linters, and the script does what it says.

Slurm itself is played by two small commands, as is Ray; on a real Slurm the script has been tried by hand.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit.plan.forecast.cluster_file import read_hardware

BIN = Path(sys.executable).parent
CLUSTER = Path(__file__).parents[3] / "cluster"
SLURM = CLUSTER / "slurm.sh"
SCRIPTS = sorted(CLUSTER.glob("*.sh"))

STAND_INS = {
    # `srun OPTIONS COMMAND` on one node, `ray symmetric-run OPTIONS -- COMMAND`: the command, with its exit code.
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "ray": 'echo "$@" >"$TRACES/ray"; while [[ $1 != -- ]]; do shift; done; shift; "$@"',
    "scontrol": 'echo "$@" >"$TRACES/scontrol"',
    # `ltt train ...`: notes what it was given; ends with CODE, or with 75 when it is asked to stop.
    "ltt": """\
"$PYTHON" -c 'import json, os, sys; print(json.dumps({"env": dict(os.environ), "args": sys.argv[1:]}))' "$@" \\
    >"$TRACES/ltt.new"
mv "$TRACES/ltt.new" "$TRACES/ltt"
[[ -n ${CODE-} ]] && exit "$CODE"
trap 'exit 75' TERM
for _ in {1..200}; do sleep 0.05; done
exit 9""",
}


def tool(*words: str) -> str:
    """What a linter says; empty where it has nothing to say."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_sound(path: Path) -> None:
    assert not tool("bash", "-n", str(path))
    assert not tool(str(BIN / "shellcheck"), str(path))
    assert os.access(path, os.X_OK)


def test_the_dockerfile_is_sound_and_takes_the_pins() -> None:
    path = CLUSTER / "Dockerfile"
    assert not tool(str(BIN / "hadolint"), str(path))
    text = path.read_text()
    assert re.findall(r"^FROM .* AS (\w+)$", text, re.MULTILINE) == ["base", "cpu", "cuda"]
    assert text.count("--requirement requirements.txt") == 2
    assert "RAY_AUTH_MODE=token" in text
    sent = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    for line in sent:
        if line.startswith("!"):
            assert (CLUSTER.parent / line[1:]).exists()
    assert "!requirements.txt" in sent


def test_the_hardware_is_that_of_the_job() -> None:
    hardware = read_hardware(SLURM)
    assert f"#SBATCH --nodes={hardware.nodes}\n" in SLURM.read_text()
    assert f"#SBATCH --gpus-per-node={hardware.devices_per_node}\n" in SLURM.read_text()


def test_slurm_reads_every_option() -> None:
    """Slurm stops reading at the first line that is no comment."""
    lines = SLURM.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])


@dataclass
class Job:
    """The script, started as Slurm would."""

    folder: Path
    process: subprocess.Popen[str]

    def trace(self, name: str) -> str | None:
        """What a stand-in has noted."""
        path = self.folder / name
        return path.read_text() if path.is_file() else None

    def run(self) -> dict[str, Any]:
        """What `ltt` was given, as soon as it runs."""
        end = time.monotonic() + 20
        while (found := self.trace("ltt")) is None:
            assert time.monotonic() < end
            assert self.process.poll() is None
            time.sleep(0.02)
        content: dict[str, Any] = json.loads(found)
        return content


def start(folder: Path, *arguments: str, **environment: str) -> Job:
    commands = folder / ".venv" / "bin"
    commands.mkdir(parents=True)
    for name, text in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "10042", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "8", "TMPDIR": str(folder)}
    own = {"PATH": os.environ["PATH"], "TRACES": str(folder), "PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(folder)}
    command = ["bash", str(SLURM), *arguments]
    return Job(
        folder, subprocess.Popen(command, env={**own, **slurm, **environment}, text=True, stderr=subprocess.PIPE)
    )


@pytest.mark.parametrize(("code", "requeued"), [(0, None), (1, None), (2, None), (75, "requeue 10042\n")])
def test_a_stopped_run_is_queued_again_and_no_other(tmp_path: Path, code: int, requeued: str | None) -> None:
    job = start(tmp_path, "my code.yaml", "train.steps=3", CODE=str(code))
    assert job.process.wait(timeout=30) == code
    assert job.trace("scontrol") == requeued
    assert json.loads(job.trace("ltt") or "")["args"] == ["train", "my code.yaml", "train.steps=3"]


@pytest.mark.parametrize(
    ("number", "requeued"), [(signal.SIGUSR1, "requeue 10042\n"), (signal.SIGTERM, None)], ids=["time is up", "by hand"]
)
def test_a_signal_stops_the_run_with_a_checkpoint(tmp_path: Path, number: int, requeued: str | None) -> None:
    job = start(tmp_path, "run.yaml")
    job.run()
    job.process.send_signal(number)
    assert job.process.wait(timeout=30) == 75
    assert job.trace("scontrol") == requeued
    assert not list(tmp_path.glob("tmp.*"))


def test_the_job_has_a_token_of_its_own(tmp_path: Path) -> None:
    tokens = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        job = start(tmp_path / name, "run.yaml", CODE="0")
        job.process.wait(timeout=120)
        environment = json.loads(job.trace("ltt") or "")["env"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert re.fullmatch("[0-9a-f]{64}", environment["RAY_AUTH_TOKEN"])
        assert f"--address {environment['RAY_ADDRESS']} --min-nodes 2 --num-cpus 8" in (job.trace("ray") or "")
        assert environment["RAY_ADDRESS"].endswith(":20042")
        tokens.add(environment["RAY_AUTH_TOKEN"])
    assert len(tokens) == 2


def test_no_configuration_is_said_in_words(tmp_path: Path) -> None:
    job = start(tmp_path)
    assert job.process.wait(timeout=30) == 2
    assert job.process.stderr is not None
    assert "usage: sbatch" in job.process.stderr.read()
