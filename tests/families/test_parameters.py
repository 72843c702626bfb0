"""The closed formulas against the published totals and against the modules that transformers builds."""

import json
from typing import Any

import pytest

from llm_training_toolkit import families
from llm_training_toolkit.config.schema import Config

PUBLISHED = {
    "qwen2-0.5b": 494_032_768,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-coder-3b": 3_085_938_688,
    "qwen2.5-coder-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "starcoderbase-1b": 1_137_207_296,
    "starcoderbase-3b": 3_043_311_104,
    "starcoderbase-7b": 7_327_263_232,
    "starcoderbase": 15_517_456_384,
    "starcoder2-3b": 3_030_371_328,
    "starcoder2-7b": 7_173_923_840,
    "starcoder2-15b": 15_957_889_024,
}
SMALL = {"num_hidden_layers": 3, "hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 160}


def config(name: str, **shape: Any) -> Config:
    raw = {
        "run": {"name": "test"},
        "model": {"name": name, "shape": shape},
        "tokenizer": {"path": "tokenizer"},
        "data": {"sequence_length": 64, "sources": [{"path": "x", "format": "text"}]},
        "train": {"steps": 10},
    }
    return Config.model_validate_json(json.dumps(raw), strict=True)


@pytest.mark.parametrize(("name", "total"), PUBLISHED.items())
def test_totals_are_the_published_ones(name: str, total: int) -> None:
    assert families.parameters(families.hf_config(config(name))) == total


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("qwen2.5-0.5b", {"num_key_value_heads": 2}),
        ("qwen2.5-7b", {"num_key_value_heads": 3, "vocab_size": 1000}),
        ("qwen3-0.6b", {"num_key_value_heads": 2, "head_dim": 10}),
        ("qwen3-8b", {"num_key_value_heads": 6, "attention_bias": True}),
        ("qwen3-1.7b", {"num_key_value_heads": 1, "tie_word_embeddings": False, "rope_theta": 10000}),
        ("starcoder2-3b", {"num_key_value_heads": 2}),
        ("starcoder2-15b", {"num_key_value_heads": 3, "use_bias": False}),
        ("starcoderbase-1b", {}),
        ("starcoder", {"multi_query": False, "n_positions": 100}),
    ],
)
def test_transformers_builds_as_many(name: str, shape: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = families.hf_config(config(name, **{"vocab_size": 512, **SMALL, **shape}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf))
    assert type(model).__name__ == hf["architectures"][0]
    assert sum(weight.numel() for weight in model.parameters()) == families.parameters(hf)


@pytest.mark.parametrize("name", families.SIZES)
def test_transformers_keeps_every_value(name: str) -> None:
    from transformers import AutoConfig

    hf = families.hf_config(config(name))
    model_type = hf.pop("model_type")
    accepted = AutoConfig.for_model(model_type, **hf)
    for key, value in hf.items():
        assert getattr(accepted, key) == value, key
    assert "dtype" not in hf


def test_rope_base_reaches_the_model() -> None:
    from transformers import AutoConfig

    hf = families.hf_config(config("qwen3-0.6b", rope_theta=5e6))
    assert AutoConfig.for_model(**hf).rope_parameters["rope_theta"] == 5e6


def test_flops_count_matrices_and_attention() -> None:
    hf = families.hf_config(config("qwen3-0.6b"))
    model = families.anatomy(hf)
    norms = 28 * (2 * 1024 + 2 * 128) + 1024
    assert model.matmul_parameters == 596_049_920 - norms  # tied: the look-up and the output layer are one matrix
    assert families.flops_per_token(hf, 2048) == 6 * model.matmul_parameters + 12 * 28 * 16 * 128 * 2048


def test_flops_stop_at_the_sliding_window() -> None:
    hf = families.hf_config(config("starcoder2-3b"))
    assert families.flops_per_token(hf, 4096) == families.flops_per_token(hf, 16384)
    assert families.flops_per_token(hf, 2048) < families.flops_per_token(hf, 4096)
