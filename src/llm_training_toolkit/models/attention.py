"""Variable-length attention: every document of a packed micro-batch by itself, without a mask.

The rows of a micro-batch become one row, and `cu_seqlens` says where each document begins. A mask would cost the
square of the sequence length in memory and in work, however short the documents are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from llm_training_toolkit.distributed.sequence_group import SequenceGroup
from llm_training_toolkit.plan import choose_attention

VARLEN = "varlen"
_FLATTENED = frozenset({VARLEN, "flash_attention_2", "flash_attention_3"})  # implementations that take cu_seqlens


def takes_cu_seqlens(model: nn.Module) -> bool:
    """Return whether the model's attention takes all rows as one, with the bounds of the documents."""
    return get_attention(model) in _FLATTENED


def get_attention(model: nn.Module) -> str:
    """Return the name of a transformers model's attention implementation."""
    return str(model.config._attn_implementation)  # type: ignore[union-attr] # noqa: SLF001 - its only name


def compute_cu_seqlens(position_ids: Tensor) -> tuple[Tensor, int]:
    """Return the bounds (documents + 1,) int32 on the CPU and the longest length of the documents in (B, T) positions.

    Every document starts at position 0, and so does every row. Waits for the device: a data loader knows the bounds
    from its packing plan.
    """
    flat = position_ids.reshape(-1).cpu()
    starts = (flat == 0).nonzero().flatten()
    bounds = torch.cat([starts, torch.tensor([len(flat)])])
    return bounds.to(torch.int32), int(bounds.diff().max())


def build_attention_arguments(cu_seqlens: Tensor, max_seqlen: int) -> dict[str, Any]:
    """Return the bounds of the documents under the names that transformers passes down to every attention layer."""
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max_seqlen,
        "max_length_k": max_seqlen,
    }


def has_flash_kernels(device: torch.device) -> bool:
    """Return whether torch's flash kernels run on a device: on NVIDIA GPUs from Ampere on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def choose_loss_attention(model: nn.Module, device: torch.device) -> str:
    """Return the implementation of attention for the loss of packed documents on this device."""
    config: Any = model.config
    chosen = choose_attention(
        "bf16" if config.dtype == torch.bfloat16 else "fp32",
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        device.type,
        has_flash=has_flash_kernels(device),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return str(chosen.value)


@contextmanager
def using_attention(model: nn.Module, implementation: str) -> Iterator[None]:
    """Compute with another implementation of attention inside the block; text is generated with the model's own."""
    before = get_attention(model)
    _set_attention(model, implementation)
    try:
        yield
    finally:
        _set_attention(model, before)


def _set_attention(model: nn.Module, implementation: str) -> None:
    config: Any = model.config
    config._attn_implementation = implementation  # noqa: SLF001 - every layer reads it there, call by call


def attend_by_document(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sequence_group: SequenceGroup | None = None,
    **_options: Any,  # noqa: ANN401 - whatever a model passes to attention in general
) -> tuple[Tensor, None]:
    """Compute causal attention (1, T, H, D) of queries (1, H, T, D), keys and values (1, G, T, D), by document.

    Registered with transformers as `varlen`. Dropout of attention does not exist here. With a `sequence_group` the
    tensors have this rank's slice of the tokens, and `cu_seq_lens_q` still bounds the documents of all of them; it is
    collective then. Raises ValueError without `cu_seq_lens_q`, because the documents would see each other.
    """
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None:
        raise ValueError("attention by document needs cu_seq_lens_q and no mask; to generate text use sdpa")
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    if sequence_group is not None:
        query, key, value = sequence_group.gather_tokens(query, key, value)
    if query.is_cuda:
        attended = _attend_on_gpu((query, key, value), cu_seq_lens_q, max_length_q, scaling, sliding_window)
    else:
        attended = _attend_on_cpu((query, key, value), cu_seq_lens_q, scaling, sliding_window)
    if sequence_group is not None:
        attended = sequence_group.scatter_tokens(attended)
    return attended.unsqueeze(0), None


def _attend_on_gpu(
    tokens: tuple[Tensor, Tensor, Tensor],
    cu_seqlens: Tensor,
    max_seqlen: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 - defines operators when imported

    query, key, value = tokens
    attended: Tensor = varlen_attn(  # type: ignore[assignment]
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended


def _attend_on_cpu(
    tokens: tuple[Tensor, Tensor, Tensor], cu_seqlens: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    runs = zip(*(split_documents(tensor, cu_seqlens) for tensor in tokens), strict=True)
    attended = []
    for run in runs:
        query, key, value = (tensor.transpose(1, 2) for tensor in run)
        attended.append(_attend_causally(query, key, value, scaling, window).transpose(1, 2))
    return join_documents(attended)


def split_documents(tokens: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """Split (T, …) into batches (N, L, …), one for each run of documents of one length: N of L tokens.

    Packed code has many documents that fill a row, and these are computed at once.
    """
    lengths = [stop - start for start, stop in pairwise(cu_seqlens.tolist())]
    runs = [(len(list(run)), length) for length, run in groupby(lengths)]
    parts = torch.split(tokens, [documents * length for documents, length in runs])
    return [part.reshape(*run, *part.shape[1:]) for part, run in zip(parts, runs, strict=True)]


def join_documents(runs: Sequence[Tensor]) -> Tensor:
    """Return the tokens (T, …) of all batches (N, L, …), in order."""
    return torch.cat([run.flatten(0, 1) for run in runs])


def _attend_causally(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Return (N, H, L, D) of N documents of L tokens; `window` = tokens that a token sees, itself included."""
    gqa, length = query.shape[1] != key.shape[1], query.shape[2]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=gqa)
    parts, block = [], max(1, window // 2)  # blocks of queries, so that masks stay smaller than length x length
    for start in range(0, length, block):
        stop, first = min(start + block, length), max(0, start - window + 1)
        distance = torch.arange(start, stop)[:, None] - torch.arange(first, stop)
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, first:stop],
                value[:, :, first:stop],
                attn_mask=(distance >= 0) & (distance < window),
                scale=scaling,
                enable_gqa=gqa,
            )
        )
    return torch.cat(parts, dim=2)


# Without a mask function of this name transformers makes no mask, and looks for no packed documents in the positions.
AttentionInterface.register(VARLEN, attend_by_document)
