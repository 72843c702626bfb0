"""`ltt train` with adapters, from a saved base to text, as a person runs it; and what cannot work, said at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fork_server
from launching import command, run_of
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.generation.generator import TextGenerator
from llm_training_toolkit.generation.load import open_model
from llm_training_toolkit.models.sampling import SamplingParams
from llm_training_toolkit.runs.directory import find_model_directory

INLINE: dict[str, dict[str, Any]] = {
    "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "precision": "bf16"},
    "cluster": {"workers": 0},
    "export": {"at_end": True},
}


def ltt(verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "llm_training_toolkit", verb, *arguments]
    return fork_server.run(whole, capture_output=True, timeout=900)


def adapted(base: Path, **lora: Any) -> dict[str, dict[str, Any]]:
    """The sections of a run with adapters beside the weights in a directory."""
    model = {"path": str(base), "config_overrides": {}, "lora": {"rank": 4, **lora}}
    return INLINE | {"model": model, "tokenizer": {"path": str(base), "train": None}}


@pytest.mark.slow
def test_from_a_saved_model_over_a_resume_to_text(launch_config: Callable[..., Path]) -> None:
    base = launch_config("adapters_base", **INLINE)
    fork_server.run(command(base), check=True, capture_output=True)
    config = launch_config("adapters", **adapted(run_of(base).export_dir, dropout=0.1))
    planned = json.loads(ltt("plan", str(config), "--json").stdout)
    assert planned["trainable_parameters"] < planned["parameters"] / 5

    run = run_of(config)
    fork_server.run(command(config, "train.steps=2"), check=True, capture_output=True)
    shutil.rmtree(run.export_dir)
    done = fork_server.run(command(config, "--extend", "--json"), check=True, capture_output=True)
    assert json.loads(done.stdout)["step"] == 4
    assert sorted(path.name for path in run.export_dir.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    ]
    text = TextGenerator.from_directory(find_model_directory(run.path)).complete_prompt("def ", SamplingParams(4)).text
    from_checkpoint, _ = open_model(run, step=4, device="cpu")
    assert from_checkpoint.complete_prompt("def ", SamplingParams(4)).text == text

    merged = ltt("export", str(run.path), "--merge", "--json")
    assert merged.returncode == 0, merged.stderr
    answer = json.loads(merged.stdout)
    assert (answer["kind"], answer["step"], Path(answer["path"]).name) == ("merged", 4, "export_merged")
    assert 0.0 <= answer["difference"] < 0.05
    written = ltt("generate", answer["path"], "--prompt", "def ", "--tokens", "4", "--json")
    assert json.loads(written.stdout)["written"] == text, "bf16 rounding may part them, not in this run"

    moved = run_of(base).export_dir.rename(run_of(base).path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"holds adapters.*is not there.*adapters_base/export"):
        TextGenerator.from_directory(run.export_dir)
    refused = fork_server.run(command(config, "train.steps=6", "--extend"), capture_output=True)
    assert refused.returncode == 2
    assert "export: there is no such directory" in refused.stderr
    moved.rename(run_of(base).export_dir)


@pytest.mark.slow
def test_checkpoints_that_are_not_there_are_not_exported(launch_config: Callable[..., Path]) -> None:
    config = launch_config("exports", **INLINE | {"checkpoint": {"interval": 2}, "export": {"at_end": False}})
    fork_server.run(command(config), check=True, capture_output=True)
    run = run_of(config)
    with pytest.raises(CheckpointError, match="a run without an export: ltt export"):
        find_model_directory(run.path)
    (run.get_checkpoint_dir(4, 1) / "manifest.json").rename(run.path / "kept.json")
    half = ltt("export", str(run.path), "--step", "4")
    assert half.returncode == 1
    assert "step 4 is not complete (it has no manifest.json); complete are steps 2" in half.stderr
    assert "step 3 is not there; complete are steps 2" in ltt("export", str(run.path), "--step", "3").stderr
    written = json.loads(ltt("generate", str(run.path), "--prompt", "def ", "--tokens", "4", "--json").stdout)
    assert Path(written["model"]).name == "step_000000002_a1", "the newest complete one, for want of an export"
    assert "nothing to merge" in ltt("export", str(run.path), "--merge").stderr
    done = ltt("export", str(run.path), "--out", str(run.path / "mine"))
    assert done.returncode == 0, done.stderr
    assert "model of step_000000002_a1" in done.stdout
    assert "equal" in done.stdout
    assert find_model_directory(run.path / "mine") == run.path / "mine"
    exported = ltt("generate", str(run.path / "mine"), "--prompt", "def ", "--tokens", "4", "--json")
    assert json.loads(exported.stdout)["written"] == written["written"]


def test_four_bits_without_a_gpu_are_refused_before_anything_is_prepared(launch_config: Callable[..., Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = launch_config("four_bits", **INLINE | {"model": {"lora": {"quantize": "nf4"}}})
    said = ltt("train", str(config))
    assert said.returncode == 2
    assert "model.lora.quantize = nf4: 4-bit weights need a GPU" in said.stderr
    assert not run_of(config).dataset_info_path.exists()
