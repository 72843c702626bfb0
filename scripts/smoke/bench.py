"""What the checks train, and where: configurations as plain data, sized for the GPU at hand or for a rehearsal on CPU.

All runs share data and tokenizer, so that the tokens are prepared once. The small model is for what must be right,
the large one (0.6 billion parameters, the size's own vocabulary) for speed and memory.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm_training_toolkit.config import parse_config
from llm_training_toolkit.plan import make_plan

Values = dict[str, Any]

_SMALL_ON_GPU = {
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
"""20 million parameters with a vocabulary of 8,192: a checkpoint of 0.2 GB, seconds a run."""
_TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_LARGE_VOCABULARY = 151_936
"""Rows of qwen3-0.6b's own embedding: the tokenizer fills 8,192 of them, arithmetic and memory are the size's."""
_LARGE_BATCH = 16
_LARGE_LAYERS = (28, 14, 7)
"""The size's own number of layers first; fewer where a sequence does not fit into the GPU."""
_FILL = 0.8
"""Share of the free memory that the estimate of one sequence may fill."""
_LARGE_SECONDS = 40.0
"""How long the large run may train, reckoned at 30 % of the measured matrix speed."""
WARM_UP = 4
"""Steps that do not count for speed: caches fill and kernels are chosen."""


@dataclass(frozen=True)
class Bench:
    """Where the checks run."""

    device: Literal["cuda", "cpu"]
    work: Path
    """A folder of this start alone."""
    cores: int
    gpus: int
    free_bytes: float
    """Free memory of the first GPU."""
    matmul_flops: float
    """Measured speed of a bf16 matrix product."""

    @property
    def on_gpu(self) -> bool:
        """Whether this is the real thing."""
        return self.device == "cuda"

    @property
    def together(self) -> int:
        """Number of small runs at once: they check results, and no speed."""
        return min(4, self.cores // 4 or 1, int(self.free_bytes // 6e9) or 1) if self.on_gpu else min(2, self.cores)

    def small(self, name: str, **sections: Values) -> Values:
        """A run of a small model: six steps whose loss falls."""
        shape = _SMALL_ON_GPU if self.on_gpu else _TINY
        train = {"steps": 6, "global_batch_size": 8, "micro_batch_size": 4}
        return self._config(
            name, sections, {"model": {"config_overrides": shape}, "train": train, "optim": {"lr": 3e-3}}
        )

    def large(self, name: str, **sections: Values) -> Values:
        """The run that speed and memory are measured on; on CPU the tiny model again."""
        if not self.on_gpu:
            train = {"steps": 12, "global_batch_size": 8, "micro_batch_size": 4}
            return self._config(name, sections, {"model": {"config_overrides": _TINY}, "train": train})
        layers = next((layers for layers in _LARGE_LAYERS if self._fits(layers)), _LARGE_LAYERS[-1])
        config = self._large(name, sections, layers, "auto")
        if "steps" not in sections.get("train", {}):
            config["train"]["steps"] = self._steps(config)
        return config

    def _large(self, name: str, sections: Values, layers: int, micro_batch: int | str) -> Values:
        shape = {"vocab_size": _LARGE_VOCABULARY, "num_hidden_layers": layers}
        train = {"steps": 16, "global_batch_size": _LARGE_BATCH, "micro_batch_size": micro_batch}
        return self._config(name, sections, {"model": {"config_overrides": shape}, "train": train})

    def _fits(self, layers: int) -> bool:
        plan = make_plan(parse_config(self._large("fits", {}, layers, 1), "gpu smoke"))
        return 1e9 * sum(plan.memory_gb_per_device.values()) <= _FILL * self.free_bytes

    def _steps(self, config: Values) -> int:
        plan = make_plan(parse_config(config, "gpu smoke"))
        step = plan.flops_per_token * plan.tokens_per_step / (0.3 * self.matmul_flops)
        return max(WARM_UP + 4, min(16, round(_LARGE_SECONDS / step)))

    def _config(self, name: str, *changes: Values) -> Values:
        corpus = "python:stdlib" if self.on_gpu else str(Path(sysconfig.get_paths()["stdlib"]) / "asyncio")
        config: Values = {
            "run": {"name": name, "dir": str(self.work / "runs")},
            "model": {"name": "qwen3-0.6b"},
            "tokenizer": {"train": {"vocab_size": 8192 if self.on_gpu else 512}},
            "data": {
                "sequence_length": 2048 if self.on_gpu else 128,
                "sources": [{"path": corpus, "format": "code"}],
                "eval": {"fraction": 0.005},
                "on_error": "skip",
                "max_skipped": 0.01,
                "cache": str(self.work / "cache"),
            },
            "optim": {"lr": 1e-3, "warmup": 2},
            "engine": {"zero_stage": 2},
            "checkpoint": {"interval": 1_000_000},
            "eval": {"interval": 1_000_000},
            "export": {"at_end": False},
            "cluster": {
                "workers": 0,
                "gpus_per_worker": 1 if self.on_gpu else 0,
                "cpus_per_worker": min(4, self.cores) if self.on_gpu else 1,
            },
        }
        for sections in reversed(changes):
            for section, values in sections.items():
                config[section] = config.get(section, {}) | values
        return config
