"""Time of computing a token and a pass on a GPU, from published speeds of training. Pure.

Time of a token = FLOPs / (peak x utilisation), with 1 / utilisation = 1 / `_PRODUCTS` + c x (peak / bandwidth) / hidden
size. The first term is matrix products alone. The second is what kernels read and write of a layer between them, whose
bytes grow with the hidden size while products grow with its square; c depends on the kernels. Attention counts with
`_ATTENTION` of its FLOPs, because causal kernels skip half of them, at a lower speed. A pass takes at least the time
in which Python starts the kernels of its layers.

The constants were fitted to the speeds marked as such in
tests/unit/plan/forecast/test_utilisation.py, which also has the others and the errors. None was measured with this
toolkit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kernels = Literal["eager", "fused"]
Launches = Literal["plain", "sharded", "quantized"]

_PRODUCTS = 0.55  # of the peak
_BETWEEN_PRODUCTS: dict[Kernels, float] = {"eager": 11.0, "fused": 6.0}
_ATTENTION = 0.7
# Seconds of a layer's forward, recomputation and backward at least, by Qwen's profile of short sequences on an A100
# (QwenLM/Qwen README.md): LoRA 1.0 to 1.2 s for 8 passes of 24 and 32 layers; full, under ZeRO 3, 2.1 and 4.0 s; GPTQ
# weights 3.0 s for 32 layers. Plain ones without recomputation have three quarters of that.
_LAUNCH_SECONDS: dict[Launches, float] = {"plain": 0.005, "sharded": 0.0125, "quantized": 0.0117}

DEFAULT_FLOPS_PER_BYTE = 200.0  # of GPUs that are not in the table: between an A100 (153) and an H100 (295)
CPU_UTILISATION = 0.09  # `make quickstart` on two AVX2 cores (cluster/local.yaml)


@dataclass(frozen=True)
class ComputeWorkload:
    """Inputs of the computing time of one device."""

    product_flops: float
    """FLOPs of a token without attention, recomputation included."""
    attention_flops: float
    """FLOPs of a token's attention, recomputation included, not halved for the causal mask."""
    hidden: int
    layers: int
    pass_tokens: int
    """Tokens of a micro-batch."""
    launches: Launches = "plain"
    recomputes: bool = False
    kernels: Kernels = "eager"


def estimate_utilisation(hidden: int, flops_per_byte: float, kernels: Kernels = "eager") -> float:
    """Estimate the share of the peak that training reaches; `flops_per_byte` = peak / memory bandwidth."""
    return 1 / (1 / _PRODUCTS + _BETWEEN_PRODUCTS[kernels] * flops_per_byte / hidden)


def estimate_pass_seconds(load: ComputeWorkload, peak_flops: float, flops_per_byte: float) -> float:
    """Estimate the seconds of a micro-batch's forward and backward pass on one GPU."""
    flops = load.product_flops + _ATTENTION * load.attention_flops
    computing = (
        load.pass_tokens * flops / (peak_flops * estimate_utilisation(load.hidden, flops_per_byte, load.kernels))
    )
    if load.kernels == "fused":
        return computing
    launching = load.layers * _LAUNCH_SECONDS[load.launches] * (1 if load.recomputes else 0.75)
    return max(computing, launching)
