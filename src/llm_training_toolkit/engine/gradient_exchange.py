"""Sums of fp32 gradients over ranks at ZeRO 0 and 1, sent in fp32 or in bf16."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from llm_training_toolkit.plan.memory.memory_estimate import REDUCTION_CHUNK_SIZE


def all_reduce_gradients(flat: Tensor, sent: torch.dtype, group: dist.ProcessGroup | None = None) -> None:
    """Sum gradients (N,) over the ranks, in place. Collective.

    Sent in another type they pass by chunks, so that the copies are small.
    """
    if sent == flat.dtype:
        dist.all_reduce(flat, group=group)
        return
    for chunk in torch.split(flat, REDUCTION_CHUNK_SIZE):
        rounded = chunk.to(sent)
        dist.all_reduce(rounded, group=group)
        chunk.copy_(rounded)


def reduce_scatter_gradients(
    own: Tensor, flat: Tensor, sent: torch.dtype, group: dist.ProcessGroup | None = None
) -> None:
    """Sum gradients (ranks x N,) over the ranks, and write each rank's N into its `own`. Collective.

    `own` may be this rank's part of `flat`. Sent in another type they pass by chunks of every rank's part, so that the
    copies are small.
    """
    if sent == flat.dtype:
        dist.reduce_scatter_single(own, flat, group=group)
        return
    parts = flat.view(-1, len(own))
    size = max(REDUCTION_CHUNK_SIZE // len(parts), 1)
    for start in range(0, len(own), size):
        columns = slice(start, start + size)
        rounded = parts[:, columns].to(sent)
        total = torch.empty_like(rounded[0])
        dist.reduce_scatter_single(total, rounded.flatten(), group=group)
        own[columns].copy_(total)
