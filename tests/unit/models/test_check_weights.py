"""Loading weights: all of them or none, of the right family, tied as they were, and never fewer rows than there are."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from llm_training_toolkit.errors import CheckpointError, PlanError
from llm_training_toolkit.models import build_model, check_pretrained_weights, resize_embeddings
from vision_language import save_vision_language_model

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
QWEN2 = {key: QWEN3[key] for key in QWEN3 if key != "head_dim"} | {"model_type": "qwen2"}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3 untied": QWEN3 | {"tie_word_embeddings": False},
    "qwen3_moe": QWEN3 | MOE | {"model_type": "qwen3_moe", "tie_word_embeddings": False},
    "starcoder2": QWEN2
    | {"model_type": "starcoder2", "attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1},
    "gpt_bigcode": {
        "model_type": "gpt_bigcode",
        "vocab_size": 512,
        "n_embd": 32,
        "n_inner": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "pad_token_id": 0,
        "attn_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
    },
}

LINEAR = {
    "num_hidden_layers": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "pad_token_id": None,
}
LANGUAGE_MODELS = {
    "qwen3_5 tied": QWEN3 | LINEAR | {"model_type": "qwen3_5_text"},
    "qwen3_5_moe": {key: QWEN3[key] for key in QWEN3 if key != "intermediate_size"}
    | MOE
    | LINEAR
    | {"model_type": "qwen3_5_moe_text", "shared_expert_intermediate_size": 16, "tie_word_embeddings": False},
}


def published(config: dict[str, Any], directory: Path) -> dict[str, Tensor]:
    """Write a model as transformers publishes it; its parameters."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.save_pretrained(directory)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def loaded(config: dict[str, Any], directory: Path) -> Any:
    check_pretrained_weights(str(directory), config["model_type"])
    return build_model(config, precision="fp32", attention="sdpa", path=str(directory))


@pytest.fixture(params=list(MODELS))
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MODELS[request.param]


def test_weights_arrive_as_they_were_published(config: dict[str, Any], tmp_path: Path) -> None:
    wanted = published(config, tmp_path)
    model = loaded(config, tmp_path)
    found = dict(model.named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    tied = config.get("tie_word_embeddings", True)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_no_dropout_is_left_and_no_row_is_frozen(config: dict[str, Any], tmp_path: Path) -> None:
    published(config, tmp_path)
    model = loaded(config, tmp_path)
    assert model.get_input_embeddings().padding_idx is None
    dropouts = [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert set(dropouts) <= {0.0}
    assert model.config.to_dict().get("attention_dropout", 0.0) == 0.0


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    published(QWEN3, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing_keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        loaded(QWEN3, tmp_path)


def test_a_weight_too_many_is_named(tmp_path: Path) -> None:
    published(QWEN3, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {"model.layers.2.mlp.up_proj.weight": torch.zeros(64, 32)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"unexpected_keys: model\.layers\.2\.mlp\.up_proj\.weight"):
        loaded(QWEN3, tmp_path)


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    published(QWEN3, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"mismatched_keys: .*layers\.0\.mlp\.down_proj.*64.*96.*6 in all"):
        loaded(QWEN3, tmp_path)


@pytest.mark.parametrize(("expert", "matrix"), [(1, None), (4, torch.zeros(16, 32)), (1, torch.zeros(8, 32))])
def test_experts_that_are_not_as_many_or_not_alike_are_refused(
    tmp_path: Path, expert: int, matrix: Tensor | None
) -> None:
    published(MODELS["qwen3_moe"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {
        f"model.layers.1.mlp.experts.{expert}.up_proj.weight": matrix
    }
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="no weights can be loaded"):
        loaded(MODELS["qwen3_moe"], tmp_path)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_of_a_vision_language_checkpoint_the_language_model_is_loaded(name: str, tmp_path: Path) -> None:
    config = LANGUAGE_MODELS[name]
    torch.manual_seed(1)
    whole = save_vision_language_model(config, tmp_path).eval()
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name.split(".")[1] for name in tensors if name.startswith("model.")} == {"language_model", "visual"}
    tensors["mtp.fc.weight"] = torch.zeros(8, 8)  # the layer that predicts several tokens
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = loaded(config, tmp_path)
    assert sum(each.numel() for each in model.parameters()) < sum(each.numel() for each in whole.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == config["tie_word_embeddings"]
    ids = torch.randint(0, 512, (2, 7))
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_fused_experts_of_a_vision_language_checkpoint_are_loaded(tmp_path: Path) -> None:
    config = LANGUAGE_MODELS["qwen3_5_moe"]
    whole = save_vision_language_model(config, tmp_path)
    own = {name: each.detach().clone() for name, each in whole.named_parameters()}
    assert any(name.endswith("experts.gate_up_proj") for name in own)
    save_file(own, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = dict(loaded(config, tmp_path).named_parameters())
    assert all(
        torch.equal(each, own[name.replace("model.", "model.language_model.", 1)]) for name, each in found.items()
    )


@pytest.mark.parametrize("change", ["missing", "surplus", "apart"])
def test_nothing_but_the_visual_tower_is_ignored(change: str, tmp_path: Path) -> None:
    config = LANGUAGE_MODELS["qwen3_5 tied"]
    save_vision_language_model(config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        del tensors["model.language_model.layers.2.linear_attn.A_log"]
    elif change == "surplus":
        tensors["model.language_model.layers.9.mlp.up_proj.weight"] = torch.zeros(64, 32)
    else:
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    wanted = {"missing": "missing_keys: .*A_log", "surplus": "unexpected_keys: .*layers.9", "apart": "but different"}
    with pytest.raises(CheckpointError, match=wanted[change]):
        loaded(config, tmp_path)


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    weights = published(QWEN3, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        loaded(QWEN3, tmp_path)


def test_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    published(QWEN2, tmp_path)
    with pytest.raises(PlanError, match=r"holds a qwen2 model, model\.name is of qwen3"):
        loaded(QWEN3, tmp_path)


def test_code_in_the_repository_of_weights_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "configuration_qwen.py").write_text("raise SystemExit('run')")
    classes = {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen", "auto_map": classes}))
    with pytest.raises(CheckpointError, match="code in its own repository, which is never run"):
        loaded(QWEN2 | {"model_type": "qwen"}, tmp_path)


def test_two_different_matrices_that_should_be_one_are_refused(tmp_path: Path) -> None:
    published(QWEN3, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    same, other = (tensors | {"lm_head.weight": matrix} for matrix in (embedding.clone(), embedding + 1))
    save_file(same, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = loaded(QWEN3, tmp_path)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    save_file(other, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"tied by config\.json, but different: lm_head\.weight, model\.embed_tokens\.weight"
    ):
        loaded(QWEN3, tmp_path)


def test_new_rows_are_the_mean_of_the_old_which_stay(config: dict[str, Any], tmp_path: Path) -> None:
    wanted = published(config, tmp_path)
    model = loaded(config, tmp_path)
    resize_embeddings(model, 576, lambda _: nullcontext())
    found = dict(model.named_parameters())
    assert found.keys() == wanted.keys()
    assert model.config.vocab_size == 576
    for name, before in wanted.items():
        assert torch.equal(found[name][: len(before)], before), name
        if len(found[name]) > len(before):
            assert len(found[name]) == 576
            torch.testing.assert_close(found[name][512:], before.mean(dim=0).expand(64, -1))
    assert sum(len(found[name]) == 576 for name in found) == (1 if config.get("tie_word_embeddings", True) else 2)
    assert model(input_ids=torch.tensor([[1, 575]]), use_cache=False).logits.shape == (1, 2, 576)
