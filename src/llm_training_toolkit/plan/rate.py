"""The learning rate that `optim.lr: auto` stands for, and the lengths of warm-up and decay."""

from __future__ import annotations

import bisect
import itertools
import math

from llm_training_toolkit.config.schema import Config

_SCRATCH = ((10e6, 3e-3), (125e6, 6e-4), (350e6, 3e-4), (1.3e9, 2e-4), (6.7e9, 1.2e-4))
_FINE_TUNING = 1e-5
_ADAPTERS = 1e-4


def learning_rate(config: Config, parameters: int) -> float:
    """Peak learning rate of the run: `optim.lr`, or by method and size where that is `auto`.

    From scratch: Brown et al. 2020 (GPT-3), table 2.1 (125M 6e-4, 350M 3e-4, 1.3B 2e-4, 6.7B 1.2e-4), between its rows
    along straight lines of the logarithms, and on to 3e-3 at 10M parameters and below. With weights, all of them
    trained: 1e-5, as in Qwen's finetune_ds.sh. Adapters: 1e-4, as in the commands of bigcode-project/starcoder
    (finetune, rank 16 and alpha 32 as here) and ten times full fine-tuning, as Schulman et al. 2025 measured ("LoRA
    Without Regret").
    """
    if config.optim.lr != "auto":
        return config.optim.lr
    if config.model.lora is not None:
        return _ADAPTERS
    if config.model.path is not None or config.model.init_from is not None:
        return _FINE_TUNING
    return scratch_rate(parameters)


def scratch_rate(parameters: int) -> float:
    """The interpolated table of `learning_rate`, rounded to two digits."""
    if parameters <= _SCRATCH[0][0]:
        return _SCRATCH[0][1]
    if parameters >= _SCRATCH[-1][0]:
        return _SCRATCH[-1][1]
    above = bisect.bisect_left([size for size, _ in _SCRATCH], parameters)
    (small, high), (large, low) = list(itertools.pairwise(_SCRATCH))[above - 1]
    along = math.log(parameters / small) / math.log(large / small)
    return float(f"{high * (low / high) ** along:.1e}")


def warmup_steps(config: Config, steps: int | None) -> int | None:
    """Steps of warm-up; None where it is a share of a run whose length is not known."""
    warmup = config.optim.warmup
    return warmup if isinstance(warmup, int) else _share(warmup, steps)


def decay_steps(config: Config, steps: int | None) -> int | None:
    """Steps of the decay at the end: 0 except for `wsd`; None where the length of the run is not known."""
    return _share(config.optim.decay, steps) if config.optim.schedule == "wsd" else 0


def _share(share: float, steps: int | None) -> int | None:
    """A share of the run in whole steps, at least one unless the share is zero."""
    if share == 0.0:
        return 0
    return None if steps is None else max(1, round(share * steps))
