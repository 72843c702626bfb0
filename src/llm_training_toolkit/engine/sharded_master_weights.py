"""fp32 master weights and optimizer state sharded over the ranks (ZeRO 1), on the device or in host memory.

Gradients are summed in fp32 on each rank and reduce-scattered once a step, whatever the number of micro-batches; then
the updated shards of the weights are all-gathered. A rank sends 4 bytes a weight for gradients and 2 for bf16 weights.
DeepSpeed's stage 1 sums micro-batches in bf16 and sends an all-reduce; its stage 2 sends one for every micro-batch.
With offload it sums micro-batches in bf16, and only if it is told their number (stage_1_and_2.py of 0.19.8,
`async_accumulate_grad_in_cpu_via_gpu`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm_training_toolkit.distributed.tensor_group import DataParallelGroup
from llm_training_toolkit.engine.allocation import allocate_zeros
from llm_training_toolkit.engine.gradient_buffer import GradientBuffer, MasterPiece, set_clip_scale
from llm_training_toolkit.engine.gradient_exchange import reduce_scatter_gradients
from llm_training_toolkit.models.tensor_parallel import TensorParallelModel


class ShardedMasterWeights:
    """fp32 master weights and gradients of one rank's shard of a model's trainable parameters."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        device: torch.device,
        group: DataParallelGroup,
        tensor_parallel: TensorParallelModel | None = None,
        *,
        offload: bool,
        sent: torch.dtype = torch.float32,
    ) -> None:
        """Move the parameters to `device`, flattened by dtype; with `offload` the master weights go to host memory.

        Gradients are summed over `group`, their norm also over slices of matrices. They pass between
        ranks in the type `sent`.
        """
        self._sent = sent
        dtypes = sorted({parameter.dtype for parameter in parameters}, key=str)
        self._device, self._offload = device, offload
        self._group, self._tensor_parallel = group, tensor_parallel
        self._flats = [
            _FlatShard([each for each in parameters if each.dtype == dtype], device, group, offload=offload)
            for dtype in dtypes
        ]
        self.pieces = [piece for flat in self._flats for piece in flat.pieces]
        """Fragments of this rank's shard."""
        self._weights: dict[int, list[nn.Parameter]] = {}
        for piece in self.pieces:
            self._weights.setdefault(id(piece.parameter), []).append(piece.weights)
        self.load_from_low_precision()

    def get_master_weights(self, parameter: nn.Parameter) -> list[nn.Parameter]:
        """Return the fp32 tensors of this rank that the optimizer updates for a parameter: one or none."""
        return self._weights.get(id(parameter), [])

    def get_gradient(self, parameter: nn.Parameter) -> Tensor:
        """Return a parameter's fp32 gradient, whole or of its slice, after `reduce_gradients`. Collective."""
        whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=self._device)
        for piece in self.pieces:
            if piece.parameter is parameter:
                assert piece.weights.grad is not None
                whole[piece.start : piece.start + piece.weights.numel()] = piece.weights.grad.flatten()
        if self._group.size > 1:
            dist.all_reduce(whole, group=self._group.process_group)
        return whole.view_as(parameter)

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sum the gradients of this rank's shard over the ranks. Collective."""
        for flat in self._flats:
            flat.reduce_gradients(self._sent)
        if self._offload and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # the optimizer reads the copies in host memory

    def compute_grad_norm(self) -> float:
        """Return the norm of all gradients, the same on every rank. Collective."""
        own = [each for flat in self._flats for each in zip(flat.pieces, flat.gradients, strict=True)]
        if self._tensor_parallel is not None:
            own = [(piece, gradient) for piece, gradient in own if self._tensor_parallel.is_owner(piece.parameter)]
        shards = [gradient for _, gradient in own]
        norm = torch.nn.utils.get_total_norm(shards) if shards else torch.zeros((), device=self._device)
        if self._group.size > 1 or self._tensor_parallel is not None:
            squared = norm.to(self._device, torch.float64).square()
            dist.all_reduce(squared)
            norm = squared.sqrt()
        return float(norm)

    def clip_gradients(self, optimizer: torch.optim.Optimizer, norm: float, largest: float) -> None:
        """Scale the gradients to a norm of at most `largest`; 0 disables clipping."""
        gradients = [piece.weights.grad for piece in self.pieces if piece.weights.grad is not None]
        with torch.no_grad():
            set_clip_scale(optimizer, gradients, norm, largest)

    @torch.no_grad()
    def load_from_low_precision(self) -> None:
        """Copy this rank's shard of the forward pass's weights into the fp32 weights."""
        for flat in self._flats:
            flat.load_master()

    @torch.no_grad()
    def sync_low_precision(self) -> None:
        """Round the fp32 weights into the forward pass's weights, on all ranks. Collective."""
        for flat in self._flats:
            flat.sync_weights()

    def close(self) -> None:
        """Remove the hooks, which keep the buffers alive."""
        for flat in self._flats:
            flat.close()


class _FlatShard:
    """Parameters of one dtype in one buffer, and one rank's equal share of it."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], device: torch.device, group: DataParallelGroup, *, offload: bool
    ) -> None:
        ranks, rank = group.size, group.index
        self._group = group
        size = sum(parameter.numel() for parameter in parameters)
        length = -(-size // ranks)
        self._shard = slice(rank * length, (rank + 1) * length)
        shapes = [*(parameter.shape for parameter in parameters), torch.Size([ranks * length - size])]
        self._weights, weight_views = allocate_zeros(shapes, parameters[0].dtype, device)
        for parameter, view in zip(parameters, weight_views, strict=False):  # the last one is padding
            parameter.data = view.copy_(parameter.detach())
        self._gradients, gradient_views = allocate_zeros(shapes, torch.float32, device)
        self._buffer = GradientBuffer(parameters, gradient_views[:-1])
        self._offload = offload
        self._shares_weights = parameters[0].dtype == torch.float32 and not offload
        own_weights, own_gradients = self._weights[self._shard], self._gradients[self._shard]
        self._master = own_weights if self._shares_weights else _allocate_master(length, device, offload=offload)
        self._master_gradients = _allocate_master(length, device, offload=True) if offload else own_gradients
        self._rounded: Tensor | None = None
        if offload and own_weights.dtype != torch.float32:
            # In page-locked memory: torch would convert through pageable memory, and wait for the copy.
            self._rounded = torch.empty_like(own_weights, device="cpu", pin_memory=device.type == "cuda")
        self.pieces: list[MasterPiece] = []
        self._master_gradient_views: list[Tensor] = []
        self.gradients: list[Tensor] = []
        """Gradients of the pieces on the device."""
        end = 0
        for parameter in parameters:
            begin, end = end, end + parameter.numel()
            low, high = max(begin, self._shard.start), min(end, self._shard.stop)
            if low < high:
                part = slice(low - self._shard.start, high - self._shard.start)
                shape = parameter.shape if high - low == parameter.numel() else torch.Size([high - low])
                weights = nn.Parameter(self._master[part].view(shape))
                self.pieces.append(MasterPiece(parameter, low - begin, weights))
                self._master_gradient_views.append(self._master_gradients[part].view(shape))
                self.gradients.append(own_gradients[part].view(shape))

    def reduce_gradients(self, sent: torch.dtype) -> None:
        """Sum the shard's gradients over the ranks, sent in a type, and give them to the optimizer."""
        self._buffer.finish_step()
        own = self._gradients[self._shard]
        if self._group.size > 1:
            # In place, which NCCL and gloo both allow.
            reduce_scatter_gradients(own, self._gradients, sent, self._group.process_group)
        if self._offload:
            self._master_gradients.copy_(own, non_blocking=True)
        for piece, gradient in zip(self.pieces, self._master_gradient_views, strict=True):
            piece.weights.grad = gradient

    def load_master(self) -> None:
        """Copy the shard's weights of the forward pass into the fp32 weights."""
        if not self._shares_weights:
            self._master.copy_(self._weights[self._shard])

    def sync_weights(self) -> None:
        """Round the fp32 weights into the forward pass's weights, on all ranks."""
        own = self._weights[self._shard]
        if self._rounded is not None:
            self._rounded.copy_(self._master)
            own.copy_(self._rounded, non_blocking=True)
        elif not self._shares_weights:
            own.copy_(self._master, non_blocking=True)
        if self._group.size > 1:
            dist.all_gather_single(self._weights, own, group=self._group.process_group)

    def close(self) -> None:
        """Remove the hooks, which keep the buffers alive."""
        self._buffer.close()


def _allocate_master(length: int, device: torch.device, *, offload: bool) -> Tensor:
    """Return fp32 zeros on the device, or with `offload` in host memory, page-locked if a GPU copies from it."""
    if offload and device.type == "cuda":
        return torch.zeros(length, dtype=torch.float32, pin_memory=True)
    return allocate_zeros([torch.Size([length])], torch.float32, torch.device("cpu") if offload else device)[0]
