"""Linear attention (Gated DeltaNet) over packed documents, for hybrid models such as Qwen3-Next and Qwen3.5.

A convolution and a recurrence run along a row, whatever the positions: without the bounds of the documents, each would
continue from the state of the one before. On GPUs the kernels of causal-conv1d and flash-linear-attention take the
bounds. The reference code of transformers refuses them, so on CPU it runs here document by document.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.models.attention import join_documents, split_documents

_CONVOLUTION, _RECURRENCE = "causal_conv1d_fn", "torch_chunk_gated_delta_rule"
_ISOLATED_LAYERS = {"full_attention", "sliding_attention", "linear_attention"}
_KEEPS_DOCUMENTS_APART = "_keeps_documents_apart"


def has_linear_attention(model: nn.Module) -> bool:
    """Return whether a transformers model has layers of linear attention."""
    return "linear_attention" in (getattr(model.config, "layer_types", None) or ())


def isolate_linear_attention(model: nn.Module) -> None:
    """Make the layers of linear attention keep documents apart where `cu_seq_lens_q` is passed down to them.

    Generation, which passes none, stays as it was. Raises PlanError for layers of a kind that could not be isolated.
    """
    unknown = set(getattr(model.config, "layer_types", None) or ()) - _ISOLATED_LAYERS
    layers = [module.linear_attn for module in model.modules() if hasattr(module, "linear_attn")]
    if unknown or (has_linear_attention(model) and not layers):
        what = ", ".join(sorted(unknown)) or "linear_attention"
        raise PlanError(f"model.name: {type(model).__name__} has layers ({what}) that mix packed documents")
    for layer in layers:
        kind: Any = type(layer)
        if not issubclass(kind, _FlattenedRows):
            modeling = sys.modules[kind.__module__]
            _replace_function(modeling, _CONVOLUTION, _convolve_by_document)
            _replace_function(modeling, _RECURRENCE, _recur_by_document)
            layer.__class__ = type(kind.__name__, (_FlattenedRows, kind), {})


def build_sequence_index(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return the number of each token's document, (1, tokens) int32, as causal-conv1d takes it. Waits for no device."""
    lengths = cu_seqlens.diff()
    numbers = torch.arange(len(lengths), dtype=torch.int32, device=cu_seqlens.device)
    return torch.repeat_interleave(numbers, lengths, output_size=tokens)[None]


class _FlattenedRows(nn.Module):
    """Layer that computes its rows (B, T, H) as one, because the bounds of documents count through all rows."""

    def forward(self, hidden_states: Tensor, cache_params: Any = None, **options: Any) -> Tensor:  # noqa: ANN401
        if options.get("cu_seq_lens_q") is None:
            return super().forward(hidden_states, cache_params, **options)  # type: ignore[no-any-return]
        rows = hidden_states.reshape(1, -1, hidden_states.shape[-1])
        return super().forward(rows, None, **options).reshape(hidden_states.shape)  # type: ignore[no-any-return]


def _replace_function(modeling: Any, name: str, wrap: Callable[[Any], Any]) -> None:  # noqa: ANN401 - a module
    """Wrap a function that transformers' layers look up by name in their module, once."""
    function = getattr(modeling, name)
    if not hasattr(function, _KEEPS_DOCUMENTS_APART):
        wrapped = wrap(function)
        setattr(wrapped, _KEEPS_DOCUMENTS_APART, True)
        setattr(modeling, name, wrapped)


def _convolve_by_document(function: Any) -> Any:  # noqa: ANN401 - signatures of transformers
    """Wrap a causal convolution of (1, C, T) so that on CPU each document begins with nothing before it."""
    reference = inspect.unwrap(function)

    def convolve(hidden_states: Tensor, *weights: Any, **options: Any) -> Tensor:  # noqa: ANN401
        bounds = options.get("cu_seq_lens_q")
        if bounds is None or hidden_states.is_cuda:
            return function(hidden_states, *weights, **options)  # type: ignore[no-any-return]
        runs = split_documents(hidden_states[0].T, bounds)
        parts = [reference(run.transpose(1, 2), *weights, **options).transpose(1, 2) for run in runs]
        return join_documents(parts).T[None]

    return convolve


def _recur_by_document(function: Any) -> Any:  # noqa: ANN401 - signatures of transformers
    """Wrap a gated delta rule over (1, T, …) so that on CPU each document begins with the zero state."""
    reference = inspect.unwrap(function)

    def recur(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        g: Tensor,
        beta: Tensor,
        **options: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor | None]:
        bounds = options.get("cu_seqlens")
        if bounds is None or query.is_cuda:
            return function(query, key, value, g=g, beta=beta, **options)  # type: ignore[no-any-return]
        runs = zip(*(split_documents(tensor[0], bounds) for tensor in (query, key, value, g, beta)), strict=True)
        parts = [reference(q, k, v, g=decay, beta=rate, **options)[0] for q, k, v, decay, rate in runs]
        return join_documents(parts)[None], None

    return recur
