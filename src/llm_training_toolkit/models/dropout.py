"""Dropout that depends on the sequence and not on how a batch is divided: the mask is drawn from its name.

Every rank, every micro-batch and every recomputation of activations draws the same mask for a sequence, so that a run
with dropout can be resumed bit for bit, and on another number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_training_toolkit.models.init_weights import derive_seed


@dataclass
class BatchPosition:
    """Which sequences the forward pass is seeing: row r is position `first` + r of the step's global batch."""

    step: int = 0
    first: int = 0


class SequenceDropout(nn.Module):
    """Leaves out a share `rate` of its input in training, drawn from (seed, step, position in the step, name)."""

    def __init__(self, rate: float, seed: int, name: str, draws: BatchPosition) -> None:
        super().__init__()
        self._rate, self._seed, self._name, self._draws = rate, seed, name, draws

    def forward(self, inputs: Tensor) -> Tensor:
        """`inputs` (rows, …) with a mask of its own for each row, scaled so that the mean stays."""
        if not self.training:
            return inputs
        kept = torch.stack([self._draw_mask(inputs[0], row) for row in range(len(inputs))])
        return inputs * kept / (1.0 - self._rate)

    def _draw_mask(self, like: Tensor, row: int) -> Tensor:
        name = f"{self._draws.step}/{self._draws.first + row}/{self._name}"
        source = torch.Generator(like.device).manual_seed(derive_seed(self._seed, name))
        return torch.empty_like(like, dtype=torch.bool).bernoulli_(1.0 - self._rate, generator=source)
