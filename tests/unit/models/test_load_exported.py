"""A model from an exported directory: whole, or adapters with their base wherever it went."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

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


def edit_tensors(file: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file: Path, **change: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    model: Any = build_model(CONFIG, precision="fp32", attention="sdpa")
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_missing_and_surplus_weights_are_refused_by_name(exported: Path) -> None:
    edit_tensors(exported / "model.safetensors", lambda all_: all_.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"missing_keys: model\.layers\.0\.mlp\.up_proj\.weight"):
        load_exported_model(exported)


def test_a_layer_more_than_stored_or_fewer_is_refused(exported: Path) -> None:
    edit_json(exported / "config.json", num_hidden_layers=2, layer_types=["full_attention"] * 2)
    with pytest.raises(CheckpointError, match=r"missing_keys: model\.layers\.1\..*11 in all"):
        load_exported_model(exported)
    edit_tensors(exported / "model.safetensors", lambda all_: all_.update(stranger=torch.ones(1)))
    edit_json(exported / "config.json", num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(CheckpointError, match="unexpected_keys: stranger"):
        load_exported_model(exported)


@pytest.mark.parametrize("kind", ["unknown type", "known type"])
def test_code_of_a_strangers_directory_is_never_run(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (exported / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    change: dict[str, Any] = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.C")}
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
    if kind == "known type":
        edit_json(exported / "config.json", **change)
        load_exported_model(exported)
    else:
        edit_json(exported / "config.json", **change, model_type="strange")
        with pytest.raises(CheckpointError, match="never run here"):
            load_exported_model(exported)
    assert not (tmp_path / "ran").exists()


def test_adapters_of_a_base_with_code_are_refused(adapters: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    directory, _ = adapters
    (tmp_path / "base" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    edit_json(tmp_path / "base" / "config.json", auto_map={"AutoConfig": "evil.C"}, model_type="strange")
    with pytest.raises(CheckpointError, match="never run here"):
        load_exported_model(directory)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_opened(exported: Path, adapters: tuple[Path, torch.Tensor]) -> None:
    for file, pickled in (
        (exported / "model.safetensors", "pytorch_model.bin"),
        (adapters[0] / "adapter_model.safetensors", "adapter_model.bin"),
    ):
        torch.save(load_file(file), file.with_name(pickled))
        file.unlink()
        with pytest.raises(CheckpointError, match=r"\.safetensors|safetensors"):
            load_exported_model(file.parent)


def test_missing_and_surplus_adapters_are_refused_by_name(adapters: tuple[Path, torch.Tensor]) -> None:
    directory, _ = adapters
    file = directory / "adapter_model.safetensors"
    edit_tensors(file, lambda all_: all_.update({f"{name}x": all_.pop(name) for name in sorted(all_)[:1]}))
    with pytest.raises(CheckpointError, match=r"missing_keys: .*unexpected_keys: "):
        load_exported_model(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_damaged_file_is_said_in_a_sentence(exported: Path, name: str) -> None:
    (exported / name).write_bytes((exported / name).read_bytes()[:50])
    with pytest.raises(CheckpointError, match=str(exported)):
        load_exported_model(exported)
