"""Speed in FLOP/s and as a share of the peak, from what a step needs."""

from __future__ import annotations

import pytest

from llm_training_toolkit.families import TrainingFlops
from llm_training_toolkit.train.compute_meter import ComputeMeter

FLOPS = TrainingFlops(per_token=1000, per_loss_token=100, per_attended_token=10, window=None)
STEP = {"tokens": 8_000_000, "loss_tokens": 2_000_000, "attended_tokens": 3e9, "device_seconds": 4.0}


def test_the_speed_counts_tokens_loss_tokens_and_attended_tokens() -> None:
    speed = (8e9 + 2e8 + 3e10) / 4.0
    assert ComputeMeter(FLOPS, None).compute_metrics(**STEP) == {"perf/tflops": speed / 1e12}  # type: ignore[arg-type]


def test_mfu_is_the_share_of_the_peak() -> None:
    metrics = ComputeMeter(FLOPS, 989e12).compute_metrics(**STEP)  # type: ignore[arg-type]
    assert metrics["perf/mfu"] == pytest.approx(metrics["perf/tflops"] / 989)
