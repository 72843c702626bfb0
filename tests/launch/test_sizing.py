"""`train.micro_batch_size: auto`: a real out-of-memory halves the micro-batch, and nothing else changes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch

import fork_server
from conftest import tiny_config
from launch.conftest import Environment, command, run_of
from llm_training_toolkit.config import Config
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import TrainingError
from llm_training_toolkit.models.memory import is_out_of_memory
from llm_training_toolkit.runs.attempts import (
    begin_attempt,
    end_attempt,
    fail_attempt,
    mark_out_of_memory,
    read_attempt_record,
)
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.worker.micro_batch import (
    MemorySettings,
    SmallerMicroBatch,
    _find_previous_settings,
    build_out_of_memory_error,
    describe_memory_load,
    read_container_free_memory,
    resolve_memory_settings,
)
from llm_training_toolkit.worker.spec import WorkerSpec

TRAIN = {"steps": 3, "global_batch_size": 32, "micro_batch_size": "auto", "precision": "bf16"}
SECTIONS = {
    "model": {
        "config_overrides": {
            "num_hidden_layers": 1,
            "hidden_size": 64,
            "intermediate_size": 98304,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        }
    },
    "train": TRAIN,
    "engine": {"zero_stage": 2},
    "cluster": {"workers": 0},
}
"""A model whose activations, 50 MB a sequence, are most of what it needs."""
GIVES_BACK = {"MALLOC_PERTURB_": "0"}
"""Any setting of malloc leaves it as it is (engine/allocation.py): the limits below were measured so, at ZeRO 2."""
LIMIT = 3900
"""Megabytes beside the imports: 32 sequences at once need 4,460, 16 need 3,390 (measured)."""
LIMIT_ON_RAY = 2400
"""Megabytes beside what a Ray worker holds when its attempt begins: 32 need 2,910, 16 need 1,810 (measured)."""
LIMITED = """
import resource, sys
import deepspeed, torch, transformers
from torch.utils.tensorboard import SummaryWriter
from llm_training_toolkit.cli.app import main
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv.pop(1)), resource.RLIM_INFINITY))
main()
"""


def losses(run: RunDirectory) -> list[float]:
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def attempts(run: RunDirectory) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted(run.attempts_dir.glob("*.json"))]


def limited(config: Path, megabytes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`ltt train` with so much memory for what comes after the imports."""
    verb = [sys.executable, "-c", LIMITED, str(megabytes * 2**20), "train", str(config), *arguments]
    environment = {**os.environ, **GIVES_BACK}
    return subprocess.run(verb, env=environment, capture_output=True, text=True, check=False, timeout=900)


@pytest.mark.slow
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(launch_config: Callable[..., Path]) -> None:
    halved = launch_config("halved", **SECTIONS | {"train": TRAIN | {"micro_batch_size": 16}})
    config = launch_config("narrow", **SECTIONS)
    fork_server.run(command(halved), check=True, capture_output=True)
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
    done = limited(config, LIMIT, "train.micro_batch_size=32")
    assert done.returncode == 1
    assert "out of memory with micro-batches of 32: lower train.micro_batch_size, or set it to auto" in done.stderr
    again = limited(config, LIMIT)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [each["micro_batch"] for each in attempts(run_of(config))] == [32, 16]


def write_group(group: Path, limit: str, used: int, cached: int) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")


def test_the_tightest_group_counts(tmp_path: Path) -> None:
    assert read_container_free_memory("0::/\n", tmp_path) == float("inf")
    write_group(tmp_path, "1000", 700, 250)
    assert read_container_free_memory("0::/\n", tmp_path) == 550
    write_group(tmp_path / "job", "400", 350, 0)
    write_group(tmp_path / "job" / "step", "max", 10, 0)
    assert read_container_free_memory("0::/job/step\n", tmp_path) == 50


def test_older_systems_have_a_folder_for_memory(tmp_path: Path) -> None:
    group = tmp_path / "memory" / "job"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("900\n")
    (group / "memory.usage_in_bytes").write_text("500\n")
    (group / "memory.stat").write_text("total_inactive_file 100\n")
    assert read_container_free_memory("5:cpu,cpuacct:/job\n4:memory:/job\n", tmp_path) == 500


def chosen(run: RunDirectory, config: Config) -> int:
    place, _ = resolve_memory_settings(
        WorkerSpec(run, config, cast("DatasetInfo", None)), RunContext(0, 1, torch.device("cpu"))
    )
    rows = place.config.train.micro_batch_size
    assert rows != "auto"
    return rows


def test_an_attempt_learns_from_the_one_before(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, tmp_path, train={"steps": 3, "global_batch_size": 8, "micro_batch_size": "auto"})
    run = RunDirectory(tmp_path / "run")
    context = RunContext(0, 1, torch.device("cpu"))

    def attempt(rows: int, asked: int | str = "auto") -> int:
        facts = {"load": describe_memory_load(config, context), "micro_batch": rows, "asked": asked, "zero": 0}
        return begin_attempt(run, facts)

    assert chosen(run, config) == 8, "nothing is known: by the estimate"
    end_attempt(run, attempt(4), "stopped")
    assert chosen(run, config) == 4, "as before, so that a resume repeats every bit"
    end_attempt(run, attempt(1, asked=1), "stopped")
    assert chosen(run, config) == 4, "a number somebody asked for is not kept"
    number = attempt(4)
    mark_out_of_memory(run, number)
    fail_attempt(run, number, "rank 1: out of memory")
    fail_attempt(run, number, "rank 0: connection closed by peer")
    assert chosen(run, config) == 2, "another rank's failure does not take the mark back"
    assert read_attempt_record(run, number)["error"] == "rank 1: out of memory"
    attempt(2)
    assert chosen(run, config) == 1, "killed before its first step"
    longer = tiny_config(
        corpus, tmp_path, train={"global_batch_size": 8, "micro_batch_size": "auto"}, data={"sequence_length": 32}
    )
    assert chosen(run, longer) == 8, "another load"


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
    sections = SECTIONS | {"train": TRAIN | {"global_batch_size": 64}, "failures": {"max_failures": 0}}
    sections["cluster"] = {"workers": 2, "env": GIVES_BACK}
    config = launch_config("narrow-ray", **sections)
    run = run_of(config)
    with fork_server.popen(command(config), env=ray_environment, stdout=subprocess.PIPE) as process:
        _limit_the_first_attempt(run)
        out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out
    assert "out of memory with micro-batches of 32; the next attempt takes 16" in out
    assert [(each["micro_batch"], each["state"]) for each in attempts(run)] == [(32, "failed"), (16, "finished")]


def _limit_the_first_attempt(run: RunDirectory) -> None:
    """Set the limit on rank 0 alone, as soon as it has said who it is; later workers have none."""
    end = time.monotonic() + 400
    while not (found := read_attempt_record(run, 1)):
        assert time.monotonic() < end
        time.sleep(0.02)
    pid = int(found["pid"])
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size + LIMIT_ON_RAY * 2**20, resource.RLIM_INFINITY))


def test_after_the_smallest_micro_batch_several_workers_take_the_next_zero_stage(corpus: Path, tmp_path: Path) -> None:
    asked = tiny_config(corpus, tmp_path, train={"steps": 3, "global_batch_size": 8, "micro_batch_size": "auto"})
    run, context = RunDirectory(tmp_path / "run"), RunContext(0, 2, torch.device("cpu"))
    taken = MemorySettings(zero=0, micro_batch=1).apply_to_config(asked)
    after = build_out_of_memory_error(asked, taken, 2)
    assert isinstance(after, SmallerMicroBatch)
    assert "ZeRO 2" in str(after)
    facts = {"load": describe_memory_load(asked, context), "micro_batch": 1, "asked": "auto", "zero": 0}
    mark_out_of_memory(run, begin_attempt(run, facts))
    assert _find_previous_settings(run, asked, context) == MemorySettings(zero=2, micro_batch=1)
    highest = MemorySettings(zero=3, micro_batch=1).apply_to_config(asked)
    assert isinstance(build_out_of_memory_error(asked, highest, 2), TrainingError)
    assert isinstance(build_out_of_memory_error(asked, taken, 1), TrainingError), "one worker has nothing to spread"
