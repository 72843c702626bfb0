"""What the loops of the checkpoint benchmark share: the model, the batches, what is asked and what is answered."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "100m": {
        "hidden_size": 768,
        "intermediate_size": 2304,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}
"""99.5 million parameters, and 4.2 million to try the benchmark with."""
VOCABULARY = 4096
LENGTH = 256
LR = 1e-4
CLIP = 1.0
WEIGHT_DECAY = 0.1


@dataclass(frozen=True)
class SaveRequest:
    """What one process is to do; a JSON object on its command line."""

    directory: str
    """Where checkpoints go."""
    shape: str
    steps: int
    every: int
    """Steps between two checkpoints; 0 = none. There is none after the last step."""
    sequences: int
    """Of LENGTH tokens in a step, one at a time."""
    threads: int

    @property
    def saves(self) -> int:
        """How many checkpoints are written."""
        return (self.steps - 1) // self.every if self.every else 0


@dataclass
class Measured:
    """What came of it."""

    seconds: float = 0.0
    """From the beginning of the first step until the last step is done and the last checkpoint whole."""
    step_seconds: list[float] = field(default_factory=list)
    """Of each step without what it waited for a checkpoint after the one before."""
    wait_seconds: list[float] = field(default_factory=list)
    """What the next step waited for, for each checkpoint."""
    whole_seconds: list[float] = field(default_factory=list)
    """From the end of its step until a checkpoint is whole."""
    size: int = 0
    """Bytes of a checkpoint."""

    def report(self) -> None:
        """For the benchmark to read."""
        print(json.dumps(asdict(self)), flush=True)


class Clock:
    """The times of a loop whose saves block it."""

    def __init__(self) -> None:
        self.measured = Measured()
        self._began = self._last = time.perf_counter()

    def step(self) -> None:
        """A step is done."""
        now = time.perf_counter()
        self.measured.step_seconds.append(now - self._last)
        self.measured.seconds = now - self._began
        self._last = now

    def saved(self) -> None:
        """A checkpoint is done."""
        now = time.perf_counter()
        self.measured.wait_seconds.append(now - self._last)
        self._last = now

    def end(self, directory: str) -> None:
        """Measure what was written, and report."""
        saves = len(self.measured.wait_seconds)
        self.measured.whole_seconds = list(self.measured.wait_seconds)
        self.measured.size = size_of(directory) // saves if saves else 0
        self.measured.report()


def size_of(directory: str) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


def model(shape: str) -> Any:
    """The model in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3",
        **SHAPES[shape],
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def rows(count: int) -> torch.Tensor:
    """Random tokens (count, LENGTH)."""
    return torch.randint(0, VOCABULARY, (count, LENGTH))
