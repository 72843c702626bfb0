"""A model from an exported directory: whole, or adapters with their base wherever it went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.models import LossModule, build_model
from llm_training_toolkit.models.load_exported import load_exported_model

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "max_position_embeddings": 64,
}
IDS = torch.arange(12)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """Adapters that peft itself has saved, beside a base of bf16, and the logits of the two."""
    torch.manual_seed(2)
    base: Any = build_model(CONFIG, precision="bf16", attention="sdpa")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    given = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model: Any = get_peft_model(base, given, autocast_adapter_dtype=False).eval()
    model.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters", logits(model)


def test_adapters_of_peft_open_with_the_logits_they_had(adapters: tuple[Path, torch.Tensor]) -> None:
    directory, wanted = adapters
    assert torch.equal(logits(load_exported_model(directory)), wanted)
    assert not torch.equal(logits(load_exported_model(directory.parent / "base")), wanted)


def test_the_loss_of_adapters_is_that_of_an_output_layer_trained_whole(tmp_path: Path) -> None:
    torch.manual_seed(3)
    base: Any = build_model(CONFIG | {"tie_word_embeddings": False}, precision="fp32", attention="sdpa")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    given = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model: Any = get_peft_model(base, given)
    torch.nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "adapters")

    opened = load_exported_model(tmp_path / "adapters")
    wanted = torch.nn.functional.cross_entropy(logits(opened)[0, :-1], IDS[0, 1:], reduction="sum")
    labels = torch.cat([IDS[:, 1:], torch.tensor([[-100]])], dim=1)
    with torch.no_grad():
        found = LossModule(opened, "auto")(IDS, torch.arange(IDS.shape[1])[None], labels)
    torch.testing.assert_close(found, wanted)


def test_a_base_that_moved_along_is_found(adapters: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    directory, wanted = adapters
    (tmp_path / "new").mkdir()
    for part in (directory, directory.parent / "base"):
        part.rename(tmp_path / "new" / part.name)
    assert torch.equal(logits(load_exported_model(tmp_path / "new" / "adapters")), wanted)


def test_a_base_that_is_gone_is_named(adapters: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    directory, _ = adapters
    (directory.parent / "base").rename(tmp_path / "renamed")
    with pytest.raises(CheckpointError, match=rf"holds adapters.*is not there: {tmp_path}/base.*--merge"):
        load_exported_model(directory)
    config = directory / "adapter_config.json"
    values = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "renamed")}
    config.write_text(json.dumps(values))
    load_exported_model(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, r"do not fit .*other.*another model.*size mismatch"),
        ({"model_type": "gpt_bigcode"}, r"do not fit .*other.*another model.*not found in the base model"),
    ],
)
def test_adapters_of_another_model_are_refused(
    adapters: tuple[Path, torch.Tensor], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    directory, _ = adapters
    other: Any = build_model(CONFIG | change, precision="bf16", attention="sdpa")
    other.save_pretrained(tmp_path / "other")
    config = directory / "adapter_config.json"
    values = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "other")}
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        load_exported_model(directory)


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither config\.json nor adapter_config\.json"):
        load_exported_model(tmp_path)
