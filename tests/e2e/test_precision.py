"""`train.precision: auto`: the measurement decides, ranks agree, a resume keeps what the run began with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fork_server
from launching import command, run_of
from llm_training_toolkit.config import parse_config_json

pytestmark = [pytest.mark.slow]
WITHOUT_BF16 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
"""Makes any processor compute as one that has no instructions for bf16."""
SECTIONS: dict[str, Any] = {
    "train": {"steps": 2, "global_batch_size": 2, "micro_batch_size": 2, "precision": "auto"},
    "cluster": {"workers": 0},
}
LACKING_ON_RANK_1 = """
import os, sys
if os.environ["RANK"] == "1":
    os.environ.update(ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2")
os.execv(sys.executable, [sys.executable, "-m", "llm_training_toolkit", *sys.argv[1:]])
"""


def train(arguments: list[str], **environment: str) -> str:
    """Output of a command; there is a fork server for each environment, so that torch has read it."""
    done = fork_server.run(arguments, env={**os.environ, **environment}, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def recorded(config: Path) -> tuple[str, str]:
    """The precision in resolved.json and in plan.json."""
    run = run_of(config)
    return parse_config_json(run.resolved_config_path.read_text()).train.precision, json.loads(
        run.plan_path.read_text()
    )["precision"]


def measured(**environment: str) -> float:
    code = (
        "import torch; from llm_training_toolkit.distributed.matmul_speed import measure_bf16_slowdown; "
        "print(measure_bf16_slowdown(torch.device('cpu')))"
    )
    return float(train([sys.executable, "-c", code], **environment))


def test_without_instructions_for_bf16_it_is_slower() -> None:
    assert measured(**WITHOUT_BF16) > 2


def test_the_measurement_decides_and_is_recorded(launch_config: Callable[..., Path]) -> None:
    config = launch_config("measured", **SECTIONS)
    said = train(command(config))
    slowdown = measured()
    wanted = "bf16" if slowdown < 1 else "fp32"
    if 0.8 < slowdown < 1.25:
        wanted = recorded(config)[0]  # too close for two measurements to agree
    assert recorded(config) == (wanted, wanted), f"bf16 takes {slowdown} times as long"
    assert f"train.precision = {wanted} (auto): bf16 is " in said


def test_a_resume_on_a_faster_machine_keeps_fp32(launch_config: Callable[..., Path]) -> None:
    config = launch_config("begun-slow", **SECTIONS)
    said = train(command(config), **WITHOUT_BF16)
    assert "train.precision = fp32 (auto): bf16 is " in said
    assert any("train.precision = fp32" in note for note in json.loads(run_of(config).plan_path.read_text())["notes"])
    planned = json.loads(train([sys.executable, "-m", "llm_training_toolkit", "plan", str(config), "--json"]))
    assert planned["precision"] == "fp32"
    train(command(config, "train.steps=3", "--extend"))
    assert recorded(config) == ("fp32", "fp32")


def test_a_resume_on_a_slower_machine_keeps_bf16_and_says_that_it_is_slow(launch_config: Callable[..., Path]) -> None:
    config = launch_config("begun-fast", **SECTIONS)
    train(command(config, "train.precision=bf16"))
    said = train(command(config, "train.steps=3", "--extend"), **WITHOUT_BF16)
    assert recorded(config) == ("bf16", "bf16")
    assert "warning: this run is in bf16, which is " in said
    refused = fork_server.run(command(config, "train.precision=fp32"), capture_output=True)
    assert refused.returncode == 2
    assert 'train.precision: "bf16" -> "fp32"' in refused.stderr


def test_ranks_with_different_answers_agree(launch_config: Callable[..., Path], tmp_path: Path) -> None:
    config, wrapper = launch_config("unequal", **SECTIONS), tmp_path / "wrapper.py"
    wrapper.write_text(LACKING_ON_RANK_1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    rendezvous = ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    started = [*torchrun, *rendezvous, str(wrapper), "train", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(started, env=environment, capture_output=True, text=True, check=True, timeout=200).stdout
    assert recorded(config) == ("fp32", "fp32")
    assert "train.precision = fp32 (auto): bf16 is " in said
    assert "on the slowest worker's CPU" in said
