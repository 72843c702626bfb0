"""`train.micro_batch_size: auto`: a real out-of-memory halves the micro-batch, and nothing else changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fork_server
from launching import command, run_of
from llm_training_toolkit.runs.directory import RunDirectory
from run_results import list_losses

TRAIN = {"steps": 2, "global_batch_size": 32, "micro_batch_size": "auto", "precision": "fp32"}
SECTIONS = {
    "model": {
        "activation_checkpointing": "none",
        "config_overrides": {
            "num_hidden_layers": 1,
            "hidden_size": 64,
            "intermediate_size": 49152,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
    },
    "train": TRAIN,
    "engine": {"zero_stage": 2},
    "cluster": {"workers": 0},
}
"""A model whose activations, 100 MB a sequence by the estimate, are most of what it needs."""
GIVES_BACK = {"MALLOC_PERTURB_": "0"}
"""Any setting of malloc leaves it as it is (engine/allocation.py): the limits below were measured so, at ZeRO 2."""
LIMIT = 3900
"""Megabytes beside the imports: 32 sequences at once need 4,670, 16 need 3,440 (measured)."""
LIMITED = """
import resource, sys
import deepspeed, torch, transformers
from torch.utils.tensorboard import SummaryWriter
from llm_training_toolkit.cli.app import main
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv.pop(1)), resource.RLIM_INFINITY))
main()
"""


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
    assert list_losses(run_of(config)) == list_losses(run_of(halved))


@pytest.mark.slow
def test_a_micro_batch_that_was_asked_for_is_not_changed(launch_config: Callable[..., Path]) -> None:
    config = launch_config("asked", **SECTIONS)
    done = limited(config, LIMIT, "train.micro_batch_size=32")
    assert done.returncode == 1
    assert "out of memory with micro-batches of 32: lower train.micro_batch_size, or set it to auto" in done.stderr
    again = fork_server.run(command(config), capture_output=True)  # without a limit: it knows from the attempt before
    assert again.returncode == 0, again.stdout + again.stderr
    assert [each["micro_batch"] for each in attempts(run_of(config))] == [32, 16]
