"""Dropout with masks drawn from the sequence's position in the batch, independent of how the batch is split.

Every rank, micro-batch and recomputation of activations draws the same mask for a sequence, so that a run with dropout
resumes bit for bit, even on another number of workers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm_training_toolkit.models.init_weights import derive_seed


class BatchPosition:
    """Sequences of the current forward pass: row r of `rows` is position `first` + r of the step's global batch.

    Step and position are in a tensor on the CPU. As plain numbers, torch.compile would make them constants of a layer's
    graph, and compile another one for each step.
    """

    def __init__(self, step: int = 0, first: int = 0, rows: int = 1) -> None:
        self.tensor = torch.tensor([step, first])
        self.rows = rows

    @property
    def step(self) -> int:
        """Step that the sequences belong to."""
        return int(self.tensor[0])

    @step.setter
    def step(self, step: int) -> None:
        self.tensor[0] = step

    @property
    def first(self) -> int:
        """Position of the first row in the step's global batch."""
        return int(self.tensor[1])

    @first.setter
    def first(self, first: int) -> None:
        self.tensor[1] = first


class SequenceDropout(nn.Module):
    """Dropout of a share `rate` in training, drawn from (seed, step, position in the step, name)."""

    def __init__(self, rate: float, seed: int, name: str, draws: BatchPosition) -> None:
        super().__init__()
        self._rate, self._draws = rate, draws
        self._key = torch.tensor(derive_seed(seed, name))  # no buffer: it stays on the CPU

    def forward(self, inputs: Tensor) -> Tensor:
        """Return `inputs` (…, H) with a separate mask for each row, scaled so that the mean stays.

        The rows may stand one after another in a single one, as variable-length attention has them.
        """
        if not self.training:
            return inputs
        rows = inputs.reshape(self._draws.rows, -1, inputs.shape[-1])
        kept: Tensor = _draw_masks(rows, self._draws.tensor, self._key, self._rate)
        return inputs * kept.view(inputs.shape) / (1.0 - self._rate)


# One operator for torch.compile, which could not look into generators.
@torch.library.custom_op(
    "ltt::draw_dropout_masks",
    mutates_args=(),
    schema="(Tensor like, Tensor position, Tensor key, float rate) -> Tensor",
)
def _draw_masks(like: Tensor, position: Tensor, key: Tensor, rate: float) -> Tensor:
    """Return masks (R, T, H) of what is kept of R sequences, on the device of `like` (R, T, H)."""
    (step, first), layer = position.tolist(), int(key)
    masks = torch.empty_like(like, dtype=torch.bool)
    for row, mask in enumerate(masks):
        source = torch.Generator(like.device).manual_seed(derive_seed(layer, f"{step}/{first + row}"))
        mask.bernoulli_(1.0 - rate, generator=source)
    return masks


@_draw_masks.register_fake
def _(like: Tensor, *_given: Any) -> Tensor:  # noqa: ANN401 - as above
    return torch.empty_like(like, dtype=torch.bool)
