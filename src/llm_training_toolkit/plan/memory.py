"""Closed-form estimate of device memory by part. Overhead of allocators and kernels is not included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llm_training_toolkit.families import AdapterSpec, ModelDims

# Bytes of a 4-bit weight with double-quantized constants of 0.127 bits (Dettmers et al. 2023, section 3).
_NF4_BYTES = 0.5 + 0.127 / 8
REDUCTION_CHUNK_SIZE = 2**26  # fp32 gradients that stage 0 copies into one buffer per reduction: 0.27 GB
_MAX_LIVE = 1_000_000_000  # DeepSpeed's default of stage3_max_live_parameters: gathered weights that are kept


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

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
    activation_checkpointing: bool = False
    loss_chunk: int = 0
    eager_attention: bool = False
    bucket: int = 500_000_000
    """DeepSpeed's reduce_bucket_size, in elements."""
    max_live: int = _MAX_LIVE
    """DeepSpeed's stage3_max_live_parameters."""

    @property
    def bytes_per_value(self) -> int:
        """Bytes of a number in the forward pass."""
        return 2 if self.precision == "bf16" else 4

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens per micro-batch."""
        return self.micro_batch * self.sequence_length

    @property
    def trainable_parameters(self) -> int:
        """Number of trained parameters."""
        return self.adapter.trainable_parameters if self.adapter else self.model.total_parameters

    def compute_partition_size(self, size: int, *, spread: bool) -> int:
        """Return a size, or one worker's share of it if `spread`."""
        return -(-size // self.workers) if spread else size


def estimate_memory(load: DeviceWorkload) -> MemoryEstimate:
    """Estimate the peak memory of one device within a step, in bytes."""
    return MemoryEstimate(
        weights=estimate_weight_bytes(load),
        gradients=estimate_gradient_bytes(load),
        optimizer=estimate_optimizer_bytes(load),
        activations=estimate_activation_bytes(load),
        logits=estimate_logit_bytes(load),
    )


def estimate_weight_bytes(load: DeviceWorkload) -> int:
    """Estimate the weights of the forward pass: 2 bytes in bf16, 4 in fp32, sharded at stage 3.

    Source: ZeRO (Rajbhandari et al. 2020), section 5. Stage 3 gathers whole layers for use and keeps up to
    `stage3_max_live_parameters` of them (DeepSpeed's documentation): all of a model below that number. The experts of a
    layer are gathered together, however many there are. Only the matrices of linear layers are in 4 bits; experts are
    not linear layers.
    """
    total = load.model.total_parameters + (load.adapter.trainable_parameters if load.adapter else 0)
    if load.adapter is not None and load.adapter.quantize is not None:
        matrices = load.model.layers * load.model.linear_matrices
        return round(_NF4_BYTES * matrices) + load.bytes_per_value * (total - matrices)
    if load.zero < 3 or load.workers == 1:
        return load.bytes_per_value * total
    return load.bytes_per_value * (
        load.compute_partition_size(total, spread=True) + min(total, max(load.max_live, load.model.largest_module))
    )


def estimate_gradient_bytes(load: DeviceWorkload) -> int:
    """Estimate accumulated gradients, their copy for the optimizer and the reduction bucket, in bytes.

    Stage 0 accumulates all gradients in fp32 (`engine/replica.py`). In bf16 the largest gradient that backward has just
    produced is added, in fp32 a chunk that is being reduced. Stage 1 accumulates all in the precision of the forward
    pass, and the step needs an fp32 copy of the partition. Stages 2 and 3 accumulate only the partition, in fp32. From
    stage 1 on gradients pass through a bucket, which in bf16 is also copied to fp32 for the reduction. A tensor larger
    than the bucket (an embedding, the fused experts of a layer) passes alone. Source: DeepSpeed 0.19.8,
    runtime/zero/stage_1_and_2.py and stage3.py.
    """
    total = load.trainable_parameters
    if load.zero == 0:
        reduced = 4 * min(total, max(REDUCTION_CHUNK_SIZE, load.model.largest_tensor)) if load.workers > 1 else 0
        made = 2 * min(total, load.model.largest_tensor)
        return 4 * total + (made if load.precision == "bf16" else reduced)
    bucket = min(total, max(load.bucket, load.model.largest_tensor)) * (2 + 4 if load.precision == "bf16" else 4)
    partition = 4 * load.compute_partition_size(total, spread=True)
    return partition + bucket + (load.bytes_per_value * total if load.zero == 1 else 0)


def estimate_optimizer_bytes(load: DeviceWorkload) -> int:
    """Estimate Adam's two moments (8 bytes) and the fp32 weights it updates (4 bytes); sharded from stage 1 on.

    Only stage 0 in fp32 updates the weights of the forward pass in place. Source: ZeRO (Rajbhandari et al. 2020),
    section 3.1, K = 12.
    """
    own_copy = load.precision == "bf16" or load.zero > 0
    return load.compute_partition_size((12 if own_copy else 8) * load.trainable_parameters, spread=load.zero > 0)


def compute_checkpoint_copy_bytes(parameters: int, workers: int) -> int:
    """Return the bytes of host memory that a worker's copy takes while a checkpoint is written.

    Trained parameters have 12 bytes each, fp32 weights and Adam's two moments. The workers save equal shares at every
    stage.
    """
    return -(-12 * parameters // workers)


def estimate_activation_bytes(load: DeviceWorkload) -> int:
    """Estimate activations kept for the backward pass, and the gradients of one layer at a time, in bytes.

    With checkpointing a layer keeps only its input, and one layer at a time keeps everything.
    """
    model, layer = load.model, estimate_layer_bytes_per_token(load)
    kept = model.layers * (model.hidden * load.bytes_per_value if load.activation_checkpointing else layer)
    borrowed = layer * (2 if load.activation_checkpointing else 1)
    return load.micro_batch_tokens * (kept + borrowed)


def estimate_layer_bytes_per_token(load: DeviceWorkload) -> int:
    """Estimate what autograd keeps of one layer per token for the models of transformers 5 (w = `bytes_per_value`).

    Two norms: a LayerNorm keeps input and output, 2 h w; an RMSNorm fp32 input, normalized value and output, h (2 w +
    4). Norms of queries and keys keep the same but the output. Attention: queries, keys, values and output; keys and
    values are repeated for every query head unless there is only one key-value head. Packed documents need a mask, T w.
    Eager attention keeps scores as probabilities instead, in fp32 and again in bf16.
    tests/unit/models/test_activations.py compares the estimate with autograd.
    """
    model, w = load.model, load.bytes_per_value
    if load.adapter is not None:
        return _estimate_frozen_layer_bytes(load, load.adapter)
    norms = 2 * model.hidden * (2 * w + (4 if model.rms_norms else 0))
    if model.head_norms:
        norms += (model.query_width + model.kv_width) * (4 + w)
    attention = w * _count_attention_values(model)
    return (
        norms
        + attention
        + _estimate_feed_forward_bytes(model, w, trained=True)
        + load.sequence_length * _get_mask_bytes(load)
    )


def _estimate_feed_forward_bytes(model: ModelDims, w: int, *, trained: bool) -> int:
    """Estimate the feed-forward layer per token: 4 i w gated (gate, activation, up, product), or 2 i w.

    A frozen layer does not keep its product. An expert also keeps its output before weighting and, if trained, a copy
    of its input, h w each. Routing a token there and back keeps four indices of 8 bytes and a probability, in 4 bytes
    and in w. The router keeps its softmax in fp32.
    """
    one = w * ((4 if model.gated else 2) - (not trained)) * model.intermediate
    if not model.experts:
        return one
    return model.experts_per_token * (one + (1 + trained) * w * model.hidden + 36 + w) + 4 * model.experts


def _count_attention_values(model: ModelDims) -> int:
    """Return queries, keys, values and output per token; a single key-value head is not repeated per query head."""
    return 2 * model.query_width + 2 * (model.kv_width if model.kv_heads == 1 else model.query_width)


def _estimate_frozen_layer_bytes(load: DeviceWorkload, adapter: AdapterSpec) -> int:
    """Estimate what one frozen layer and its adapters keep per token.

    Without weight gradients a linear layer keeps no input, and an RMSNorm no normalized value. Adapters that read the
    same input keep it once; each keeps the output of its first matrix. With dropout each keeps its own input and the
    mask. DoRA keeps the outputs of layer and adapter.
    """
    model, w = load.model, load.bytes_per_value
    norms = 2 * model.hidden * (4 if model.rms_norms else w)
    if model.head_norms:
        norms += (model.query_width + model.kv_width) * 4
    attention = w * _count_attention_values(model)
    feed_forward = _estimate_feed_forward_bytes(model, w, trained=False)
    if adapter.dropout:
        inputs = sum((w + 1) * layer.inputs for layer in adapter.layers)
    else:
        # Attention already keeps the output of the heads.
        inputs = w * sum({layer.reads: layer.inputs for layer in adapter.layers if layer.reads != "heads"}.values())
    inner = w * adapter.rank * len(adapter.layers)
    results = 2 * w * sum(layer.outputs for layer in adapter.layers) if adapter.dora else 0
    return norms + attention + feed_forward + inputs + inner + results + load.sequence_length * _get_mask_bytes(load)


def _get_mask_bytes(load: DeviceWorkload) -> int:
    """Return the bytes kept per pair of tokens."""
    if load.eager_attention:
        return load.model.heads * (4 if load.precision == "fp32" else 6)
    return load.bytes_per_value


def estimate_logit_bytes(load: DeviceWorkload) -> int:
    """Estimate one chunk of the loss and the output layer's gradient, in bytes.

    Logits are in fp32, replaced in place by their gradient, and in bf16 before and after: tokens x vocabulary x 6, or x
    4 in fp32. The gradient of the head, vocabulary x hidden, is added unless the head is frozen.
    """
    tokens = min(load.loss_chunk or load.micro_batch_tokens, load.micro_batch_tokens)
    logit = 4 if load.precision == "fp32" else 6
    frozen = load.adapter is not None and "lm_head" not in load.adapter.modules_to_save
    return load.model.vocab * (tokens * logit + (0 if frozen else load.model.hidden * load.bytes_per_value))


def read_deepspeed_limits(deepspeed: Mapping[str, Any]) -> dict[str, int]:
    """Return the two DeepSpeed settings that memory depends on, by their names in `DeviceWorkload`."""
    zero = deepspeed["zero_optimization"]
    return {
        "bucket": _int_or_default(zero.get("reduce_bucket_size"), DeviceWorkload.bucket),
        "max_live": _int_or_default(zero.get("stage3_max_live_parameters"), DeviceWorkload.max_live),
    }


def _int_or_default(value: object, default: int) -> int:
    return int(value) if isinstance(value, (int, float)) else default
