"""Models from a configuration: parameters are made on a device one by one, buffers and ties as everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from llm_training_toolkit.models import build_model
from unit.models.test_check_weights import LANGUAGE_MODELS, MODELS

CONFIGS = MODELS | LANGUAGE_MODELS


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_on_the_device_and_buffers_are_computed_on_the_host(name: str) -> None:
    here, there = (
        build_model(CONFIGS[name], precision="bf16", attention="sdpa", device=device)
        for device in (None, torch.device("meta"))
    )
    assert {parameter.device.type for parameter in there.parameters()} == {"meta"}
    assert [(key, value.shape, value.dtype, value.requires_grad) for key, value in there.named_parameters()] == [
        (key, value.shape, value.dtype, value.requires_grad) for key, value in here.named_parameters()
    ]
    ours, theirs = (dict(model.named_buffers()) for model in (there, here))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert _is_tied(there) == _is_tied(here)
    assert nn.Linear(1, 1).weight.device.type == "cpu"


def _is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight
