"""Dropout with masks drawn from the sequence's position in the batch, independent of how the batch is split.

Every rank, micro-batch and recomputation of activations draws the same mask for a sequence, so that a run with dropout
resumes bit for bit, even on another number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_training_toolkit.models.init_weights import derive_seed


@dataclass
class BatchPosition:
    """Sequences of the current forward pass: row r of `rows` is position `first` + r of the step's global batch."""

    step: int = 0
    first: int = 0
    rows: int = 1


class SequenceDropout(nn.Module):
    """Dropout of a share `rate` in training, drawn from (seed, step, position in the step, name)."""

    def __init__(self, rate: float, seed: int, name: str, draws: BatchPosition) -> None:
        super().__init__()
        self._rate, self._seed, self._name, self._draws = rate, seed, name, draws

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `inputs` (…, H) with a separate mask for each row, scaled so that the mean stays.

        The rows may stand one after another in a single one, as variable-length attention has them.
        """
        if not self.training:
            return inputs
        rows = inputs.reshape(self._draws.rows, -1, inputs.shape[-1])
        kept = torch.stack([self._draw_mask(rows[0], row) for row in range(len(rows))])
        return inputs * kept.view(inputs.shape) / (1.0 - self._rate)

    def _draw_mask(self, like: Tensor, row: int) -> Tensor:
        name = f"{self._draws.step}/{self._draws.first + row}/{self._name}"
        source = torch.Generator(like.device).manual_seed(derive_seed(self._seed, name))
        return torch.empty_like(like, dtype=torch.bool).bernoulli_(1.0 - self._rate, generator=source)
