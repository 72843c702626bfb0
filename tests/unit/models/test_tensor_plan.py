"""Plans of transformers by which models are cut have no styles but those that are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from llm_training_toolkit.distributed.tensor_group import DataParallelGroup, TensorGroup
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.models.build import build_model
from llm_training_toolkit.models.tensor_parallel import TensorParallelModel
from llm_training_toolkit.plan import make_plan
from tiny_models import SHAPES
from tiny_runs import tiny_config

GROUP = TensorGroup(1, 2, DataParallelGroup(0, 1))
CUT = ("qwen2.5-0.5b", "qwen3-0.6b", "starcoder2-3b")


def build(size: str) -> tuple[torch.nn.Module, TensorParallelModel]:
    """A tiny model of a size, cut for the second of two ranks."""
    section: dict[str, Any] = {"name": size, "config_overrides": SHAPES[size]}
    shape = make_plan(tiny_config(Path("nowhere"), Path("nowhere"), model=section)).hf_config
    model = build_model(shape, precision="fp32", attention="sdpa", device=torch.device("meta"))
    return model, TensorParallelModel(model, GROUP, lambda _, meta: torch.zeros(meta.shape))


@pytest.mark.parametrize("size", CUT)
def test_every_matrix_of_a_layer_is_cut(size: str) -> None:
    model, cut = build(size)
    whole = {name for name, each in model.named_parameters() if each.dim() == 2 and cut.get_slice(each) is None}
    assert whole <= {"model.embed_tokens.weight", "lm_head.weight"}
    biases = {name for name, each in model.named_parameters() if name.endswith("bias") and cut.get_slice(each) is None}
    assert all("norm" in name or "o_proj" in name or "c_proj" in name for name in biases)
    assert all(each.device.type == "cpu" for each in (*model.parameters(), *model.buffers()))


def test_an_unknown_style_is_an_error_and_not_a_wrong_cut() -> None:
    styles = set(AutoConfig.for_model("qwen3_5_text").base_model_tp_plan.values())
    assert "colwise_gather_output" in styles
    with pytest.raises(PlanError, match="colwise_gather_output"):
        build("qwen3.5-4b")
