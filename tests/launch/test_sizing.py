"""`train.micro_batch: auto`: a real out-of-memory halves the micro-batch, and nothing else changes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch.conftest import Environment, command, run_of
from llm_training_toolkit.launch.sizing import _container_free, is_out_of_memory
from llm_training_toolkit.runs import RunDirectory, attempt_record

TRAIN = {"steps": 3, "global_batch": 32, "micro_batch": "auto"}
SECTIONS = {
    "model": {
        "shape": {
            "num_hidden_layers": 1,
            "hidden_size": 64,
            "intermediate_size": 98304,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
    },
    "train": TRAIN,
    "cluster": {"workers": 0},
}
"""A model whose activations, 50 MB a sequence, are most of what it needs."""
LIMIT = 3900
"""Megabytes beside the imports: 32 sequences at once need 4,460, 16 need 3,390 (measured)."""
LIMIT_ON_RAY = 2400
"""Megabytes beside what a Ray worker holds when its attempt begins: 32 need 2,910, 16 need 1,810 (measured)."""
LIMITED = """
import resource, sys
import deepspeed, torch, transformers
from torch.utils.tensorboard import SummaryWriter
from llm_training_toolkit.cli import main
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv.pop(1)), resource.RLIM_INFINITY))
main()
"""


def losses(run: RunDirectory) -> list[float]:
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def attempts(run: RunDirectory) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(run.attempts.iterdir())]


def limited(config: Path, megabytes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ltt train` with so much memory for what comes after the imports."""
    verb = [sys.executable, "-c", LIMITED, str(megabytes * 2**20), "train", str(config), *arguments]
    return subprocess.run(verb, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(launch_config: Callable[..., Path]) -> None:
    halved = launch_config("halved", **SECTIONS | {"train": TRAIN | {"micro_batch": 16}})
    config = launch_config("narrow", **SECTIONS)
    subprocess.run(command(halved), check=True, capture_output=True)
    done = limited(config, LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: out of memory with micro-batches of 32; the next attempt takes 16" in done.stdout
    assert [(each["micro_batch"], each["state"]) for each in attempts(run_of(config))] == [
        (32, "failed"),
        (16, "finished"),
    ]
    assert losses(run_of(config)) == losses(run_of(halved))


@pytest.mark.slow
def test_a_micro_batch_that_was_asked_for_is_not_changed(launch_config: Callable[..., Path]) -> None:
    config = launch_config("asked", **SECTIONS)
    done = limited(config, LIMIT, "train.micro_batch=32")
    assert done.returncode == 1
    assert "out of memory with micro-batches of 32: lower train.micro_batch, or set it to auto" in done.stderr
    again = limited(config, LIMIT)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [each["micro_batch"] for each in attempts(run_of(config))] == [32, 16]


def test_what_a_container_leaves(tmp_path: Path) -> None:
    assert _container_free(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 250\n")
    assert _container_free(tmp_path) == 550
    (tmp_path / "memory.max").write_text("max\n")
    assert _container_free(tmp_path) == float("inf")


def test_an_allocation_that_fails_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.slow
@pytest.mark.cluster
def test_on_ray_the_next_attempt_takes_less_and_no_restart_is_spent(
    launch_config: Callable[..., Path], ray_environment: Environment
) -> None:
    config = launch_config("narrow-ray", **SECTIONS | {"cluster": {"workers": 1}, "failures": {"max": 0}})
    run = run_of(config)
    with subprocess.Popen(command(config), env=ray_environment, stdout=subprocess.PIPE, text=True) as process:
        _limit_the_first_attempt(run)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "out of memory with micro-batches of 32; the next attempt takes 16" in out
    assert [(each["micro_batch"], each["state"]) for each in attempts(run)] == [(32, "failed"), (16, "finished")]


def _limit_the_first_attempt(run: RunDirectory) -> None:
    """Set the limit on the worker itself, as soon as it has said who it is; later workers have none."""
    end = time.monotonic() + 100
    while not (found := attempt_record(run, 1)):
        assert time.monotonic() < end
        time.sleep(0.02)
    pid = int(found["pid"])
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size + LIMIT_ON_RAY * 2**20, resource.RLIM_INFINITY))
