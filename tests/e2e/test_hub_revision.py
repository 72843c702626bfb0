"""`model.revision`: the commit that a run began with is recorded, and used by every resume, export and generation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import fork_server
from hub_server import hub
from launching import run_of
from llm_training_toolkit.checkpoint import find_latest_checkpoint, read_manifest
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.runs.attempts import read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory
from unit.models.test_check_weights import QWEN3, published

FIRST, SECOND = "1" * 40, "2" * 40
SECTIONS = {
    "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2},
    "cluster": {"workers": 0},
    "export": {"at_end": True},
}


def ltt(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llm_training_toolkit", *arguments]
    return fork_server.run(command, env={**os.environ, **environment}, capture_output=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_keeps_the_commit_that_it_began_with(
    launch_config: Callable[..., Path], prepared_run: RunDirectory, tmp_path: Path
) -> None:
    published(QWEN3, tmp_path / "w")
    tokenizer = Path(DatasetInfo.from_json(prepared_run.dataset_info_path.read_text()).tokenizer_path)
    shutil.copytree(tokenizer, tmp_path / "w", dirs_exist_ok=True)
    commits = {FIRST: {path.name: path.read_bytes() for path in (tmp_path / "w").iterdir()}}
    tensors = load_file(tmp_path / "w" / "model.safetensors")
    save_file({name: 2 * value for name, value in tensors.items()}, tmp_path / "other.safetensors", {"format": "pt"})
    commits[SECOND] = commits[FIRST] | {"model.safetensors": (tmp_path / "other.safetensors").read_bytes()}
    branches = {"main": SECOND, "v1": FIRST}
    # Of an unknown name: size and family follow from the hub's config.json.
    model = {"path": "tiny/tiny-model", "name": "tiny-model", "revision": "v1", "config_overrides": {}}
    given = {"path": "tiny/tiny-model", "train": None, "revision": "v1"}
    config = launch_config("revision", **SECTIONS)
    text = json.loads(json.dumps({"model": model | {"lora": {"rank": 4}}, "tokenizer": given}))
    overrides = [f"{key}={json.dumps(value)}" for key, value in text.items()]
    run = run_of(config)

    with hub("tiny/tiny-model", {}, "models", commits=commits, branches=branches) as endpoint:
        environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}

        refused = ltt("train", str(config), *overrides, "model.revision=v2", environment=environment)
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert "v2" in refused.stderr

        first = ltt("train", str(config), *overrides, "train.steps=2", environment=environment)
        assert first.returncode == 0, first.stdout + first.stderr
        recorded = {"path": "tiny/tiny-model", "revision": "v1", "commit": FIRST}
        assert read_attempt_record(run, 1)["hub"] == recorded

        branches["v1"] = SECOND
        shutil.rmtree(tmp_path / "home")
        resumed = ltt("train", str(config), *overrides, "--extend", environment=environment)
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        moved = f"v1 has moved on the hub, from commit {FIRST[:12]} to {SECOND[:12]}"
        assert moved in " ".join(resumed.stdout.split())
        newest = find_latest_checkpoint(run.checkpoints_dir)
        assert newest is not None
        assert (read_manifest(newest).step, read_manifest(newest).extra["hub"]) == (4, recorded)
        assert json.loads((run.export_dir / "adapter_config.json").read_text())["revision"] == FIRST
        written = ltt("generate", str(run.path), "--prompt", "def ", "--tokens", "2", environment=environment)
        assert written.returncode == 0, written.stderr

        changed = ltt("train", str(config), *overrides, "model.revision=main", environment=environment)
        assert changed.returncode == 2
        assert 'model.revision: "v1" -> "main"' in changed.stderr
