"""Adapters belong to the files of one base, whoever reads them and wherever they lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llm_training_toolkit.checkpoint import (
    BaseWeights,
    check_base_matches,
    find_weight_files,
    find_weights_directory,
    read_base_weights,
)
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import CheckpointError

ALONE = RunContext(0, 1, torch.device("cpu"))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    directory = tmp_path / "weights"
    directory.mkdir()
    for number in (1, 2):
        (directory / f"model-{number:05d}-of-00002.safetensors").write_bytes(bytes([number]) * 100)
    (directory / "model.safetensors.index.json").write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(b"the same weights once more")
    (directory / "config.json").write_text("{}")
    return directory


def test_the_weights_are_the_files_that_transformers_reads(weights: Path) -> None:
    assert [file.name for file in find_weight_files(weights)] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for file in weights.glob("model-*"):
        file.unlink()
    assert [file.name for file in find_weight_files(weights)] == ["pytorch_model.bin"]


def test_a_base_survives_the_manifest_and_a_move(weights: Path, tmp_path: Path) -> None:
    before = BaseWeights.from_json(
        json.loads(json.dumps(read_base_weights(str(weights), ALONE, tmp_path / "cache").to_json()))
    )
    assert [entry.size for entry in before.files] == [100, 100]
    weights.rename(tmp_path / "elsewhere")
    check_base_matches(before, read_base_weights(str(tmp_path / "elsewhere"), ALONE, tmp_path / "cache"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: (path / "model-00002-of-00002.safetensors").write_bytes(b"x" * 100), "has other content"),
        (lambda path: (path / "model-00001-of-00002.safetensors").unlink(), "is not there"),
        (lambda path: (path / "model-00003-of-00003.safetensors").write_bytes(b"more"), "was not there"),
    ],
)
def test_another_base_is_refused_and_the_file_named(weights: Path, tmp_path: Path, change: object, said: str) -> None:
    before = read_base_weights(str(weights), ALONE, tmp_path / "cache")
    assert callable(change)
    change(weights)
    with pytest.raises(CheckpointError, match=rf"not the weights .* were trained beside .* {said}"):
        check_base_matches(before, read_base_weights(str(weights), ALONE, tmp_path / "cache"))


@pytest.mark.parametrize(
    ("path", "said"),
    [("a/b/c", "there is no such directory"), ("nobody/nothing-here", "nothing of this name fetched from the hub")],
)
def test_weights_that_are_nowhere(path: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        find_weights_directory(path)


def test_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights there \(model\*\.safetensors"):
        find_weight_files(tmp_path)
