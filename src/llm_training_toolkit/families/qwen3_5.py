"""Qwen3.5 families, dense and as mixtures of experts: hybrids of attention and linear attention, text only.

Checkpoints are of vision-language models. Their language model alone is trained, as the text class of transformers.
Shapes: defaults of the text configurations in transformers 5.23 (9B and 35B-A3B), and the model scripts of THUDM/slime
and radixark/miles (`scripts/models/qwen3.5-*.sh`, `qwen36-*.sh`). Sources for single values stand beside them.
"""

from __future__ import annotations

from dataclasses import replace

from llm_training_toolkit.families.family import HfValues, ModelDims, ModelSize, build_rope_parameters
from llm_training_toolkit.families.qwen import ATTENTION, QWEN3, QWEN3_MOE, build_shape
from llm_training_toolkit.families.qwen_dims import read_hybrid_dims, read_qwen3_dims, read_qwen3_moe_dims

# `PRETOKENIZE_REGEX` of transformers' Qwen3.5 tokenizer: Qwen2's, with combining marks as parts of words.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_INPUT_PROJECTIONS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
_ROWS = 248_320
_HYBRID = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "attention_bias": False,
    "max_position_embeddings": 262_144,
    # Text has the same position on all three axes, so that the sections change nothing. They are kept for exports.
    "rope_parameters": {
        **build_rope_parameters(10_000_000.0),
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
}

# A balance loss is not a sum over tokens: docs/objective.md.
_ROUTER = {"output_router_logits": False, "router_aux_loss_coef": 0.001}


def read_qwen3_5_dims(hf: HfValues) -> ModelDims:
    """Read dimensions of dense Qwen3.5: of four layers three have linear attention."""
    return read_hybrid_dims(hf, read_qwen3_dims(hf), gate_apart=True)


def read_qwen3_5_moe_dims(hf: HfValues) -> ModelDims:
    """Read dimensions of Qwen3.5 with experts and a shared expert in each layer."""
    # Its configuration has no width for a dense layer.
    dims = read_qwen3_moe_dims({**hf, "intermediate_size": hf["moe_intermediate_size"]})
    return replace(read_hybrid_dims(hf, dims, gate_apart=True), shared_expert=hf["shared_expert_intermediate_size"])


QWEN3_5 = replace(
    QWEN3,
    name="qwen3.5",
    model_type="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    pre_tokenizer_pattern=PATTERN,
    defaults=_HYBRID,
    read_dims=read_qwen3_5_dims,
    flex_attention=False,
    lora_targets=(*ATTENTION, *_INPUT_PROJECTIONS, "gate_proj", "up_proj", "down_proj"),
)
QWEN3_5_MOE = replace(
    QWEN3_MOE,
    name="qwen3.5-moe",
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    pre_tokenizer_pattern=PATTERN,
    defaults={**_HYBRID, **_ROUTER},
    read_dims=read_qwen3_5_moe_dims,
    saved_as={},
    fixed=frozenset(_ROUTER),
    flex_attention=False,
    lora_targets=(*ATTENTION, *_INPUT_PROJECTIONS),
)


def _build_dense(
    name: str, shape: tuple[int, int, tuple[int, int], int], value_heads: int, *others: str, tied: bool
) -> ModelSize:
    """Build a dense size; `shape` = layers, hidden size, attention and key-value heads, width of the feed-forward."""
    layers, hidden, heads, inter = shape
    values = build_shape(layers, hidden, heads, inter, _ROWS, tied=tied)
    return ModelSize(f"qwen3.5-{name}", QWEN3_5, {**values, "linear_num_value_heads": value_heads}, others)


def _build_mixture(
    name: str, shape: tuple[int, int, tuple[int, int]], value_heads: int, experts: tuple[int, int, int], *others: str
) -> ModelSize:
    """Build a mixture; `experts` = experts, those of a token, and the width of each and of the shared one."""
    layers, hidden, heads = shape
    values = dict(build_shape(layers, hidden, heads, 0, _ROWS, tied=False))
    del values["intermediate_size"]
    values |= {
        "linear_num_value_heads": value_heads,
        "num_experts": experts[0],
        "num_experts_per_tok": experts[1],
        "moe_intermediate_size": experts[2],
        "shared_expert_intermediate_size": experts[2],
    }
    return ModelSize(f"qwen3.5-{name}", QWEN3_5_MOE, values, others)


SIZES = (
    # The model scripts do not have the value heads of linear attention. These are from published config.json files, as
    # tests of inference engines repeat them.
    _build_dense("0.8b", (24, 1024, (8, 2), 3584), 16, tied=True),
    _build_dense("2b", (24, 2048, (8, 2), 6144), 16, tied=True),
    _build_dense("4b", (32, 2560, (16, 4), 9216), 32, tied=True),
    _build_dense("9b", (32, 4096, (16, 4), 12288), 32, tied=False),
    _build_dense("27b", (64, 5120, (24, 4), 17408), 48, "qwen3.6-27b", "qwen3.8-27b", tied=False),
    _build_mixture("35b-a3b", (40, 2048, (16, 2)), 32, (256, 8, 512), "qwen3.6-35b-a3b"),
    _build_mixture("122b-a10b", (48, 3072, (32, 2)), 64, (256, 8, 1024)),
    _build_mixture("397b-a17b", (60, 4096, (32, 2)), 64, (512, 10, 1024)),
)
