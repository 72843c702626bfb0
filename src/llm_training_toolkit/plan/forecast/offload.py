"""Time that an offload to host memory adds to a step. Pure."""

from __future__ import annotations

from llm_training_toolkit.config.schema import Offload

# Seconds per trained weight that a node adds: gradients to the host, Adam there, weights back. Measured by others with
# LLaMA-7B (6.74e9 weights) on 8 A800 with two Intel 8358, DeepSpeed 0.14.2, ZeRO 3, read as 64 sequences a step: 4.45
# sequences/s without and 2.05 with `offload_optimizer`; 2.06 with `offload_param` too, so weights there add nothing.
# Source: gist.github.com/chenyaofo/d4cd6a20ab4b95cb3a49491747e2139a. Other hosts differ by their memory bandwidth.
_HOST_SECONDS_PER_WEIGHT = (64 / 2.05 - 64 / 4.45) / 6.74e9


def estimate_host_seconds(offload: Offload, trained_parameters: int, nodes: int) -> float:
    """Estimate the seconds that a step waits for the update in host memory, which the nodes share evenly."""
    return 0.0 if offload == "none" else _HOST_SECONDS_PER_WEIGHT * trained_parameters / nodes
