"""A larger vocabulary for loaded weights: more rows in the embedding and the output layer.

Called by the worker only where `model.grow_vocabulary` asks for it, inside `engine.partitioned`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llm_training_toolkit.models.initial import Whole


def grow_vocabulary(model: nn.Module, rows: int, whole: Whole) -> None:
    """Give embedding and output layer `rows` rows; the new ones are the mean of the old. What is tied stays tied.

    The mean, because it changes the distribution over the old tokens least; transformers would draw around it, from a
    generator whose state differs between ranks.
    """
    lm: Any = model
    before = int(lm.config.vocab_size)
    assert rows > before, "the plan refuses to remove rows"
    lm.resize_token_embeddings(rows, mean_resizing=False)
    for matrix in {
        id(layer.weight): layer.weight for layer in (lm.get_input_embeddings(), lm.get_output_embeddings())
    }.values():
        with whole(matrix), torch.no_grad():
            matrix.data[before:] = matrix.data[:before].mean(dim=0, dtype=torch.float32).to(matrix.dtype)
