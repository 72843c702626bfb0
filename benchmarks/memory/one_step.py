"""Forward and backward pass of one micro-batch, and the most memory this whole process has needed.

Arguments: `transformers` for its own loss over whole logits, or a number: this toolkit's loss in chunks of that many
tokens (0 = whole).
"""

from __future__ import annotations

import json
import resource
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm_training_toolkit.models import LossModule

TOKENS = 2048
LAYERS, HIDDEN, VOCABULARY = 1, 1024, 151_936
KIND = sys.argv[1]


def model() -> torch.nn.Module:
    """One layer of Qwen3-0.6B under its whole vocabulary, in bf16: it is the loss that is compared."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    built: torch.nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return built


def main() -> None:
    """Run it and print bytes, seconds, loss and the norm of the gradient."""
    torch.set_num_threads(2)
    language_model = model()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (1, TOKENS), generator=generator)
    positions = torch.arange(TOKENS)[None]
    labels = torch.randint(VOCABULARY, (1, TOKENS), generator=generator)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.perf_counter()
    if KIND == "transformers":
        given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        loss = language_model(**given, labels=labels, shift_labels=labels, num_items_in_batch=1).loss
    else:
        loss = LossModule(language_model, "auto" if KIND == "auto" else int(KIND))(ids, positions, labels)
    (loss / TOKENS).backward()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    norm = torch.nn.utils.get_total_norm([p.grad.float() for p in language_model.parameters() if p.grad is not None])
    found = {"peak": peak, "before": before, "seconds": seconds, "loss": float(loss) / TOKENS, "norm": float(norm)}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
