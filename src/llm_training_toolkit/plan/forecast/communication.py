"""Bytes that a worker sends in a step: gradients and weights by ZeRO stage, and tokens of rows that ranks share. Pure.

Compared with the collectives of the real engine by tests/ranks/test_step_bytes.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llm_training_toolkit.families import ModelDims
from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing

_MAX_REUSE_DISTANCE = 1_000_000_000  # DeepSpeed's default of stage3_max_reuse_distance, in parameters


@dataclass(frozen=True)
class Exchange:
    """Bytes that a ring sends in a step, without its factor (n - 1) / n."""

    overlapped: int
    """Sent while the device computes: weights that stage 3 gathers ahead, and gradients with `overlap_comm`."""
    exposed: int
    """Sent while the device waits."""
    grouped: int = 0
    """Weights that stage 3 gathers ahead within groups of `zero_hpz_partition_size` workers."""

    @property
    def total(self) -> int:
        """Return all bytes of a step."""
        return self.overlapped + self.exposed + self.grouped


@dataclass(frozen=True)
class ExchangeWorkload:
    """Inputs of the exchange of a step."""

    zero: int
    trained: int
    """Trained parameters."""
    parameters: int
    """All parameters of the forward pass."""
    width: int
    """Bytes of a weight in the forward pass."""
    passes: int
    """Micro-batches of a step."""
    checkpointing: ActivationCheckpointing = "none"
    reuse_distance: int = _MAX_REUSE_DISTANCE
    second_partition: int = 1
    """Workers of a group that keeps a second copy of all weights; 1 = no groups."""
    overlaps_gradients: bool = False
    """DeepSpeed's `overlap_comm`; stages 0 and 1 reduce after the last micro-batch in any case."""
    gradient_width: int = 4
    """Bytes of a gradient on its way (`engine.communication_data_type`)."""


def count_exchanged_bytes(load: ExchangeWorkload) -> Exchange:
    """Count what a worker sends in a step; an all-reduce sends its tensor twice.

    Gradients are reduced in fp32 or bf16: at stage 0 by an all-reduce a step, at stage 1 by a reduce-scatter a step.
    DeepSpeed 0.19.8 sends an all-reduce with every micro-batch at stage 2, a reduce-scatter at stage 3. Stages 1 and 2
    gather the trained weights once a step. Stage 3 gathers all weights for forward and for backward of every
    micro-batch, except those of the last layers, which it keeps (ZeRO, Rajbhandari et al. 2020, section 7). With a
    second partition all but the first gathering after an update stay within its group (ZeRO++, Wang et al. 2023,
    section 4.2).
    """
    gradients, weights = load.gradient_width * load.trained, load.width * load.trained
    if load.zero <= 1:
        return Exchange(0, 2 * gradients if load.zero == 0 else gradients + weights)
    gathered = grouped = 0
    if load.zero == 3:
        gathered = load.passes * load.width * (2 * load.parameters - _count_kept_weights(load))
        if load.second_partition > 1:
            gathered, grouped = load.width * load.parameters, gathered - load.width * load.parameters
    reduced = load.passes * gradients * (2 if load.zero == 2 else 1)
    after = weights if load.zero == 2 else 0
    if load.overlaps_gradients:
        return Exchange(gathered + reduced, after, grouped)
    return Exchange(gathered, reduced + after, grouped)


def count_token_bytes(
    model: ModelDims, width: int, tokens: int, passes: int, checkpointing: ActivationCheckpointing
) -> int:
    """Count what a worker sends in a step where ranks share rows, without the factor (n - 1) / n of n such ranks.

    `tokens` are its own of a micro-batch. Every layer exchanges queries, keys and values before attention and the
    output behind it, their gradients in the backward pass, and both again where layers are recomputed.
    """
    each = width * model.layers * 2 * (model.query_width + model.kv_width)
    return passes * tokens * each * (2 if checkpointing == "none" else 3)


def count_summed_bytes(
    model: ModelDims, width: int, tokens: int, passes: int, checkpointing: ActivationCheckpointing
) -> int:
    """Count what a worker sends in a step to sum outputs of cut matrices, without (n - 1) / n of n such ranks.

    Every layer has two all-reduces forward and two backward, each of twice the hidden state in a ring. Recomputation
    repeats the one behind attention; it ends before a layer's last product.
    """
    each = 2 * width * model.layers * model.hidden
    return passes * tokens * each * (4 if checkpointing == "none" else 5)


def _count_kept_weights(load: ExchangeWorkload) -> int:
    """Return the weights that stage 3 keeps from the forward pass for the backward pass.

    It keeps those that the recorded order of modules uses again within `stage3_max_reuse_distance` parameters
    (`__params_to_release` of runtime/zero/partitioned_param_coordinator.py). Between the two uses of a layer lie all
    layers after it twice, and with checkpoints, which run forward again, three times.
    """
    return min(load.parameters, load.reuse_distance // (2 if load.checkpointing == "none" else 3))


def read_reuse_distance(deepspeed: Mapping[str, Any]) -> int:
    """Return `stage3_max_reuse_distance` of a DeepSpeed configuration."""
    value = deepspeed["zero_optimization"].get("stage3_max_reuse_distance")
    return int(value) if isinstance(value, (int, float)) else _MAX_REUSE_DISTANCE


def collect_communication_notes(sending: float, computing: float, zero: int) -> Iterator[str]:
    """Warn if communication takes longer than computation."""
    if sending > computing:
        less = "Larger micro-batches, engine.zero_stage 1 or fewer" if zero >= 2 else "Fewer"
        yield (
            f"Sending gradients and weights takes longer than computing ({sending:.3g} and {computing:.3g} s a step). "
            f"{less} nodes send less."
        )
