"""Whether an exported directory gives the logits of its checkpoint, whose weights are loaded another way.

One model is in memory at a time, in the precision of the run, on the CPU.
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
    """0.0; raise CheckpointError unless a model that was trained whole gives the same logits bit for bit."""
    model = build_model(hf_config, precision=precision, attention="sdpa").eval()
    load_stored_weights(model, checkpoint)
    wanted = compute_logits(model)
    del model
    return compare_logits(directory, compute_logits(load_exported_model(directory)), wanted, 0.0)


@torch.no_grad()
def compute_logits(model: nn.Module) -> Tensor:
    """Logits (1, T, V) of tokens that are always the same, in fp32."""
    config: Any = model.config
    count = min(_TOKENS, config.max_position_embeddings)
    tokens = torch.randint(config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
    out: Tensor = model(input_ids=tokens, use_cache=False).logits
    return out.float()


def compare_logits(directory: Path, found: Tensor, wanted: Tensor, tolerance: float) -> float:
    """Largest difference of a logit as a share of the largest wanted one. Raises CheckpointError above `tolerance`."""
    difference, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    if not difference <= tolerance * largest:  # not a number is no equality either
        raise CheckpointError(
            f"export to {directory}: the reloaded model does not give the checkpoint's logits (they differ by "
            f"{difference:.3g}, the largest is {largest:.3g}); nothing was exported"
        )
    return difference / largest if largest else 0.0
