"""Errors of a stream of weights, on one rank; tests/ranks/test_weight_stream.py has several."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.node_group import NodeGroup
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.models.weight_stream import WeightStream


def test_an_error_that_the_caller_swallows_is_raised_at_the_end(tmp_path: Path) -> None:
    """As transformers collects some errors of tensors, and returns a model."""
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(8)}, file)
    context, node = RunContext(0, 1, torch.device("cpu")), NodeGroup((0,), is_reader=True)
    with WeightStream(str(tmp_path), context, node) as stream:
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size - 4)
        with (
            pytest.raises(CheckpointError, match="ends at byte") as caught,
            stream.raise_together(lambda error: CheckpointError(str(error))),
            suppress(OSError),
        ):
            stream.load_tensor("weight")
    assert isinstance(caught.value.__cause__, OSError)
