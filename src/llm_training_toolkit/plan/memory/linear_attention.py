"""Bytes per token of a layer of linear attention (Gated DeltaNet), of Qwen3-Next and Qwen3.5. Pure.

GPU kernels are assumed, because runs on GPUs need them: `causal_conv1d_fn` of causal-conv1d (commit of 2026, read in
causal_conv1d/causal_conv1d_interface.py) and `chunk_gated_delta_rule` of flash-linear-attention (commit bc3b101d, read
in fla/ops/gated_delta_rule/chunk.py), as transformers 5.23 calls them. Both save what is counted here and recompute the
rest. The reference code that CPUs run keeps several times as much. w = bytes of a number in the forward pass.
"""

from __future__ import annotations

from llm_training_toolkit.families.family import LinearAttentionDims

CHUNK_TOKENS = 64  # flash-linear-attention's default


def estimate_mixing_bytes(linear: LinearAttentionDims, width: int, *, trained: bool) -> int:
    """Estimate what convolution, recurrence, gate and norm keep per token, without the layer's input."""
    return estimate_recurrence_bytes(linear, width, trained=trained) + _estimate_gated_norm_bytes(
        linear, width, trained=trained
    )


def estimate_recurrence_bytes(linear: LinearAttentionDims, width: int, *, trained: bool) -> int:
    """Estimate what convolution and recurrence keep per token.

    The convolution keeps its input, the recurrence normalized queries and keys with one fp32 factor per head, and a
    copy of the values. Each value head adds the write strength, the sum of decays in fp32 and a row of the chunk's
    matrix, 64 w. The decay itself keeps its fp32 input, and its softplus for the trained rate.
    """
    convolution = width * linear.convolved_width
    operands = width * (2 * linear.key_width + linear.value_width) + 8 * linear.key_heads
    per_head = width + 4 + width * CHUNK_TOKENS + (8 if trained else 4)
    return convolution + operands + per_head * linear.value_heads


def _estimate_gated_norm_bytes(linear: LinearAttentionDims, width: int, *, trained: bool) -> int:
    """Estimate the norm and its gate: three values in fp32, and the weighted value, which the gate multiplies.

    Trained weights also keep the normalized value and the output, the input of the last matrix. Qwen3-Next copies the
    gate out of its joint projection, which nothing keeps.
    """
    return linear.value_width * (12 + (3 if trained else 1) * width)


def estimate_recurrence_gradient_bytes(linear: LinearAttentionDims, width: int) -> int:
    """Estimate what the backward pass of the recurrence makes per token, at its peak.

    The states between chunks and their gradients are K x V a value head and chunk. Beside them are the two factors of
    the chunk's update, new values, and gradients of all operands, before those of a key head's value heads are summed.
    """
    states = 2 * linear.value_width * linear.key_head_dim // CHUNK_TOKENS
    keys = 3 * linear.value_heads * linear.key_head_dim + 3 * linear.key_width
    return width * (states + keys + 6 * linear.value_width)
