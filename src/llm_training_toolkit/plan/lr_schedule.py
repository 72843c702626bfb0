"""Learning rate schedule: a pure function of the step."""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass
from typing import Literal

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.errors import PlanError

ScheduleKind = Literal["constant", "linear", "cosine", "wsd"]
_SCRATCH_LR_TABLE = ((10e6, 3e-3), (125e6, 6e-4), (350e6, 3e-4), (1.3e9, 2e-4), (6.7e9, 1.2e-4))
_FINE_TUNING = 1e-5
_ADAPTERS = 1e-4


@dataclass(frozen=True)
class LRSchedule:
    """Linear warm-up to the peak, then one of four shapes. Rates are absolute; `step` counts completed steps."""

    kind: ScheduleKind
    peak: float
    """Peak learning rate, reached by the last update of the warm-up."""
    steps: int
    """Length of the run."""
    warmup_steps: int
    decay_steps: int
    """Length of the final decay of `wsd`; the other shapes ignore it."""
    floor: float
    """Learning rate of the last update; `constant` ignores it."""

    def __post_init__(self) -> None:
        decay = self.decay_steps if self.kind == "wsd" else 0
        if self.steps < 1 or self.warmup_steps < 0 or decay < 0 or self.warmup_steps + decay > self.steps:
            raise PlanError(
                f"optim: warm-up of {self.warmup_steps} steps and decay of {decay} do not fit into {self.steps} steps"
            )

    def compute_lr(self, step: int) -> float:
        """Return the learning rate of the update that completes step `step + 1`.

        The first update has peak / warm-up steps instead of zero, the last one the floor. After the end of the run the
        last rate stays.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        progress = self._compute_decay_progress(step)
        if self.kind == "cosine":
            progress = (1.0 - math.cos(math.pi * progress)) / 2.0
        return self.peak * (1.0 - progress) + self.floor * progress

    def _compute_decay_progress(self, step: int) -> float:
        """Return the progress of an update from peak (0) to floor (1); 1 from the last update on."""
        last_at_peak = max(self.warmup_steps - 1, 0)
        if self.kind == "wsd":
            last_at_peak = self.steps - self.decay_steps - 1
        falling = self.steps - 1 - last_at_peak
        return min(max(step - last_at_peak, 0) / falling, 1.0) if falling > 0 else 0.0


def choose_learning_rate(config: Config, parameters: int) -> float:
    """Return the peak learning rate: `optim.lr`, or by method and size if that is `auto`.

    From scratch: Brown et al. 2020 (GPT-3), table 2.1 (125M 6e-4, 350M 3e-4, 1.3B 2e-4, 6.7B 1.2e-4). Values between
    its rows are interpolated in log-log space, on to 3e-3 at 10M parameters and below. Full fine-tuning: 1e-5, as in
    Qwen's finetune_ds.sh. Adapters: 1e-4, as in the commands of bigcode-project/starcoder (finetune, rank 16 and alpha
    32 as here). Schulman et al. 2025 ("LoRA Without Regret") also measured ten times the rate of full fine-tuning.
    """
    if config.optim.lr != "auto":
        return config.optim.lr
    if config.model.lora is not None:
        return _ADAPTERS
    if config.model.path is not None or config.model.init_from is not None:
        return _FINE_TUNING
    return compute_scratch_lr(parameters)


def compute_scratch_lr(parameters: int) -> float:
    """Return the interpolated table of `choose_learning_rate`, rounded to two digits."""
    if parameters <= _SCRATCH_LR_TABLE[0][0]:
        return _SCRATCH_LR_TABLE[0][1]
    if parameters >= _SCRATCH_LR_TABLE[-1][0]:
        return _SCRATCH_LR_TABLE[-1][1]
    above = bisect.bisect_left([size for size, _ in _SCRATCH_LR_TABLE], parameters)
    (small, high), (large, low) = list(itertools.pairwise(_SCRATCH_LR_TABLE))[above - 1]
    along = math.log(parameters / small) / math.log(large / small)
    return float(f"{high * (low / high) ** along:.1e}")


def compute_warmup_steps(config: Config, steps: int | None) -> int | None:
    """Return the warm-up steps; for a share of a run of unknown length None."""
    warmup = config.optim.warmup
    return warmup if isinstance(warmup, int) else _convert_share_to_steps(warmup, steps)


def compute_decay_steps(config: Config, steps: int | None) -> int | None:
    """Return the steps of the final decay: 0 except for `wsd`; for a run of unknown length None."""
    return _convert_share_to_steps(config.optim.decay, steps) if config.optim.lr_scheduler == "wsd" else 0


def _convert_share_to_steps(share: float, steps: int | None) -> int | None:
    """Convert a share of the run to whole steps, at least one unless the share is zero."""
    if share == 0.0:
        return 0
    return None if steps is None else max(1, round(share * steps))
