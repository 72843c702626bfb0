"""Closed-form estimate of device memory by part, at the moment of a step that needs the most.

Forward, backward, reduction and update hold different things: what stands side by side is added, and the largest sum is
the estimate. The rounding of allocators is not included; CUDA_RUNTIME_BYTES is apart, because it is for GPUs alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from llm_training_toolkit.config.schema import Offload
from llm_training_toolkit.families import AdapterSpec, ModelDims
from llm_training_toolkit.plan.memory.activations import (
    ActivationCheckpointing,
    AttentionMemory,
    PassShape,
    estimate_backward_bytes,
    estimate_final_norm_bytes,
    estimate_forward_bytes,
    estimate_kept_bytes,
)

# Bytes of a 4-bit weight with double-quantized constants of 0.127 bits (Dettmers et al. 2023, section 3).
_NF4_BYTES = 0.5 + 0.127 / 8
REDUCTION_CHUNK_SIZE = 2**26  # fp32 gradients that stage 0 copies into one buffer per reduction: 0.27 GB
_MAX_LIVE = 1_000_000_000  # DeepSpeed's default of stage3_max_live_parameters: gathered weights that are kept
_SUB_GROUP = 1_000_000_000  # DeepSpeed's default of sub_group_size: parameters that stage 3 updates at once

# Outside torch's allocator: a context with loaded kernels, workspaces of cuBLAS and buffers of NCCL. Assumptions within
# the 1 to 2 GB that trainers report beyond what their tensors take; not measured here.
CUDA_CONTEXT_BYTES = 600_000_000
CUDA_LIBRARY_BYTES = 900_000_000
CUDA_RUNTIME_BYTES = CUDA_CONTEXT_BYTES + CUDA_LIBRARY_BYTES


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device by part, at the moment that needs the most."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Return the sum of the parts."""
        return sum(vars(self).values())

    def to_gigabytes(self) -> dict[str, float]:
        """Return the parts in units of 10^9 bytes."""
        return {part: size / 1e9 for part, size in vars(self).items()}


@dataclass(frozen=True)
class DeviceWorkload:
    """Inputs of the memory estimate."""

    model: ModelDims
    zero: int
    precision: Literal["bf16", "fp32"]
    workers: int
    micro_batch: int
    sequence_length: int
    adapter: AdapterSpec | None = None
    """Adapters trained on a frozen model, or None if the model itself is trained."""
    checkpointing: ActivationCheckpointing = "none"
    loss_chunk: int = 0
    attention: AttentionMemory = "masked"
    bucket: int = 500_000_000
    """DeepSpeed's reduce_bucket_size, in elements."""
    gradient_width: int = 4
    """Bytes of a gradient on its way to the other workers (`engine.communication_data_type`)."""
    overlaps_gradients: bool = False
    """DeepSpeed's `overlap_comm`: stage 2 fills a second bucket while the first is reduced."""
    max_live: int = _MAX_LIVE
    """DeepSpeed's stage3_max_live_parameters."""
    offload: Offload = "none"
    sequence_parallel: int = 1
    """Workers that hold slices of the same sequences."""
    second_partition: int = 1
    """Workers that keep a second copy of all weights among them (`engine.zero_hpz_partition_size`); 1 = none."""

    @property
    def bytes_per_value(self) -> int:
        """Bytes of a number in the forward pass."""
        return 2 if self.precision == "bf16" else 4

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch that one worker holds."""
        return self.micro_batch * self.sequence_length // self.sequence_parallel

    @property
    def trainable_parameters(self) -> int:
        """Number of trained parameters."""
        return self.adapter.trainable_parameters if self.adapter else self.model.total_parameters

    @property
    def bucket_elements(self) -> int:
        """Gradients that pass to the other workers at once; a tensor larger than the bucket passes alone."""
        return min(self.trainable_parameters, max(self.bucket, self.model.largest_tensor))

    @property
    def head_gradient_bytes(self) -> int:
        """Bytes of the output layer's gradient; 0 beside a frozen one."""
        frozen = self.adapter is not None and "lm_head" not in self.adapter.modules_to_save
        return 0 if frozen else self.model.vocab * self.model.hidden * self.bytes_per_value

    def compute_partition_size(self, size: int, *, spread: bool) -> int:
        """Return a size, or one worker's share of it if `spread`."""
        return -(-size // self.workers) if spread else size

    def build_pass_shape(self) -> PassShape:
        """Return what activations depend on."""
        return PassShape(
            model=self.model,
            adapter=self.adapter,
            width=self.bytes_per_value,
            sequence_length=self.sequence_length,
            tokens=self.micro_batch_tokens,
            checkpointing=self.checkpointing,
            attention=self.attention,
            exchanges_tokens=self.sequence_parallel > 1,
        )


def estimate_memory(load: DeviceWorkload) -> MemoryEstimate:
    """Estimate the peak memory of one device within a step, in bytes."""
    standing = MemoryEstimate(
        weights=estimate_weight_bytes(load),
        gradients=estimate_gradient_bytes(load),
        optimizer=estimate_optimizer_bytes(load),
        activations=0,
        logits=0,
    )
    moments = [
        replace(
            standing,
            weights=standing.weights - released,
            gradients=standing.gradients + passing,
            activations=activations,
            logits=logits,
        )
        for passing, activations, logits, released in _iter_moments(load)
    ]
    return max(moments, key=lambda moment: moment.total)


def estimate_pass_bytes(load: DeviceWorkload) -> int:
    """Estimate the peak of forward and backward beside weights and gradients that stand, in bytes."""
    return max(activations + logits for activations, logits in _iter_pass_moments(load))


def _iter_moments(load: DeviceWorkload) -> Iterator[tuple[int, int, int, int]]:
    """Yield the bytes of a moment: more gradients, activations, logits, and gathered weights that are gone.

    The gradients are those beside what stands between micro-batches. When the first bucket of gradients is full, the
    activations and gathered weights of its layers are gone.
    """
    buffers = {2: 1 + load.overlaps_gradients, 3: 1}.get(load.zero, 0)
    buffer = buffers * load.bytes_per_value * load.bucket_elements
    # The bucket reduced last is kept until the next.
    last = load.gradient_width * load.bucket_elements if load.zero == 3 else 0
    for activations, logits in _iter_pass_moments(load):
        yield last + buffer, activations, logits, 0
    shape, left = load.build_pass_shape(), 1 - load.bucket_elements / max(load.trainable_parameters, 1)
    remaining = round(left * estimate_kept_bytes(shape)) + (estimate_backward_bytes(shape) if left else 0)
    gathered = _estimate_gathered_bytes(load)
    gone = max(gathered - round(left * load.bytes_per_value * load.model.total_parameters), 0)
    yield _estimate_reduction_bytes(load), remaining, 0, gone
    yield _estimate_update_bytes(load), 0, 0, gathered


def _iter_pass_moments(load: DeviceWorkload) -> Iterator[tuple[int, int]]:
    """Yield what a moment of forward and backward holds: (activations, logits), in bytes.

    The loss follows the last layer's forward pass, beside all activations. The backward pass starts with all of them,
    too, and with one layer's gradients; a tied output layer waits there for the embedding's gradient, which comes last.
    """
    shape, head = load.build_pass_shape(), load.head_gradient_bytes
    kept, dequantized = estimate_kept_bytes(shape), _estimate_dequantized_bytes(load)
    yield kept + estimate_final_norm_bytes(shape), estimate_logit_bytes(load)
    yield kept + estimate_forward_bytes(shape) + dequantized, 0
    yield kept + estimate_backward_bytes(shape) + dequantized, head if load.model.tied else 0
    yield 0, (2 if load.model.tied else 1) * head


def _estimate_dequantized_bytes(load: DeviceWorkload) -> int:
    """Return the bytes of the one 4-bit matrix that is in 16 bits while it multiplies."""
    if load.adapter is None or load.adapter.quantize is None:
        return 0
    model = load.model
    widest = model.linear_attention.widest_input if model.linear_attention is not None else 0
    return load.bytes_per_value * model.hidden * max(model.intermediate, model.query_width, model.shared_expert, widest)


def estimate_weight_bytes(load: DeviceWorkload) -> int:
    """Estimate the weights of the forward pass: 2 bytes in bf16, 4 in fp32, sharded at stage 3.

    Source: ZeRO (Rajbhandari et al. 2020), section 5. Stage 3 gathers whole layers for use and keeps up to
    `stage3_max_live_parameters` of them (DeepSpeed's documentation): all of a model below that number. The experts of a
    layer are gathered together, however many there are. Only the matrices of linear layers are in 4 bits; experts are
    not linear layers.
    """
    total = load.model.total_parameters + (load.adapter.trainable_parameters if load.adapter else 0)
    if load.adapter is not None and load.adapter.quantize is not None:
        matrices = load.model.linear_matrices
        return round(_NF4_BYTES * matrices) + load.bytes_per_value * (total - matrices)
    if load.zero < 3:
        return load.bytes_per_value * total
    partition = 0 if load.offload == "optimizer_and_weights" else load.compute_partition_size(total, spread=True)
    if load.second_partition > 1:
        partition += -(-total // load.second_partition)
    return load.bytes_per_value * partition + _estimate_gathered_bytes(load)


def _estimate_gathered_bytes(load: DeviceWorkload) -> int:
    """Estimate the weights that stage 3 has gathered for use; 0 at other stages."""
    if load.zero < 3:
        return 0
    total = load.model.total_parameters + (load.adapter.trainable_parameters if load.adapter else 0)
    return load.bytes_per_value * min(total, max(load.max_live, load.model.largest_module))


def estimate_gradient_bytes(load: DeviceWorkload) -> int:
    """Estimate the gradients that stand between micro-batches, in bytes.

    Stages 0 and 1 accumulate all gradients in fp32 (`engine/master_weights.py`, `engine/sharded_master_weights.py`),
    stages 2 and 3 only the partition, also in fp32, which with offload is in host memory.
    """
    if load.zero <= 1:
        return 4 * load.trainable_parameters
    if load.offload != "none":
        return 0
    return 4 * load.compute_partition_size(load.trainable_parameters, spread=True)


def _estimate_reduction_bytes(load: DeviceWorkload) -> int:
    """Estimate the copies of gradients on their way to the other workers, in bytes.

    Stage 0 reduces in place in a bf16 run, in fp32 by chunks; stage 1 reduces in place. Sent in bf16, both copy chunks.
    At stage 2 a bucket is flattened, and copied if it is sent in another type. Stage 3 keeps the bucket, such a copy
    and the concatenation by rank; what it gets in bf16 is copied to fp32. Counted on DeepSpeed 0.19.8
    (`allreduce_bucket` of runtime/zero/stage_1_and_2.py, `__avg_scatter_grads` of stage3.py) with one and two ranks on
    a CPU.
    """
    bf16, bucket = load.precision == "bf16", load.bucket_elements
    rounded = 0 if load.gradient_width == 4 else 2 * min(load.trainable_parameters, REDUCTION_CHUNK_SIZE)
    if load.zero <= 1 and load.workers == 1:
        return 0
    if load.zero == 0:
        chunk = max(REDUCTION_CHUNK_SIZE, load.model.largest_tensor)
        return rounded + (0 if bf16 else 4 * min(load.trainable_parameters, chunk))
    if load.zero == 1:
        return rounded + load.compute_partition_size(rounded, spread=True)
    copied = 0 if load.gradient_width == load.bytes_per_value else load.gradient_width
    if load.zero == 2:
        return ((2 + load.overlaps_gradients) * load.bytes_per_value + copied) * bucket
    partitions = 0 if load.gradient_width == 4 else 4 * load.compute_partition_size(bucket, spread=True)
    return (load.bytes_per_value + copied + load.gradient_width) * bucket + partitions


def _estimate_update_bytes(load: DeviceWorkload) -> int:
    """Estimate the copies of gradients for the optimizer beyond those that stand before it, in bytes.

    Stage 3 concatenates a sub-group, beside the bucket reduced last.
    """
    partition = load.compute_partition_size(load.trainable_parameters, spread=True)
    if load.zero == 3:
        return 4 * min(partition, _SUB_GROUP) + load.gradient_width * load.bucket_elements
    return 4 * partition if load.zero == 2 and load.precision == "fp32" else 0


def estimate_optimizer_bytes(load: DeviceWorkload) -> int:
    """Estimate Adam's two moments (8 bytes) and the fp32 weights it updates (4 bytes); sharded from stage 1 on.

    Only stages 0 and 1 in fp32 update the weights of the forward pass in place. With offload all of it is in host
    memory. Source: ZeRO (Rajbhandari et al. 2020), section 3.1, K = 12.
    """
    if load.offload != "none":
        return 0
    own_copy = load.precision == "bf16" or load.zero > 1
    return load.compute_partition_size((12 if own_copy else 8) * load.trainable_parameters, spread=load.zero > 0)


def estimate_logit_bytes(load: DeviceWorkload) -> int:
    """Estimate what the loss holds: logits of a chunk, the gradients of its input and of the output layer, in bytes.

    Logits are in fp32, replaced in place by their gradient, and in bf16 before and after: tokens x vocabulary x 6, or x
    4 in fp32. With several chunks the output layer's gradient follows them, by blocks of a quarter of a chunk's logits
    (models/loss.py).
    """
    tokens = min(load.loss_chunk or load.micro_batch_tokens, load.micro_batch_tokens)
    logits = load.model.vocab * tokens * (4 if load.precision == "fp32" else 6)
    inputs, head = load.micro_batch_tokens * load.model.hidden * load.bytes_per_value, load.head_gradient_bytes
    if tokens == load.micro_batch_tokens or not head:
        return inputs + head + logits
    return inputs + max(logits, head + logits // 4)


def read_deepspeed_limits(deepspeed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the DeepSpeed settings that memory depends on, by their names in `DeviceWorkload`."""
    zero = deepspeed["zero_optimization"]
    return {
        "bucket": _int_or_default(zero.get("reduce_bucket_size"), DeviceWorkload.bucket),
        "gradient_width": 2 if deepspeed["communication_data_type"] == "bf16" else 4,
        "overlaps_gradients": bool(zero.get("overlap_comm")),
        "max_live": _int_or_default(zero.get("stage3_max_live_parameters"), DeviceWorkload.max_live),
        "second_partition": _int_or_default(zero.get("zero_hpz_partition_size"), DeviceWorkload.second_partition),
    }


def _int_or_default(value: object, default: int) -> int:
    return int(value) if isinstance(value, (int, float)) else default
