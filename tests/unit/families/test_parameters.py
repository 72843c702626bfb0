"""The closed formulas against the published totals and against the modules that transformers builds."""

import json
from typing import Any

import pytest

from llm_training_toolkit import families
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.errors import PlanError

TOTALS = {
    494_032_768: ("qwen2-0.5b", "qwen2.5-0.5b", "qwen2.5-coder-0.5b"),
    1_543_714_304: ("qwen2-1.5b", "qwen2.5-1.5b", "qwen2.5-coder-1.5b"),
    3_085_938_688: ("qwen2.5-3b", "qwen2.5-coder-3b"),
    7_615_616_512: ("qwen2-7b", "qwen2.5-7b", "qwen2.5-coder-7b"),
    14_770_033_664: ("qwen2.5-14b", "qwen2.5-coder-14b"),
    32_763_876_352: ("qwen2.5-32b", "qwen2.5-coder-32b"),
    72_706_203_648: ("qwen2-72b", "qwen2.5-72b"),
    596_049_920: ("qwen3-0.6b",),
    1_720_574_976: ("qwen3-1.7b",),
    4_022_468_096: ("qwen3-4b", "qwen3-4b-instruct-2507"),
    8_190_735_360: ("qwen3-8b",),
    14_768_307_200: ("qwen3-14b",),
    32_762_123_264: ("qwen3-32b",),
    30_532_122_624: ("qwen3-30b-a3b", "qwen3-30b-a3b-instruct-2507", "qwen3-coder-30b-a3b-instruct"),
    235_093_634_560: ("qwen3-235b-a22b", "qwen3-235b-a22b-instruct-2507"),
    79_674_391_296: ("qwen3-next-80b-a3b-instruct",),
    480_154_875_392: ("qwen3-coder-480b-a35b-instruct",),
    463_987_712: ("qwen1.5-0.5b",),
    1_836_828_672: ("qwen1.5-1.8b",),
    3_950_369_280: ("qwen1.5-4b",),
    7_721_324_544: ("qwen1.5-7b",),
    14_167_290_880: ("qwen1.5-14b",),
    32_512_218_112: ("qwen1.5-32b",),
    72_287_920_128: ("qwen1.5-72b",),
    111_209_914_368: ("qwen1.5-110b",),
    7_250_284_544: ("codeqwen1.5-7b",),
    14_315_784_192: ("qwen1.5-moe-a2.7b",),
    57_408_658_944: ("qwen2-57b-a14b",),
    # Qwen3.5 without the visual tower and the layer that predicts several tokens.
    752_393_024: ("qwen3.5-0.8b",),
    1_881_825_088: ("qwen3.5-2b",),
    4_205_751_296: ("qwen3.5-4b",),
    8_953_803_264: ("qwen3.5-9b",),
    26_895_998_464: ("qwen3.5-27b",),
    34_660_610_688: ("qwen3.5-35b-a3b",),
    122_111_526_912: ("qwen3.5-122b-a10b",),
    396_346_350_336: ("qwen3.5-397b-a17b",),
    1_137_207_296: ("starcoderbase-1b",),
    3_043_311_104: ("starcoderbase-3b",),
    7_327_263_232: ("starcoderbase-7b",),
    15_517_456_384: ("starcoder",),
    164_144_128: ("tiny_starcoder_py",),
    1_124_886_528: ("gpt_bigcode-santacoder",),
    3_030_371_328: ("starcoder2-3b",),
    7_173_923_840: ("starcoder2-7b",),
    15_957_889_024: ("starcoder2-15b",),
}
PUBLISHED = {name: total for total, names in TOTALS.items() for name in names}
ACTIVE = {
    "qwen3-30b-a3b": 3_353_032_704,
    "qwen3-235b-a22b-thinking-2507": 22_190_763_520,
    "qwen3-8b": 8_190_735_360,
    "qwen1.5-moe-a2.7b": 2_689_173_504,
    "qwen2-57b-a14b": 14_249_270_784,
    "qwen3.5-35b-a3b": 3_454_988_928,
    "qwen3.5-122b-a10b": 9_771_288_576,
    "qwen3.5-397b-a17b": 17_349_040_896,
}
SMALL = {"num_hidden_layers": 3, "hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 160}


def config(name: str, **shape: Any) -> Config:
    raw = {
        "run": {"name": "test"},
        "model": {"name": name, "config_overrides": shape},
        "tokenizer": {"path": "tokenizer"},
        "data": {"sequence_length": 64, "sources": [{"path": "x", "format": "text"}]},
        "train": {"steps": 10},
    }
    return Config.model_validate_json(json.dumps(raw), strict=True)


def built(hf: dict[str, Any]) -> Any:
    """The model of transformers without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf))


@pytest.mark.parametrize("name", families.SIZES)
def test_totals_are_the_published_ones(name: str) -> None:
    assert families.count_parameters(families.resolve_hf_config(config(name))) == PUBLISHED[name]


@pytest.mark.parametrize(("name", "active"), ACTIVE.items())
def test_active_parameters_are_the_published_ones(name: str, active: int) -> None:
    assert families.read_model_dims(families.resolve_hf_config(config(name))).active_parameters == active


@pytest.mark.parametrize("name", families.SIZES)
def test_transformers_builds_every_size_with_as_many_parameters(name: str) -> None:
    model = built(families.resolve_hf_config(config(name)))
    assert sum(weight.numel() for weight in model.parameters()) == PUBLISHED[name]
    dims = families.read_model_dims(families.resolve_hf_config(config(name)))
    assert dims.largest_tensor == max(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("family", families.FAMILIES.values(), ids=lambda family: family.name)
def test_adapters_go_to_every_linear_layer_but_the_output(family: families.Family) -> None:
    import torch

    name = next(size.name for size in families.SIZES.values() if size.family is family)
    modules = built(families.resolve_hf_config(config(name))).named_modules()
    linear = {
        path.rsplit(".")[-1]
        for path, module in modules
        if isinstance(module, torch.nn.Linear) and ".shared_expert" not in path
    }
    assert set(family.lora_targets) == linear - {"lm_head"}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("qwen2.5-0.5b", {"num_key_value_heads": 2}),
        ("qwen2.5-7b", {"num_key_value_heads": 3, "vocab_size": 1000}),
        ("qwen3-0.6b", {"num_key_value_heads": 2, "head_dim": 10}),
        ("qwen3-8b", {"num_key_value_heads": 6, "attention_bias": True}),
        (
            "qwen3-30b-a3b",
            {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2, "num_key_value_heads": 2},
        ),
        ("qwen3-1.7b", {"num_key_value_heads": 1, "tie_word_embeddings": False, "rope_theta": 10000}),
        ("starcoder2-3b", {"num_key_value_heads": 2}),
        ("starcoder2-15b", {"num_key_value_heads": 3, "use_bias": False}),
        (
            "qwen3-next-80b-a3b-instruct",
            {
                "num_hidden_layers": 4,
                "num_key_value_heads": 2,
                "moe_intermediate_size": 24,
                "shared_expert_intermediate_size": 40,
                "num_experts": 5,
                "num_experts_per_tok": 2,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 6,
                "linear_key_head_dim": 12,
                "linear_conv_kernel_dim": 3,
            },
        ),
        (
            "qwen2-57b-a14b",
            {
                "num_key_value_heads": 2,
                "moe_intermediate_size": 24,
                "shared_expert_intermediate_size": 40,
                "num_experts": 9,
            },
        ),
        (
            "qwen3.5-4b",
            {
                "num_hidden_layers": 8,
                "num_key_value_heads": 2,
                "head_dim": 20,
                "linear_num_key_heads": 3,
                "linear_num_value_heads": 6,
                "linear_key_head_dim": 12,
                "linear_conv_kernel_dim": 3,
            },
        ),
        (
            "qwen3.5-35b-a3b",
            {
                "num_hidden_layers": 4,
                "num_key_value_heads": 2,
                "moe_intermediate_size": 24,
                "shared_expert_intermediate_size": 40,
                "num_experts": 8,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 6,
                "linear_key_head_dim": 12,
            },
        ),
        ("starcoderbase-1b", {}),
        ("starcoder", {"multi_query": False, "n_positions": 100}),
    ],
)
def test_transformers_builds_as_many(name: str, shape: dict[str, Any]) -> None:
    small = {key: value for key, value in SMALL.items() if "num_experts" not in shape or key != "intermediate_size"}
    hf = families.resolve_hf_config(config(name, **{"vocab_size": 512, **small, **shape}))
    model = built(hf)
    assert type(model).__name__ == hf["architectures"][0]
    assert sum(weight.numel() for weight in model.parameters()) == families.count_parameters(hf)


@pytest.mark.parametrize("name", families.SIZES)
def test_transformers_keeps_every_value(name: str) -> None:
    from transformers import AutoConfig

    hf = families.resolve_hf_config(config(name))
    model_type = hf.pop("model_type")
    accepted = AutoConfig.for_model(model_type, **hf)
    for key, value in hf.items():
        assert getattr(accepted, key) == value, key
    assert "dtype" not in hf


def test_rope_base_reaches_the_model() -> None:
    from transformers import AutoConfig

    hf = families.resolve_hf_config(config("qwen3-0.6b", rope_theta=5e6))
    assert AutoConfig.for_model(**hf).rope_parameters["rope_theta"] == 5e6


def test_flops_count_matrices_and_attention() -> None:
    hf = families.resolve_hf_config(config("qwen3-0.6b"))
    model = families.read_model_dims(hf)
    norms = 28 * (2 * 1024 + 2 * 128) + 1024
    assert model.matmul_parameters == 596_049_920 - norms  # tied: the look-up and the output layer are one matrix
    assert families.compute_flops_per_token(hf, 2048) == 6 * model.matmul_parameters + 12 * 28 * 16 * 128 * 2048


def test_flops_count_the_experts_a_token_passes() -> None:
    hf = families.resolve_hf_config(config("qwen3-30b-a3b"))
    norms = 48 * (2 * 2048 + 2 * 128) + 2048
    look_up = 151936 * 2048
    assert families.compute_flops_per_token(hf, 64) == 6 * (3_353_032_704 - norms - look_up) + 12 * 48 * 32 * 128 * 64


def test_flops_stop_at_the_sliding_window() -> None:
    hf = families.resolve_hf_config(config("starcoder2-3b"))
    assert families.compute_flops_per_token(hf, 4096) == families.compute_flops_per_token(hf, 16384)
    assert families.compute_flops_per_token(hf, 2048) < families.compute_flops_per_token(hf, 4096)


def test_a_configuration_that_transformers_wrote_counts_as_ours() -> None:
    from transformers import Qwen3MoeConfig

    ours = families.resolve_hf_config(config("qwen3-30b-a3b"))
    written = Qwen3MoeConfig(**ours).to_dict()
    assert "num_experts" not in written  # otherwise this test proves nothing
    assert families.count_parameters(written) == families.count_parameters(ours)


def test_flops_of_a_hybrid_count_attention_in_its_layers_alone() -> None:
    hf = families.resolve_hf_config(config("qwen3-coder-next"))
    model = families.read_model_dims(hf)
    assert (model.attention_layers, model.layers) == (12, 48)
    attention, state = 12 * 12 * 16 * 256 * 2048, 18 * 36 * 32 * 128 * 128
    assert families.compute_flops_per_token(hf, 2048) == 6 * model.matmul_parameters + attention + state


def test_heads_of_linear_attention_that_do_not_divide_are_refused() -> None:
    with pytest.raises(PlanError, match="9 value heads of linear attention are not divisible by 4 key heads"):
        families.resolve_hf_config(config("qwen3-coder-next", linear_num_value_heads=9, linear_num_key_heads=4))
