"""Stand-ins for the GPU kernels of linear attention that allocate as they do and compute nothing, for dry runs.

Shapes and lifetimes are those of causal-conv1d (causal_conv1d/causal_conv1d_interface.py) and flash-linear-attention
(fla/ops/gated_delta_rule/chunk.py at commit bc3b101d), with chunks of 64 tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from llm_training_toolkit.plan.memory.linear_attention import CHUNK_TOKENS


class _Convolution(torch.autograd.Function):
    """Causal convolution with its activation, of (B, C, T)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _ChunkedRule(torch.autograd.Function):
    """Gated delta rule of queries and keys (B, T, H, K), values (B, T, HV, V), decays and strengths (B, T, HV)."""

    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        q, k, v, g, beta = (each.contiguous() for each in given)
        q, k = torch.empty_like(q), torch.empty_like(k)
        scales = [each.new_empty(each.shape[:-1], dtype=torch.float32) for each in (q, k)]
        g = torch.empty_like(g)
        triangle = k.new_empty((*v.shape[:3], CHUNK_TOKENS))
        factors = _factors(k, v)
        states, new_values = _states(k, v), torch.empty_like(v)
        out = torch.empty_like(v)
        del factors, states, new_values
        ctx.save_for_backward(q, k, v, g, beta, triangle, *scales)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        _, k, v, g, beta, *_ = ctx.saved_tensors
        gradient = gradient.contiguous()
        factors, states, new_values = _factors(k, v), _states(k, v), torch.empty_like(v)
        values = torch.empty_like(gradient)
        state_gradients, values = _states(k, v), torch.empty_like(values)
        queries, keys, dw = _per_value_head(k, v), _per_value_head(k, v), _per_value_head(k, v)
        queries, keys = _sum_heads(queries, k), _sum_heads(keys, k)
        more, values = _per_value_head(k, v), torch.empty_like(values)
        more = _sum_heads(more, k)
        strengths = torch.empty_like(beta)
        keys.add_(more)
        del factors, states, new_values, state_gradients, dw, more
        return torch.empty_like(queries), torch.empty_like(keys), values, torch.empty_like(g), strengths


def _per_value_head(k: Tensor, v: Tensor) -> Tensor:
    return k.new_empty((*v.shape[:3], k.shape[-1]))


def _factors(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two factors of a chunk's update."""
    return _per_value_head(k, v), torch.empty_like(v)


def _states(k: Tensor, v: Tensor) -> Tensor:
    """Return the states at the chunks' beginnings."""
    rows, tokens, heads, width = v.shape
    return k.new_empty((rows, -(-tokens // CHUNK_TOKENS), heads, k.shape[-1], width))


def _sum_heads(gradient: Tensor, k: Tensor) -> Tensor:
    return gradient.view(*k.shape[:3], -1, k.shape[-1]).sum(3)


def _convolve(x: Tensor, weight: Tensor, *_given: Any, **_named: Any) -> Any:
    return _Convolution.apply(x, weight)  # type: ignore[no-untyped-call]


def _recur(q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, **_named: Any) -> Any:
    return _ChunkedRule.apply(q, k, v, g, beta), None  # type: ignore[no-untyped-call]


@contextmanager
def replace_kernels(model: nn.Module, *, documents: int) -> Iterator[None]:
    """Replace the kernels of a transformers model, and what reads the bounds of documents; others stay as they are."""
    if "linear_attention" not in (getattr(model.config, "layer_types", None) or ()):
        yield
        return

    def bound_equally(position_ids: Tensor) -> tuple[Tensor, int]:
        return position_ids.new_zeros(documents + 1, dtype=torch.int32), position_ids.numel() // documents

    def number_zero(_bounds: Tensor, tokens: int) -> Tensor:
        return torch.zeros((1, tokens), dtype=torch.int32)

    modeling = sys.modules[type(model).__module__]
    loss = "llm_training_toolkit.models.loss"
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(modeling, "causal_conv1d_fn", _convolve))
        stack.enter_context(mock.patch.object(modeling, "torch_chunk_gated_delta_rule", _recur))
        stack.enter_context(mock.patch(f"{loss}.compute_cu_seqlens", bound_equally))
        stack.enter_context(mock.patch(f"{loss}.build_sequence_index", number_zero))
        yield
