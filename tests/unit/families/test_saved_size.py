"""Sizes that follow from the config.json of weights under any name."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit import families
from llm_training_toolkit.config import parse_config
from llm_training_toolkit.config.model_config import TokenizerConfig
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.plan import make_plan
from tiny_models import SHAPES, UNKNOWN_QWEN2


def path_config(path: Path, **model: Any) -> Config:
    raw = {
        "run": {"name": "test", "dir": str(path.parent)},
        "model": {"path": str(path), **model},
        "data": {"sequence_length": 64, "sources": [{"path": "x", "format": "text"}]},
        "train": {"steps": 10, "global_batch_size": 1, "precision": "bf16"},
    }
    return parse_config(raw, "test")


def save_values(path: Path, values: dict[str, Any], tokens: tuple[str, ...] = ()) -> Path:
    path.mkdir(exist_ok=True)
    (path / "model.safetensors").touch()
    (path / "config.json").write_text(json.dumps(values))
    if tokens:
        (path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": token} for token in tokens]}))
    return path


@pytest.mark.parametrize(("origin", "shape"), SHAPES.items(), ids=list(SHAPES))
def test_any_dimensions_of_a_known_class_follow_from_a_directory(
    origin: str, shape: dict[str, Any], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    known = families.find_size(origin)
    values = {**known.hf_values, **shape, "vocab_size": 640, "model_type": known.family.model_type}
    if known.family.model_type == "qwen3_5_text":
        values |= {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    AutoConfig.for_model(**values).save_pretrained(tmp_path / "My-Model")
    saved = json.loads((tmp_path / "My-Model" / "config.json").read_text())
    weights = save_values(tmp_path / "My-Model", saved, known.family.special_tokens.all)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(weights))

    plan = make_plan(path_config(weights, lora={"rank": 4}))
    assert not plan.problems
    assert (plan.model, plan.family) == ("My-Model", known.family.name)
    assert plan.parameters == model.num_parameters()
    assert plan.flops_per_token > 2 * sum(p.numel() for p in model.get_input_embeddings().parameters())
    assert plan.adapter is not None
    assert set(plan.adapter.targets) == set(known.family.lora_targets)
    full = make_plan(path_config(weights))
    assert full.memory_gb_per_device["weights"] == pytest.approx(2 * plan.parameters / 1e9)


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("qwen2", "qwen2"),
        ("qwen2.5", "qwen2"),
        ("codeqwen1.5", "qwen2"),
        ("starcoder", "gpt_bigcode"),
        ("santacoder", "gpt_bigcode"),
    ],
)
def test_the_tokenizer_tells_families_of_one_class_apart(name: str, model_type: str, tmp_path: Path) -> None:
    shape = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_inner": None, "vocab_size": 640}
    values = UNKNOWN_QWEN2 if model_type == "qwen2" else {"model_type": model_type, **shape}
    weights = save_values(tmp_path / "mine", values, families.FAMILIES[name].special_tokens.all)
    assert families.find_run_size(path_config(weights)).family.name == name
    elsewhere = save_values(tmp_path / "no-tokenizer", values)
    size = families.find_size_of_weights(str(elsewhere), tokenizer=TokenizerConfig(path=str(weights)))
    assert size is not None
    assert size.family.name == name


def test_values_of_transformers_4_and_of_other_intervals_are_read(tmp_path: Path) -> None:
    old = UNKNOWN_QWEN2 | {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    hf = families.resolve_hf_config(path_config(save_values(tmp_path / "old", old)))
    assert hf["rope_parameters"] == {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}
    known = families.find_size("qwen3.5-4b")
    shape = SHAPES["qwen3.5-4b"] | {"model_type": "qwen3_5_text", "vocab_size": 640, "full_attention_interval": 2}
    hybrid = save_values(tmp_path / "hybrid", {**known.hf_values, **shape})
    dims = families.read_model_dims(families.resolve_hf_config(path_config(hybrid)))
    assert (dims.layers, dims.attention_layers) == (4, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is llama, which is no Qwen or StarCoder"),
        ({"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"hidden_size": "48"}, "hidden_size = '48' must be a whole number"),
        ({"use_sliding_window": True, "sliding_window": 32}, "use_sliding_window = True is not supported"),
        ({"rope_theta": 1e6, "rope_scaling": "yarn"}, "rope_scaling = 'yarn' must be an object"),
        ({"hidden_size": 50}, "hidden size 50 is not divisible by 6 attention heads"),
        (
            {"model_type": "qwen2_moe", "decoder_sparse_step": 2},
            "num_experts is missing.*\n(.*\n)+.*decoder_sparse_step = 2 puts layers without experts",
        ),
    ],
)
def test_a_configuration_that_cannot_be_counted_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    weights = save_values(tmp_path / "mine", {**UNKNOWN_QWEN2, **changes})
    with pytest.raises(PlanError, match=message):
        make_plan(path_config(weights))


def test_a_directory_named_like_another_class_has_its_own(tmp_path: Path) -> None:
    weights = save_values(tmp_path / "starcoder", UNKNOWN_QWEN2)
    assert families.find_run_size(path_config(weights)).family.model_type == "qwen2"
    with pytest.raises(PlanError, match=r"holds a qwen2 model, and model\.name = starcoder2-3b is of starcoder2"):
        families.resolve_hf_config(path_config(weights, name="starcoder2-3b"))


def test_a_sliding_window_is_refused_under_the_name_of_a_known_size(tmp_path: Path) -> None:
    known = families.find_size("qwen2.5-0.5b")
    values = {**known.hf_values, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32}
    with pytest.raises(PlanError, match="use_sliding_window = True is not supported"):
        families.resolve_hf_config(path_config(save_values(tmp_path / "mine", values), name="qwen2.5-0.5b"))


def test_a_begun_run_knows_such_a_size_when_the_weights_are_gone(tmp_path: Path) -> None:
    weights, run = (
        save_values(tmp_path / "mine", UNKNOWN_QWEN2, families.FAMILIES["qwen2"].special_tokens.all),
        tmp_path / "test",
    )
    config = path_config(weights)
    before = make_plan(config)
    run.mkdir()
    (run / "resolved.json").write_text(config.model_dump_json())
    (run / "plan.json").write_text(json.dumps(before.to_json()))
    weights.rename(tmp_path / "gone")
    after = make_plan(config)
    assert (after.family, after.hf_config, after.parameters) == ("qwen2", before.hf_config, before.parameters)
    from_run = parse_config(config.model_dump(mode="json") | {"model": {"name": "mine", "init_from": str(run)}}, "test")
    assert make_plan(from_run).parameters == before.parameters
    run.rename(tmp_path / "other")
    with pytest.raises(PlanError, match="no known size"):
        make_plan(config)


@pytest.mark.parametrize(
    ("origin", "changes", "named"),
    [
        ("qwen3-4b", {"vocab_size": 152_064}, "shape of qwen3-4b and qwen3-4b-instruct-2507"),
        ("qwen3.5-9b", {}, "shape of qwen3.5-9b"),
        ("starcoderbase-1b", {}, "shape of starcoderbase-1b"),
        ("qwen3-4b", {"hidden_size": 64}, "Did you mean"),
    ],
)
def test_a_misspelt_name_beside_weights_names_the_sizes_of_their_shape(
    origin: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    size = families.find_size(origin)
    weights = save_values(tmp_path / "mine", {**size.hf_values, **changes, "model_type": size.family.model_type})
    with pytest.raises(PlanError, match=named):
        families.find_run_size(path_config(weights, name="qwen3-4"))
    assert families.find_run_size(path_config(weights, name=origin)) is size
