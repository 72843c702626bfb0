"""Ranks that hold slices of the same matrices, and the sums over them around attention and feed-forward layers.

This is Megatron-LM's tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053, section 3): one sum behind each block
in the forward pass, one before it in the backward pass. AutoTP of DeepSpeed 0.19.8 cuts a model while it initializes,
which is after the fp32 copies of ZeRO 0 and 1 are made.
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
class DataParallelGroup:
    """One rank among those that hold the same parameters: gradients are summed over them."""

    index: int
    """Place of this rank among them, which says its shard of the optimizer state."""
    size: int
    process_group: Any = None
    """torch's group of these ranks; None if they are all ranks there are, or a single one."""

    def broadcast_from_first(self, tensor: Tensor) -> None:
        """Overwrite a contiguous tensor of any dtype with that of the group's first rank."""
        if self.size > 1:
            source = 0 if self.process_group is None else dist.get_global_rank(self.process_group, 0)
            dist.broadcast(tensor.view(-1).view(torch.uint8), src=source, group=self.process_group)


def get_all_ranks() -> DataParallelGroup:
    """Return the group of all ranks, which hold the same parameters without tensor parallelism."""
    if not dist.is_initialized():
        return DataParallelGroup(0, 1)
    return DataParallelGroup(dist.get_rank(), dist.get_world_size())


@dataclass(frozen=True)
class TensorGroup:
    """One rank among those of its replica, which hold slices of the same matrices."""

    index: int
    """Place of this rank among them: it holds this slice of each matrix."""
    size: int
    data_parallel: DataParallelGroup
    """Ranks with the same place in all replicas."""
    process_group: Any = None
    """torch's group of these ranks; None if they are all ranks there are."""

    def sum_gradients(self, tensor: Tensor) -> Tensor:
        """Return the tensor, whose gradient is summed over the ranks: each knows the part of its own slices."""
        summed: Tensor = _SumGradients.apply(tensor, self.process_group)  # type: ignore[no-untyped-call]
        return summed

    def sum_outputs(self, tensor: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors; each one's gradient is that of the sum."""
        summed: Tensor = _SumOutputs.apply(tensor, self.process_group)  # type: ignore[no-untyped-call]
        return summed

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the ranks' tensors of one shape, in their order. Collective."""
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor.contiguous(), group=self.process_group)
        return gathered

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks in place, and return it. Collective."""
        dist.all_reduce(tensor, group=self.process_group)
        return tensor


class _SumGradients(torch.autograd.Function):
    """Identity, whose gradient is all-reduced."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:  # noqa: ANN401 - torch's types
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - as above
        summed = gradients[0].clone(memory_format=torch.contiguous_format)  # autograd may hold the gradient elsewhere
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class _SumOutputs(torch.autograd.Function):
    """All-reduce, whose gradient is the identity."""

    @staticmethod
    def forward(_ctx: Any, tensor: Tensor, group: Any) -> Tensor:  # noqa: ANN401 - torch's types
        summed = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - as above
        return gradients[0], None


def form_tensor_group(context: RunContext, size: int) -> TensorGroup | None:
    """Group `size` consecutive ranks to a replica; None if every rank holds whole matrices. Collective.

    `size` must divide the number of ranks. Consecutive ranks are on one node, as far as it has enough of them.
    """
    if size == 1:
        return None
    index, replicas = context.rank % size, context.world_size // size
    first = context.rank - index
    peers = DataParallelGroup(
        context.rank // size, replicas, _form_group(context, range(index, context.world_size, size))
    )
    return TensorGroup(index, size, peers, _form_group(context, range(first, first + size)))


def _form_group(context: RunContext, ranks: Sequence[int]) -> Any:  # noqa: ANN401 - torch's group
    """Return torch's group of these ranks; None for one rank and for all."""
    if len(ranks) in {1, context.world_size}:
        return None
    return form_process_group(ranks)
