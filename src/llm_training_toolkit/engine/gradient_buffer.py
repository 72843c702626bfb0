"""fp32 gradients summed over micro-batches, outside DeepSpeed: in fp32 whatever the precision, reduced once a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class MasterPiece(NamedTuple):
    """Consecutive range of a flattened parameter, and the fp32 tensor that the optimizer updates for it."""

    parameter: nn.Parameter
    start: int
    weights: nn.Parameter
    """(count,) or the parameter's shape; its gradient is set before each update."""


class GradientBuffer:
    """Sum of each parameter's gradients over the micro-batches of a step, in fp32 tensors given by the caller.

    A gradient is added as soon as backward has produced it, and freed.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], sums: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._sums = {id(parameter): total for parameter, total in zip(parameters, sums, strict=True)}
        self._begun: set[int] = set()
        self._hooks: list[Any] = [
            parameter.register_post_accumulate_grad_hook(self._add_gradient)  # type: ignore[no-untyped-call]
            for parameter in parameters
        ]

    def get_sum(self, parameter: nn.Parameter) -> Tensor:
        """Return the sum of a parameter's gradients, complete after `finish_step`."""
        return self._sums[id(parameter)]

    @torch.no_grad()
    def _add_gradient(self, parameter: Tensor) -> None:
        total = self._sums[id(parameter)]
        assert parameter.grad is not None
        if id(parameter) in self._begun:
            total.add_(parameter.grad)
        else:
            total.copy_(parameter.grad)  # saves zeroing
            self._begun.add(id(parameter))
        parameter.grad = None

    @torch.no_grad()
    def finish_step(self) -> None:
        """Complete the sums of a step: parameters without a gradient get zeros. The next gradient begins a new sum."""
        for parameter in self._parameters:
            if id(parameter) not in self._begun:
                self._sums[id(parameter)].zero_()
        self._begun.clear()

    def close(self) -> None:
        """Remove the hooks, which keep the buffers alive."""
        for hook in self._hooks:
            hook.remove()


def set_clip_scale(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor], norm: float, largest: float) -> None:
    """Make the next update clip the gradients to a norm of at most `largest`; 0 disables clipping.

    The fused kernel scales while it reads, which saves a pass over them.
    """
    ratio = (norm + 1e-6) / largest if largest > 0 else 0.0  # DeepSpeed's formula at the other stages
    device = gradients[0].device if gradients else torch.device("cpu")
    scale = torch.tensor(ratio, dtype=torch.float32, device=device) if ratio > 1 else None
    if optimizer.defaults["fused"]:
        optimizer.grad_scale = scale  # type: ignore[attr-defined] # torch's own protocol of its GradScaler
    elif scale is not None:
        torch._foreach_div_(list(gradients), scale)
