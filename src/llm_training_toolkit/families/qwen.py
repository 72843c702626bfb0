"""Qwen families: Qwen1.5 and CodeQwen1.5, Qwen2, Qwen2.5, Qwen3 and Qwen3-Next, dense and as mixtures of experts.

Sizes have the hub name of their weights in lower case, without the organisation. The first Qwen (2023) is missing: its
class is remote code, which is never run here.
"""

from __future__ import annotations

from dataclasses import replace

from llm_training_toolkit.families import chat
from llm_training_toolkit.families.family import (
    CodeLayout,
    Family,
    HfValues,
    ModelSize,
    SpecialTokens,
    build_rope_parameters,
)
from llm_training_toolkit.families.qwen_dims import (
    read_qwen2_dims,
    read_qwen2_moe_dims,
    read_qwen3_dims,
    read_qwen3_moe_dims,
    read_qwen3_next_dims,
)

# GPT-4's expression with single digits: `PRETOKENIZE_REGEX` of transformers' Qwen2 tokenizer.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CODE = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")

TOKENS = SpecialTokens(
    end_of_text="<|endoftext|>",
    pad="<|endoftext|>",
    fim_prefix="<|fim_prefix|>",
    fim_middle="<|fim_middle|>",
    fim_suffix="<|fim_suffix|>",
    repository="<|repo_name|>",
    file="<|file_sep|>",
    all=_CHAT + _CODE,
)
# Qwen2's tokenizer ends at <|im_end|>; Qwen2.5 added fill-in-the-middle.
TOKENS_WITHOUT_FIM = SpecialTokens(end_of_text="<|endoftext|>", pad="<|endoftext|>", all=_CHAT)
# CodeQwen1.5's tokenizer has the tokens of Qwen1.5 and, as StarCoder's, these three. What stands between the files of a
# repository was found in no readable source.
_CODEQWEN_FIM = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
CODEQWEN_TOKENS = SpecialTokens(
    end_of_text="<|endoftext|>",
    pad="<|endoftext|>",
    fim_prefix=_CODEQWEN_FIM[0],
    fim_middle=_CODEQWEN_FIM[1],
    fim_suffix=_CODEQWEN_FIM[2],
    all=_CHAT + _CODEQWEN_FIM,
)

# Figure 4 of the Qwen2.5-Coder report: names and paths on separate lines.
_CODE_LAYOUT = CodeLayout(after_repository="\n", between_files="\n")

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

_COMMON = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "rope_parameters": build_rope_parameters(1_000_000.0),
    "attention_dropout": 0.0,
    "use_sliding_window": False,
}


def _build_qwen2_family(name: str, tokens: SpecialTokens, chat_template: str) -> Family:
    return Family(
        name=name,
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        special_tokens=tokens,
        chat_template=chat_template,
        pre_tokenizer_pattern=PATTERN,
        defaults={**_COMMON, "max_position_embeddings": 32768},
        read_dims=read_qwen2_dims,
        lora_targets=_LINEAR,
        derived_head_dim=True,
        code_layout=_CODE_LAYOUT,
    )


QWEN2 = _build_qwen2_family("qwen2", TOKENS_WITHOUT_FIM, chat.QWEN2)
QWEN2_5 = _build_qwen2_family("qwen2.5", TOKENS, chat.QWEN2_5)
CODEQWEN1_5 = replace(
    _build_qwen2_family("codeqwen1.5", CODEQWEN_TOKENS, chat.QWEN2),
    # Ascend's MindSpeed-LLM scripts for CodeQwen1.5 have this epsilon; its model card has these positions.
    defaults={**_COMMON, "max_position_embeddings": 65_536, "rms_norm_eps": 1e-5},
    code_layout=CodeLayout(),
)
# A balance loss is not a sum over tokens: docs/objective.md.
_ROUTER = {"decoder_sparse_step": 1, "output_router_logits": False, "router_aux_loss_coef": 0.001}
# The first two matter only for dense layers, the others only for transformers' own balance loss; neither exists here.
_FIXED_OF_MIXTURES = frozenset({"intermediate_size", *_ROUTER})
QWEN2_MOE = replace(
    QWEN2,
    name="qwen2-moe",
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    defaults={**QWEN2.defaults, **_ROUTER, "norm_topk_prob": False},
    read_dims=read_qwen2_moe_dims,
    fixed=_FIXED_OF_MIXTURES,
    lora_targets=ATTENTION,
)
# head_dim is explicit: 0.6B, 4B, 32B and the mixtures have heads x 128 != hidden size.
_QWEN3 = {**_COMMON, "max_position_embeddings": 40960, "head_dim": 128, "attention_bias": False}
QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    special_tokens=TOKENS,
    chat_template=chat.QWEN3,
    pre_tokenizer_pattern=PATTERN,
    defaults=_QWEN3,
    read_dims=read_qwen3_dims,
    lora_targets=_LINEAR,
    code_layout=_CODE_LAYOUT,
)
QWEN3_MOE = replace(
    QWEN3,
    name="qwen3-moe",
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    defaults={
        **_QWEN3,
        **_ROUTER,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
    read_dims=read_qwen3_moe_dims,
    saved_as={"num_experts": "num_local_experts"},
    fixed=_FIXED_OF_MIXTURES,
    lora_targets=ATTENTION,
)

QWEN3_NEXT = replace(
    QWEN3_MOE,
    name="qwen3-next",
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    defaults={
        **{key: value for key, value in QWEN3_MOE.defaults.items() if key != "use_sliding_window"},
        "max_position_embeddings": 262_144,
        "rope_parameters": {**build_rope_parameters(10_000_000.0), "partial_rotary_factor": 0.25},
        "head_dim": 256,
        "num_experts_per_tok": 10,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    },
    read_dims=read_qwen3_next_dims,
    saved_as={},
    flex_attention=False,
    lora_targets=(*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj"),
)


def build_shape(layers: int, hidden: int, heads: tuple[int, int], inter: int, vocab: int, *, tied: bool) -> HfValues:
    """Build one row of the published tables; `heads` = attention heads and key-value heads."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "tie_word_embeddings": tied,
    }


# Values of config.json beside the weights, with as many heads for keys and values as for queries up to 14B and at 72B.
_QWEN1_5_SHAPES = {
    "0.5b": build_shape(24, 1024, (16, 16), 2816, 151936, tied=True),
    "1.8b": build_shape(24, 2048, (16, 16), 5504, 151936, tied=False),
    "4b": build_shape(40, 2560, (20, 20), 6912, 151936, tied=False),
    "7b": build_shape(32, 4096, (32, 32), 11008, 151936, tied=False),
    "14b": build_shape(40, 5120, (40, 40), 13696, 152064, tied=False),
    "32b": build_shape(64, 5120, (40, 8), 27392, 152064, tied=False),
    "72b": build_shape(80, 8192, (64, 64), 24576, 152064, tied=False),
    "110b": build_shape(80, 8192, (64, 8), 49152, 152064, tied=False),
}
# Ascend's MindSpeed-LLM scripts for CodeQwen1.5.
_CODEQWEN1_5 = build_shape(32, 4096, (32, 4), 13440, 92416, tied=False)
# Defaults of transformers' Qwen2MoeConfig.
_A2_7B = {
    **build_shape(24, 2048, (16, 16), 5632, 151936, tied=False),
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
}
# The configuration in TensorRT-LLM's test of the class.
_A14B = {
    **build_shape(28, 3584, (28, 4), 18944, 151936, tied=False),
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2560,
    "shared_expert_intermediate_size": 20480,
}
_QWEN2_SHAPES = {
    "0.5b": build_shape(24, 896, (14, 2), 4864, 151936, tied=True),
    "1.5b": build_shape(28, 1536, (12, 2), 8960, 151936, tied=True),
    "3b": build_shape(36, 2048, (16, 2), 11008, 151936, tied=True),
    "7b": build_shape(28, 3584, (28, 4), 18944, 152064, tied=False),
    "14b": build_shape(48, 5120, (40, 8), 13824, 152064, tied=False),
    "32b": build_shape(64, 5120, (40, 8), 27648, 152064, tied=False),
    "72b": build_shape(80, 8192, (64, 8), 29568, 152064, tied=False),
}
_QWEN3_SHAPES = {
    "0.6b": build_shape(28, 1024, (16, 8), 3072, 151936, tied=True),
    "1.7b": build_shape(28, 2048, (16, 8), 6144, 151936, tied=True),
    "4b": build_shape(36, 2560, (32, 8), 9728, 151936, tied=True),
    "8b": build_shape(36, 4096, (32, 8), 12288, 151936, tied=False),
    "14b": build_shape(40, 5120, (40, 8), 17408, 151936, tied=False),
    "32b": build_shape(64, 5120, (64, 8), 25600, 151936, tied=False),
}
_A3B = {**build_shape(48, 2048, (32, 4), 6144, 151936, tied=False), "num_experts": 128, "moe_intermediate_size": 768}
_A22B = {
    **build_shape(94, 4096, (64, 4), 12288, 151936, tied=False),
    "num_experts": 128,
    "moe_intermediate_size": 1536,
}
_A35B = {**build_shape(62, 6144, (96, 8), 8192, 151936, tied=False), "num_experts": 160, "moe_intermediate_size": 2560}
# Default of transformers' Qwen3NextConfig; THUDM/slime scripts/models/qwen3-next-80B-A3B.sh has the same.
_NEXT_A3B = {
    **build_shape(48, 2048, (16, 2), 5120, 151936, tied=False),
    "num_experts": 512,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
# Weights of July 2025 have 262,144 positions and a larger rotary base.
_LONG = {"max_position_embeddings": 262_144, "rope_parameters": build_rope_parameters(5_000_000.0)}
_LONG_CODER = {"max_position_embeddings": 262_144, "rope_parameters": build_rope_parameters(10_000_000.0)}


def _build_base_and_instruct_sizes(prefix: str, family: Family, *sizes: str) -> tuple[ModelSize, ...]:
    """Build sizes that are published as base weights and as -Instruct."""
    return tuple(
        ModelSize(f"{prefix}-{size}", family, _QWEN2_SHAPES[size], other_names=(f"{prefix}-{size}-instruct",))
        for size in sizes
    )


def _build_2507_size(name: str, family: Family, shape: HfValues) -> ModelSize:
    """Build a size of the July 2025 weights, published as -Instruct and -Thinking."""
    return ModelSize(f"{name}-instruct-2507", family, {**shape, **_LONG}, other_names=(f"{name}-thinking-2507",))


SIZES = (
    *_build_base_and_instruct_sizes("qwen2", QWEN2, "0.5b", "1.5b", "7b", "72b"),
    *_build_base_and_instruct_sizes("qwen2.5", QWEN2_5, *_QWEN2_SHAPES),
    *_build_base_and_instruct_sizes("qwen2.5-coder", QWEN2_5, "0.5b", "1.5b", "3b", "7b", "14b", "32b"),
    *(
        ModelSize(f"qwen3-{size}", QWEN3, shape, other_names=(f"qwen3-{size}-base",) if size != "32b" else ())
        for size, shape in _QWEN3_SHAPES.items()
    ),
    _build_2507_size("qwen3-4b", QWEN3, _QWEN3_SHAPES["4b"]),
    ModelSize("qwen3-30b-a3b", QWEN3_MOE, _A3B, other_names=("qwen3-30b-a3b-base",)),
    ModelSize("qwen3-235b-a22b", QWEN3_MOE, _A22B),
    _build_2507_size("qwen3-30b-a3b", QWEN3_MOE, _A3B),
    _build_2507_size("qwen3-235b-a22b", QWEN3_MOE, _A22B),
    ModelSize("qwen3-coder-30b-a3b-instruct", QWEN3_MOE, {**_A3B, **_LONG_CODER}),
    ModelSize(
        "qwen3-next-80b-a3b-instruct",
        QWEN3_NEXT,
        _NEXT_A3B,
        other_names=("qwen3-next-80b-a3b-thinking", "qwen3-coder-next", "qwen3-coder-next-base"),
    ),
    ModelSize("qwen3-coder-480b-a35b-instruct", QWEN3_MOE, {**_A35B, **_LONG_CODER}),
    *(ModelSize(f"qwen1.5-{size}", QWEN2, shape) for size, shape in _QWEN1_5_SHAPES.items()),
    ModelSize("codeqwen1.5-7b", CODEQWEN1_5, _CODEQWEN1_5),
    ModelSize("qwen1.5-moe-a2.7b", QWEN2_MOE, _A2_7B),
    ModelSize("qwen2-57b-a14b", QWEN2_MOE, _A14B),
)
