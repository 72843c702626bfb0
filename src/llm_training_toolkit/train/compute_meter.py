"""Speed of the steps in FLOP/s, and as a share of the device's published peak (MFU)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llm_training_toolkit.families import TrainingFlops, resolve_training_flops
from llm_training_toolkit.plan import Plan, find_device_peak


@dataclass(frozen=True)
class ComputeMeter:
    """Meter of the FLOPs that a step needs, whatever a rank computes twice or for padding micro-batches.

    MFU (model FLOPs utilization) is defined so in PaLM (Chowdhery et al. 2022), appendix B.
    """

    flops: TrainingFlops
    peak_flops: float | None
    """Published FLOP/s of rank 0's device in the run's precision, or None without such a number."""

    def compute_metrics(
        self, *, tokens: int, loss_tokens: int, attended_tokens: float, device_seconds: float
    ) -> dict[str, float]:
        """Return the metrics of a step that took all devices together `device_seconds`."""
        speed = self.flops.count_step_flops(tokens, loss_tokens, int(attended_tokens)) / device_seconds
        metrics = {"perf/tflops": speed / 1e12}
        return metrics if self.peak_flops is None else metrics | {"perf/mfu": speed / self.peak_flops}


def build_compute_meter(plan: Plan, device: torch.device) -> ComputeMeter:
    """Return the meter of a plan on a device."""
    peak = find_device_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return ComputeMeter(
        resolve_training_flops(plan.hf_config, plan.adapter),
        None if peak is None else peak.get_flops(plan.precision),
    )
