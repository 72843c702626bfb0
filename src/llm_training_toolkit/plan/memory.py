"""How much memory a device needs, by part, in closed form. An estimate: allocators and kernels add their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llm_training_toolkit.families import AdapterSpec, ModelDims

_NF4_BYTES = 0.5 + 0.127 / 8
"""Of a weight in 4 bits, with constants that are quantized once more: 0.127 bits (Dettmers et al. 2023, section 3)."""
REDUCTION_CHUNK_SIZE = 2**26
"""fp32 gradients that stage 0 copies into one piece for a reduction: 0.27 GB."""
_MAX_LIVE = 1_000_000_000
"""DeepSpeed's default of stage3_max_live_parameters: gathered weights are kept up to this number."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    def to_gigabytes(self) -> dict[str, float]:
        """The parts in units of 10^9 bytes."""
        return {part: size / 1e9 for part, size in vars(self).items()}


@dataclass(frozen=True)
class DeviceWorkload:
    """What the memory of a device follows from."""

    model: ModelDims
    zero: int
    precision: Literal["bf16", "fp32"]
    workers: int
    micro_batch: int
    sequence_length: int
    adapter: AdapterSpec | None = None
    """What is trained beside a frozen model; None: the model itself."""
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
        """Tokens of a micro-batch."""
        return self.micro_batch * self.sequence_length

    @property
    def trainable_parameters(self) -> int:
        """Trained parameters."""
        return self.adapter.trainable_parameters if self.adapter else self.model.total_parameters

    def compute_partition_size(self, size: int, *, spread: bool) -> int:
        """A size, or the share of it that one worker holds."""
        return -(-size // self.workers) if spread else size


def estimate_memory(load: DeviceWorkload) -> MemoryEstimate:
    """Memory of one device at its peak within a step, in bytes."""
    return MemoryEstimate(
        weights=estimate_weight_bytes(load),
        gradients=estimate_gradient_bytes(load),
        optimizer=estimate_optimizer_bytes(load),
        activations=estimate_activation_bytes(load),
        logits=estimate_logit_bytes(load),
    )


def estimate_weight_bytes(load: DeviceWorkload) -> int:
    """The weights of the forward pass: 2 bytes in bf16, 4 in fp32; stage 3 spreads them (ZeRO, Rajbhandari 2020, 5).

    Stage 3 gathers whole layers for use and keeps up to `stage3_max_live_parameters` of them (DeepSpeed's
    documentation), which for a model below that number is all of it. The experts of a layer are gathered together,
    however many they are. In 4 bits are the linear layers' matrices alone, of which experts are none.
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
    """Gradients as accumulated, the copy for the optimizer, and the bucket of the reduction, in bytes.

    Stage 0 accumulates whole in fp32 (`engine/replica.py`): in bf16 beside the largest gradient that backward has just
    made, in fp32 beside a piece that is being reduced. Stage 1 accumulates whole in the precision of the forward pass,
    and the step needs an fp32 copy of the partition. Stages 2 and 3 accumulate in fp32 on the partition alone. From
    stage 1 on gradients pass through a bucket, which in bf16 is also copied to fp32 for the reduction; a tensor larger
    than the bucket (an embedding, the fused experts of a layer) passes alone. Read in DeepSpeed 0.19.8,
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
    """Adam's two moments, 8 bytes, and 4 for the fp32 weights it updates; spread from stage 1 on.

    Only stage 0 in fp32 updates the weights of the forward pass themselves. Source: ZeRO (Rajbhandari et al. 2020),
    section 3.1, K = 12.
    """
    own_copy = load.precision == "bf16" or load.zero > 0
    return load.compute_partition_size((12 if own_copy else 8) * load.trainable_parameters, spread=load.zero > 0)


def compute_checkpoint_copy_bytes(parameters: int, workers: int) -> int:
    """Bytes of the machine's memory that a worker's copy takes while a checkpoint is written: its part of 12 a weight.

    The fp32 weights and Adam's two moments of what is trained, which the workers save in equal parts at every stage.
    """
    return -(-12 * parameters // workers)


def estimate_activation_bytes(load: DeviceWorkload) -> int:
    """What the forward pass keeps for the backward pass, and the gradients of one layer at a time, in bytes.

    With checkpointing a layer keeps its input, and one layer at a time is whole.
    """
    model, layer = load.model, estimate_layer_bytes_per_token(load)
    kept = model.layers * (model.hidden * load.bytes_per_value if load.activation_checkpointing else layer)
    borrowed = layer * (2 if load.activation_checkpointing else 1)
    return load.micro_batch_tokens * (kept + borrowed)


def estimate_layer_bytes_per_token(load: DeviceWorkload) -> int:
    """What one layer keeps of a token, as autograd keeps it for the models of transformers 5 (w = `load.width`).

    Two norms: their inputs and outputs, 4 h w; an RMSNorm also keeps its input in fp32 and what it has normalised,
    2 h 4. The same for the norms of queries and keys. Attention: queries, keys, values and its output, keys and
    values repeated for every query head unless there is but one of them. Packed documents need a mask, T w; eager
    attention keeps scores as probabilities instead, in fp32 and once more in bf16. tests/models/test_activations.py
    compares it with what autograd keeps.
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
    """Feed-forward: 4 i w gated (gate, activation, up, product), or 2 i w; a frozen one not its product.

    An expert also keeps its output before it is weighed and, if it is trained, the copy of its input, h w each, and the
    way of a token to it and back (four indices of 8 bytes, a probability of 4 and of w). The router keeps its softmax
    in fp32.
    """
    one = w * ((4 if model.gated else 2) - (not trained)) * model.intermediate
    if not model.experts:
        return one
    return model.experts_per_token * (one + (1 + trained) * w * model.hidden + 36 + w) + 4 * model.experts


def _count_attention_values(model: ModelDims) -> int:
    """Queries, keys, values and output of a token; keys and values repeated for every query head, unless of one."""
    return 2 * model.query_width + 2 * (model.kv_width if model.kv_heads == 1 else model.query_width)


def _estimate_frozen_layer_bytes(load: DeviceWorkload, adapter: AdapterSpec) -> int:
    """What one frozen layer and its adapters keep of a token.

    Without gradients of its weights a linear layer keeps no input and an RMSNorm not what it has normalised. An adapter
    keeps its input, one for all that read the same, and what its first matrix gives; with dropout each keeps an input
    of its own and which of it was left out. DoRA keeps what the layer gives and what the adapter gives.
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
        # What the heads give is kept by attention already.
        inputs = w * sum({layer.reads: layer.inputs for layer in adapter.layers if layer.reads != "heads"}.values())
    inner = w * adapter.rank * len(adapter.layers)
    results = 2 * w * sum(layer.outputs for layer in adapter.layers) if adapter.dora else 0
    return norms + attention + feed_forward + inputs + inner + results + load.sequence_length * _get_mask_bytes(load)


def _get_mask_bytes(load: DeviceWorkload) -> int:
    """Bytes kept for each pair of tokens."""
    if load.eager_attention:
        return load.model.heads * (4 if load.precision == "fp32" else 6)
    return load.bytes_per_value


def estimate_logit_bytes(load: DeviceWorkload) -> int:
    """One chunk of the loss and the output layer's gradient, in bytes.

    Logits in fp32, which become their gradient in place, and in bf16 before and after that: tokens x vocabulary x 6,
    or x 4 in fp32. Beside them the gradient of the head, vocabulary x hidden, unless it is frozen.
    """
    tokens = min(load.loss_chunk or load.micro_batch_tokens, load.micro_batch_tokens)
    logit = 4 if load.precision == "fp32" else 6
    frozen = load.adapter is not None and "lm_head" not in load.adapter.modules_to_save
    return load.model.vocab * (tokens * logit + (0 if frozen else load.model.hidden * load.bytes_per_value))


def read_deepspeed_limits(deepspeed: Mapping[str, Any]) -> dict[str, int]:
    """The two numbers of a DeepSpeed configuration that memory depends on, by the names of `Load`."""
    zero = deepspeed["zero_optimization"]
    return {
        "bucket": _int_or_default(zero.get("reduce_bucket_size"), DeviceWorkload.bucket),
        "max_live": _int_or_default(zero.get("stage3_max_live_parameters"), DeviceWorkload.max_live),
    }


def _int_or_default(value: object, default: int) -> int:
    return int(value) if isinstance(value, (int, float)) else default
