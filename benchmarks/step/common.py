"""What all loops of the step benchmark share: the model, the batches, the clock."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

MODEL: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
    "use_cache": False,
}
"""The model of configs/quickstart.yaml: 4.2 million parameters."""
LENGTH = 256
GLOBAL_BATCH = 8
WARM_UP = 5
LR = 1e-3
CLIP = 1.0
WEIGHT_DECAY = 0.1


@dataclass
class Clock:
    """Seconds of each step after the warm-up."""

    steps: int
    seconds: list[float]
    last: float = 0.0

    def tick(self) -> None:
        """A step is complete."""
        now = time.perf_counter()
        if self.last:
            self.seconds.append(now - self.last)
        self.last = now

    def report(self) -> None:
        """Print tokens per second of the median step on rank 0, for the benchmark to read."""
        if int(os.environ.get("RANK", "0")) == 0:
            median = statistics.median(self.seconds[WARM_UP:])
            print(json.dumps({"tokens_per_second": GLOBAL_BATCH * LENGTH / median}), flush=True)


def start() -> tuple[int, int, Clock]:
    """Rank, world size and a clock; one thread a rank, a gloo group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    return dist.get_rank(), dist.get_world_size(), Clock(int(sys.argv[1]), [])


def model() -> Any:
    """The model in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**MODEL), dtype=torch.bfloat16, attn_implementation="sdpa"
    )


def batch(world_size: int) -> torch.Tensor:
    """Random tokens of one rank's share (rows, LENGTH)."""
    return torch.randint(0, MODEL["vocab_size"], (GLOBAL_BATCH // world_size, LENGTH))
