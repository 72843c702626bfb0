"""Dimensions of Qwen models from their Hugging Face values, one reader for each class."""

from __future__ import annotations

from dataclasses import replace

from llm_training_toolkit.families.family import (
    HfValues,
    LinearAttentionDims,
    ModelDims,
)


def _build_dims(hf: HfValues, head_dim: int, vectors_per_layer: int, *, head_norms: bool = False) -> ModelDims:
    return ModelDims(
        vocab=hf["vocab_size"],
        hidden=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        head_dim=head_dim,
        intermediate=hf["intermediate_size"],
        gated=True,
        rms_norms=True,
        head_norms=head_norms,
        tied=hf["tie_word_embeddings"],
        vectors_per_layer=vectors_per_layer,
        vectors_outside=hf["hidden_size"],
    )


def read_qwen2_dims(hf: HfValues) -> ModelDims:
    """Read dimensions of Qwen2 and 2.5: biases on q, k, v, two RMSNorms per layer, head_dim = hidden / heads."""
    head_dim = hf["hidden_size"] // hf["num_attention_heads"]
    biases = (hf["num_attention_heads"] + 2 * hf["num_key_value_heads"]) * head_dim
    return _build_dims(hf, head_dim, biases + 2 * hf["hidden_size"])


def read_qwen2_moe_dims(hf: HfValues) -> ModelDims:
    """Read dimensions of Qwen1.5-MoE and Qwen2-57B-A14B: experts and a shared one in every layer."""
    return replace(_with_experts(read_qwen2_dims(hf), hf), shared_expert=hf["shared_expert_intermediate_size"])


def read_qwen3_dims(hf: HfValues) -> ModelDims:
    """Read dimensions of Qwen3: biases only with `attention_bias` (also on o), q and k norms, head_dim explicit."""
    head_dim, hidden = hf["head_dim"], hf["hidden_size"]
    heads_with_bias = hf["num_attention_heads"] + 2 * hf["num_key_value_heads"]
    biases = heads_with_bias * head_dim + hidden if hf["attention_bias"] else 0
    return _build_dims(hf, head_dim, biases + 2 * head_dim + 2 * hidden, head_norms=True)


def read_qwen3_moe_dims(hf: HfValues) -> ModelDims:
    """Read dimensions of Qwen3 with experts in every layer, as in all published sizes, and no shared expert."""
    return _with_experts(read_qwen3_dims(hf), hf)


def _with_experts(dims: ModelDims, hf: HfValues) -> ModelDims:
    return replace(
        dims,
        intermediate=hf["moe_intermediate_size"],
        experts=hf["num_experts"],
        experts_per_token=hf["num_experts_per_tok"],
    )


def read_hybrid_dims(hf: HfValues, dims: ModelDims, *, gate_apart: bool) -> ModelDims:
    """Return dimensions of a model without linear attention, with it in three layers of four and gated heads.

    `gate_apart`: queries, keys and values have an input matrix of their own, without the output gate.
    """
    types = hf.get("layer_types") or ()
    full = types.count("full_attention") if types else hf["num_hidden_layers"] // 4
    linear = LinearAttentionDims(
        layers=hf["num_hidden_layers"] - full,
        key_heads=hf["linear_num_key_heads"],
        value_heads=hf["linear_num_value_heads"],
        key_head_dim=hf["linear_key_head_dim"],
        value_head_dim=hf["linear_value_head_dim"],
        kernel=hf["linear_conv_kernel_dim"],
        gate_apart=gate_apart,
    )
    return replace(
        dims,
        vectors_per_layer=2 * dims.hidden,
        vectors_outside=dims.hidden + full * 2 * dims.head_dim + linear.layers * linear.vectors,
        output_gate=True,
        linear_attention=linear,
    )


def read_qwen3_next_dims(hf: HfValues) -> ModelDims:
    """Read dimensions of Qwen3-Next: of four layers three have linear attention; experts and a shared one in each."""
    dims = read_hybrid_dims(hf, read_qwen3_moe_dims(hf), gate_apart=False)
    return replace(dims, shared_expert=hf["shared_expert_intermediate_size"])
