"""fp32 master weights and gradients at ZeRO 0, where every rank holds all weights; one all-reduce a step.

DeepSpeed's bf16 path sums micro-batches in bf16 and moves every gradient eight times, even in one process: flatten,
cast, reduce, cast back, unflatten, copy, cast for the update, clip. At 99.5 million weights on one core that path, with
norm and AdamW, took 0.8 of 1.55 s a step; this one takes 0.4 s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm_training_toolkit.distributed.tensor_group import DataParallelGroup
from llm_training_toolkit.engine.allocation import allocate_zeros
from llm_training_toolkit.engine.gradient_buffer import GradientBuffer, MasterPiece, set_clip_scale
from llm_training_toolkit.engine.gradient_exchange import all_reduce_gradients
from llm_training_toolkit.models.tensor_parallel import TensorParallelModel
from llm_training_toolkit.plan.memory.memory_estimate import REDUCTION_CHUNK_SIZE


class MasterWeights:
    """fp32 master weights and gradients of a model's trainable parameters."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        group: DataParallelGroup,
        tensor_parallel: TensorParallelModel | None = None,
        *,
        sent: torch.dtype = torch.float32,
    ) -> None:
        """Copy the parameters; gradients are summed over `group`, their norm also over slices of matrices.

        Gradients pass between ranks in the type `sent`.
        """
        self._sent = sent
        self._group, self._tensor_parallel = group, tensor_parallel
        device = parameters[0].device if parameters else torch.device("cpu")
        if device.type == "cpu":
            _flatten_parameters(parameters, device)
        low = [parameter for parameter in parameters if parameter.dtype != torch.float32]
        shapes = [parameter.shape for parameter in low]
        _, weights = allocate_zeros(shapes, torch.float32, device)
        # One buffer, all-reduced in place. fp32 parameters keep autograd's own gradients, without a copy.
        self._flat, gradients = allocate_zeros(shapes, torch.float32, device)
        self._low = [(parameter, nn.Parameter(own)) for parameter, own in zip(low, weights, strict=True)]
        self.load_from_low_precision()
        self._own = {id(parameter): own for parameter, own in self._low}
        self.pieces = [MasterPiece(parameter, 0, self._own.get(id(parameter), parameter)) for parameter in parameters]
        """Each parameter, whole, and the fp32 tensor that the optimizer updates: itself if it is fp32."""
        self._buffer = GradientBuffer(low, gradients)

    def get_master_weights(self, parameter: nn.Parameter) -> list[nn.Parameter]:
        """Return the fp32 tensor that the optimizer updates for a parameter: itself if it is fp32."""
        return [self._own.get(id(parameter), parameter)]

    def get_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return a parameter's whole fp32 gradient, summed over ranks, after `reduce_gradients`."""
        return self.get_master_weights(parameter)[0].grad

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sum the gradients over the ranks; parameters without one get zeros. Collective."""
        self._buffer.finish_step()
        for parameter, own in self._low:
            own.grad = self._buffer.get_sum(parameter)
        own_gradients = [own for parameter, _, own in self.pieces if own is parameter]
        for own in own_gradients:
            if own.grad is None:
                own.grad = torch.zeros_like(own)
        if self._group.size == 1:
            return
        if self._low:
            all_reduce_gradients(self._flat, self._sent, self._group.process_group)
        for piece in _iter_buckets(own_gradients):
            flat = torch.cat([own.grad.flatten() for own in piece])  # type: ignore[union-attr] # set above
            all_reduce_gradients(flat, self._sent, self._group.process_group)
            for own, gradient in zip(piece, _unflatten_like(flat, piece), strict=True):
                own.grad = gradient

    def compute_grad_norm(self) -> float:
        """Return rank 0's gradient norm on all ranks: processors of other kinds sum in another order. Collective."""
        if self._tensor_parallel is None:
            norm = torch.nn.utils.get_total_norm(self._get_gradients())
        else:
            owned = self._get_gradients(self._tensor_parallel.is_owner)
            squared = torch.nn.utils.get_total_norm(owned).to(self._flat.device, torch.float64).square()
            norm = self._tensor_parallel.group.all_reduce(squared).sqrt()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(norm, src=0)
        return float(norm)

    def clip_gradients(self, optimizer: torch.optim.Optimizer, norm: float, largest: float) -> None:
        """Scale the gradients to a norm of at most `largest`; 0 disables clipping."""
        with torch.no_grad():
            set_clip_scale(optimizer, self._get_gradients(), norm, largest)

    def _get_gradients(self, is_chosen: Callable[[nn.Parameter], bool] = lambda _: True) -> list[Tensor]:
        chosen = (piece.weights.grad for piece in self.pieces if is_chosen(piece.parameter))
        return [gradient for gradient in chosen if gradient is not None]

    def close(self) -> None:
        """Remove the hooks, which keep the buffers alive."""
        self._buffer.close()

    @torch.no_grad()
    def load_from_low_precision(self) -> None:
        """Copy the forward pass's weights into the fp32 weights."""
        for parameter, own in self._low:
            own.copy_(parameter)

    @torch.no_grad()
    def sync_low_precision(self) -> None:
        """Round the fp32 weights into the forward pass's weights."""
        for parameter, own in self._low:
            parameter.copy_(own)


def _flatten_parameters(parameters: Sequence[nn.Parameter], device: torch.device) -> None:
    """Move the parameters of each dtype into one contiguous buffer with huge pages."""
    for dtype in sorted({parameter.dtype for parameter in parameters}, key=str):
        same = [parameter for parameter in parameters if parameter.dtype == dtype]
        for parameter, buffer_view in zip(same, allocate_zeros([p.shape for p in same], dtype, device)[1], strict=True):
            parameter.data = buffer_view.copy_(parameter.detach())


def _iter_buckets(tensors: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield groups of consecutive tensors, each reduced at once."""
    piece: list[nn.Parameter] = []
    for tensor in tensors:
        if piece and sum(each.numel() for each in piece) + tensor.numel() > REDUCTION_CHUNK_SIZE:
            yield piece
            piece = []
        piece.append(tensor)
    if piece:
        yield piece


def _unflatten_like(flat: Tensor, shaped: Sequence[Tensor]) -> list[Tensor]:
    """Return consecutive views of a flat tensor in the shapes of `shaped`."""
    pieces = torch.split(flat, [tensor.numel() for tensor in shaped]) if shaped else ()
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, shaped, strict=True)]
