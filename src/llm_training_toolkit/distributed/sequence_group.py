"""Ranks that hold slices of the same sequences, and their exchange of tokens for heads around attention.

This is DeepSpeed's Ulysses (Jacobs et al. 2023, arXiv:2309.14509), one all-to-all before attention and one behind it.
DeepSpeed 0.19.8 has it with attention of its own, which lets packed documents see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.process_groups import form_process_group


@dataclass(frozen=True)
class SequenceGroup:
    """One rank among those of its replica, which share the tokens of each row and the heads of attention."""

    index: int
    """Place of this rank among them: it holds this slice of the tokens, and attends with this share of the heads."""
    size: int
    process_group: Any = None
    """torch's group of these ranks; None if they are all ranks there are."""

    def take_slice(self, tokens: Tensor) -> Tensor:
        """Return this rank's slice (1, B x T / size) of tokens (B, T), the rows one after another."""
        return tokens.reshape(1, -1).chunk(self.size, dim=1)[self.index]

    def gather_tokens(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return tensors (T, H / size, D), all tokens and this rank's heads, of (T / size, H, D). Collective.

        The tensors may differ in their number of heads H; queries keep the keys and values they belong to.
        """
        parts = [tensor.reshape(len(tensor), self.size, -1, tensor.shape[-1]) for tensor in tensors]
        sent = torch.cat(parts, dim=2).transpose(0, 1).contiguous()
        return torch.split(self._exchange(sent).flatten(0, 1), [part.shape[2] for part in parts], dim=1)

    def scatter_tokens(self, tensor: Tensor) -> Tensor:
        """Return (T / size, H, D), this rank's tokens and all heads, of (T, H / size, D). Collective."""
        sent = tensor.contiguous().view(self.size, -1, *tensor.shape[1:])
        return self._exchange(sent).transpose(0, 1).flatten(1, 2)

    def _exchange(self, parts: Tensor) -> Tensor:
        """Send the i-th of `parts` (size, …) to the i-th rank, and return what the ranks have sent, in their order."""
        exchanged: Tensor = _AllToAll.apply(parts, self.process_group)  # type: ignore[no-untyped-call]
        return exchanged


class _AllToAll(torch.autograd.Function):
    """All-to-all, whose gradient goes the way back."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:  # noqa: ANN401 - torch's types
        ctx.group = group
        return _send(parts, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - as above
        return _send(gradients[0].contiguous(), ctx.group), None


def _send(parts: Tensor, group: Any) -> Tensor:  # noqa: ANN401 - torch's group
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


def form_sequence_group(context: RunContext, size: int) -> SequenceGroup | None:
    """Group `size` consecutive ranks to a replica; None if every rank is one. `size` must divide their number.

    Collective. Consecutive ranks are on one node, as far as it has enough of them.
    """
    if size == 1:
        return None
    index = context.rank % size
    if size == context.world_size:
        return SequenceGroup(index, size)
    ranks: Sequence[int] = range(context.rank - index, context.rank - index + size)
    return SequenceGroup(index, size, form_process_group(ranks))
