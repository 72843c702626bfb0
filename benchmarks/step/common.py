"""What all loops of the step benchmark share: the model, the batches, the clock."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from loop import LENGTH, SHAPES, VOCABULARY

# Class of transformers and a size of each family. With the shape of Qwen3 StarCoder is smaller, because
# its feed-forward layer has two matrices instead of three, and keys and values of StarCoder 1 have one head.
FAMILIES = {
    "qwen3": ("qwen3", "qwen3-0.6b"),
    "starcoder2": ("starcoder2", "starcoder2-3b"),
    "starcoder1": ("gpt_bigcode", "starcoderbase-1b"),
}
SIZES = {"4.2M": ("tiny", 8), "99.5M": ("100m", 1)}
"""Shape in benchmarks/checkpoint/loop.py, and sequences of a micro-batch, which two processes divide; one at least."""
WARM_UP = 3
LR = 1e-4
CLIP = 1.0
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class StepRequest:
    """What one loop is to do; a JSON object on its command line."""

    family: str
    size: str
    precision: str
    steps: int
    micro_batches: int
    """Of each process in a step."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in the forward pass."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def shape(self) -> dict[str, Any]:
        """The model's, by the names that its family has in the toolkit."""
        missing = {"qwen3": (), "starcoder2": ("head_dim",), "starcoder1": ("head_dim", "num_key_value_heads")}
        found = {name: value for name, value in SHAPES[SIZES[self.size][0]].items() if name not in missing[self.family]}
        # The positions of StarCoder 1 are rows of a table.
        return found | {"max_position_embeddings": 1024} if self.family == "starcoder1" else found

    @property
    def rows(self) -> int:
        """Sequences in a micro-batch of one process."""
        return max(1, SIZES[self.size][1] // world_size())

    @property
    def global_batch(self) -> int:
        """Sequences in a step."""
        return self.rows * self.micro_batches * world_size()


def read_request() -> StepRequest:
    """What the command line asks."""
    return StepRequest(**json.loads(sys.argv[1]))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ["WORLD_SIZE"])


@dataclass
class Clock:
    """Seconds of each step after the warm-up."""

    asked: StepRequest
    seconds: list[float] = field(default_factory=list)
    last: float = 0.0

    def tick(self) -> None:
        """A step is complete."""
        now = time.perf_counter()
        if self.last:
            self.seconds.append(now - self.last)
        self.last = now

    def report(self) -> None:
        """Print tokens per second of the median step on rank 0, for the benchmark to read."""
        if int(os.environ["RANK"]) == 0:
            median = statistics.median(self.seconds[WARM_UP:])
            print(json.dumps({"tokens_per_second": self.asked.global_batch * LENGTH / median}), flush=True)


def start() -> tuple[StepRequest, Clock]:
    """What is asked and a clock; one thread a rank, a gloo group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    return read_request(), Clock(read_request())


def model(asked: StepRequest, dtype: torch.dtype) -> Any:
    """The model with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, dropouts = FAMILIES[asked.family][0], ("attn_pdrop", "resid_pdrop", "embd_pdrop")
    values = {"max_position_embeddings": 4096, **asked.shape}
    if kind == "gpt_bigcode":  # this class has no common name for the width
        values = {**values, "n_inner": values.pop("intermediate_size"), **dict.fromkeys(dropouts, 0.0)}
    config = AutoConfig.for_model(kind, **values, vocab_size=VOCABULARY, tie_word_embeddings=True, use_cache=False)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def batch(asked: StepRequest) -> torch.Tensor:
    """Random tokens of a micro-batch (rows, LENGTH)."""
    return torch.randint(0, VOCABULARY, (asked.rows, LENGTH))
