"""Checks that an exported directory reproduces the logits of its checkpoint, loaded by a separate code path.

One model is in memory at a time, in the run's precision, on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_training_toolkit.checkpoint import CheckpointReader
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.export.weights import load_stored_weights
from llm_training_toolkit.models import build_model
from llm_training_toolkit.models.load_exported import load_exported_model

_TOKENS = 32


def check_full_model(
    directory: Path, checkpoint: CheckpointReader, hf_config: Mapping[str, Any], precision: str
) -> float:
    """Return 0.0. Raises CheckpointError unless a fully trained model gives bit-identical logits."""
    model = build_model(hf_config, precision=precision, attention="sdpa").eval()
    load_stored_weights(model, checkpoint)
    wanted = compute_logits(model)
    del model
    return compare_logits(directory, compute_logits(load_exported_model(directory)), wanted, 0.0)


@torch.no_grad()
def compute_logits(model: nn.Module) -> Tensor:
    """Return logits (1, T, V) of a fixed token sequence, in fp32."""
    config: Any = model.config
    count = min(_TOKENS, config.max_position_embeddings)
    tokens = torch.randint(config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
    out: Tensor = model(input_ids=tokens, use_cache=False).logits
    return out.float()


def compare_logits(directory: Path, found: Tensor, wanted: Tensor, tolerance: float) -> float:
    """Return the largest deviation / the largest `wanted` logit. Raises CheckpointError above `tolerance`."""
    difference, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    if not difference <= tolerance * largest:  # NaN fails as well
        raise CheckpointError(
            f"export to {directory}: the reloaded model does not give the checkpoint's logits (they differ by "
            f"{difference:.3g}, the largest is {largest:.3g}); nothing was exported"
        )
    return difference / largest if largest else 0.0
