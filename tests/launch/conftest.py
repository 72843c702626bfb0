"""One Ray cluster for all tests of launching, and the command line as a person runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from llm_training_toolkit.runs.directory import RunDirectory

Environment = Mapping[str, str]


@pytest.fixture(scope="session")
def ray_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """The environment of a command that joins the tests' own Ray cluster."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported
    os.environ.update(RAY_worker_niceness="0")  # Ray's 15 starves its workers beside another lane of tests
    os.environ["RAY_TMPDIR"] = str(tmp_path_factory.mktemp("ray"))
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
    yield {**os.environ, "RAY_ADDRESS": cluster.address}
    cluster.shutdown()


@pytest.fixture(scope="session")
def launch_config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the YAML file of a small run; runs share one cache, so only the first one prepares."""
    runs = tmp_path_factory.mktemp("launch")
    from conftest import tiny_config

    def write(name: str, **sections: dict[str, Any]) -> Path:
        config = tiny_config(corpus, runs, **{"run": {"name": name}, **sections})
        path = runs / f"{name}.yaml"
        data = json.loads(config.model_dump_json(exclude_unset=True))
        with path.open("w") as file:
            YAML().dump(data, file)
        return path

    return write


def run_of(config: Path) -> RunDirectory:
    """The run directory that a file of `launch_config` leads to."""
    return RunDirectory(config.parent / config.stem)


def command(config: Path, *arguments: str) -> list[str]:
    """`ltt train` with this environment's Python."""
    return [sys.executable, "-m", "llm_training_toolkit", "train", str(config), *arguments]


def wait_for_step(run: RunDirectory, step: int, process: subprocess.Popen[str], seconds: float = 900) -> None:
    """Wait until the run has completed `step` steps."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if run.metrics_path.exists() and any(
            json.loads(line)["step"] >= step for line in run.metrics_path.read_text().splitlines() if line.endswith("}")
        ):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise TimeoutError(f"{run.path} has not reached step {step} within {seconds} s")
