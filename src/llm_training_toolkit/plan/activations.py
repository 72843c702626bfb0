"""Bytes that forward and backward take per token of a micro-batch, by kind of checkpointing and attention. Pure.

w = bytes of a number in the forward pass, h = hidden size, i = width of the feed-forward layer, T = tokens. Compared
with autograd by tests/unit/models/test_activations.py, with passes by tests/unit/models/test_dry_run.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from llm_training_toolkit.families import AdapterSpec, ModelDims
from llm_training_toolkit.families.lora import Reads

ActivationCheckpointing = Literal["none", "selective", "full"]
AttentionMemory = Literal["varlen", "masked", "eager"]


@dataclass(frozen=True)
class PassShape:
    """Model, batch and options that the memory of a forward and backward pass depends on."""

    model: ModelDims
    adapter: AdapterSpec | None
    """Adapters trained on a frozen model, or None if the model itself is trained."""
    width: int
    """Bytes of a number in the forward pass: 2 in bf16, 4 in fp32."""
    sequence_length: int
    tokens: int
    """Tokens of a micro-batch."""
    checkpointing: ActivationCheckpointing
    attention: AttentionMemory
    """`varlen` keeps neither masks nor repeated keys, `masked` both, `eager` all probabilities."""


def get_attention_memory(implementation: str) -> AttentionMemory:
    """Return what an implementation of attention keeps; flash, flex and varlen kernels need no mask of T x T."""
    return "eager" if implementation == "eager" else "masked" if implementation == "sdpa" else "varlen"


def estimate_kept_bytes(load: PassShape) -> int:
    """Estimate what all layers keep between forward and backward: everything, or what checkpoints save."""
    per_token = {"none": estimate_layer_bytes, "selective": _estimate_selective_bytes, "full": _estimate_input_bytes}
    mask = load.sequence_length if load.attention == "masked" else 0  # boolean, one for all layers
    sums = load.model.layers * _estimate_expert_sum_bytes(load) if load.checkpointing == "none" else 0
    return load.tokens * (load.model.layers * per_token[load.checkpointing](load) + mask) + sums


def estimate_final_norm_bytes(load: PassShape) -> int:
    """Estimate what the norm after the last layer keeps, until its own backward pass frees it."""
    return load.tokens * (_estimate_norm_bytes(load, norms=1) + load.model.hidden * load.width)


def estimate_backward_bytes(load: PassShape) -> int:
    """Estimate what the backward pass of one layer adds: recomputed tensors and the gradients in its widest place.

    That place is the feed-forward layer: the gradients of its product and of what was multiplied, or of its product
    and its matrix. With dropout on the adapters' input there is also a scaled copy.
    """
    model, w, adapter = load.model, load.width, load.adapter
    wide = max(model.experts_per_token, 1) * model.intermediate * w
    routed = 3 * model.experts_per_token * model.hidden * w  # gradients of a token's copies for its experts
    if adapter is not None:
        adapted = any(layer.reads == "product" for layer in adapter.layers)
        products = 2 + (adapter.dropout > 0 if adapted else model.gated)
        gradients = load.tokens * ((1 + adapted) * model.hidden * w + max(products * wide, routed))
    else:
        first_matrix = model.hidden * model.intermediate * w
        if model.experts:  # one tensor for all experts of a layer, gate and up; the experts' outputs are gone by then
            first_matrix = 2 * model.experts * first_matrix - load.tokens * model.experts_per_token * model.hidden * w
        others = max(load.tokens * wide if model.gated else 0, first_matrix)
        gradients = load.tokens * model.hidden * w + max(load.tokens * wide + others, load.tokens * routed)
    return load.tokens * _estimate_recomputed_bytes(load) + gradients + _estimate_expert_backward_bytes(load)


def _estimate_expert_sum_bytes(load: PassShape) -> int:
    """Return the bytes of one layer's experts with their adapters added, which the backward pass multiplies by."""
    return 0 if load.adapter is None else load.width * load.adapter.adapted_expert_elements


def _estimate_expert_backward_bytes(load: PassShape) -> int:
    """Return what adapters of experts add to one layer's backward pass: sums that are recomputed, and a gradient.

    The gradient of a sum is as large as the experts' tensor. The last tensor comes first, and frees its sum.
    """
    if load.adapter is None:
        return 0
    most, left = 0, load.adapter.adapted_expert_elements
    kept = left if load.checkpointing == "none" else 0
    for each in reversed(load.adapter.experts):
        most = max(most, left + each.elements - kept)
        left -= each.elements
    return load.width * most


def estimate_forward_bytes(load: PassShape) -> int:
    """Estimate what one layer takes in the forward pass beyond what is kept of it, where that may be the peak.

    With experts it is the copies of their inputs and outputs. With selective checkpointing beside adapters it is the
    sums of layer and adapter, which are not kept.
    """
    model, adapter = load.model, load.adapter
    if model.experts:
        copies = (2 if adapter is None else 3) * model.experts_per_token * model.hidden
        sums = 0 if load.checkpointing == "none" else _estimate_expert_sum_bytes(load)  # else all layers keep them
        return load.tokens * load.width * copies + sums
    if load.checkpointing != "selective" or adapter is None:
        return 0
    wide = ((4 if model.gated else 2) + (2 if adapter.dropout else 0)) * model.intermediate
    return load.tokens * load.width * (wide - 2 * model.hidden)


def _estimate_input_bytes(load: PassShape) -> int:
    """Return the bytes of a layer's input per token, which is all that full checkpointing keeps of it."""
    return load.model.hidden * load.width


def _estimate_recomputed_bytes(load: PassShape) -> int:
    """Estimate what one layer keeps per token after its recomputation, beside its input.

    Recomputation takes the outputs out of the layer's checkpoint, so they count once.
    """
    if load.checkpointing == "none":
        return 0
    held = _estimate_selective_bytes(load) - _estimate_input_bytes(load) if load.checkpointing == "selective" else 0
    shared = 0 if load.model.rms_norms else _estimate_input_bytes(load)  # a LayerNorm keeps the layer's input itself
    return estimate_layer_bytes(load) - shared - held


def estimate_layer_bytes(load: PassShape) -> int:
    """Estimate what autograd keeps of one layer per token for the models of transformers 5.

    Two norms: a LayerNorm keeps input and output, 2 h w; an RMSNorm fp32 input, normalized value and output, h (2 w +
    4). Norms of queries and keys keep the same but the output. Without weight gradients a linear layer keeps no input,
    and an RMSNorm no normalized value.
    """
    norms = _estimate_norm_bytes(load, norms=2) + _estimate_head_norm_bytes(load)
    feed_forward = _estimate_feed_forward_bytes(load)
    adapters = 0 if load.adapter is None else _estimate_adapter_bytes(load, load.adapter)
    return norms + _estimate_attention_bytes(load) + feed_forward + adapters


def _estimate_norm_bytes(load: PassShape, *, norms: int) -> int:
    w, rms = load.width, load.model.rms_norms
    if load.adapter is None:
        return norms * load.model.hidden * (2 * w + (4 if rms else 0))
    return norms * load.model.hidden * (4 if rms else w)


def _estimate_head_norm_bytes(load: PassShape) -> int:
    model = load.model
    if not model.head_norms:
        return 0
    return (model.query_width + model.kv_width) * (4 + (load.width if load.adapter is None else 0))


def _estimate_attention_bytes(load: PassShape) -> int:
    """Estimate queries, keys, values and output, and what attention itself keeps.

    Masked and eager attention repeat keys and values for every query head unless there is only one key-value head.
    Packed documents need a mask there, T w. Eager attention keeps scores as probabilities instead, in fp32 and again in
    bf16; the others keep one fp32 sum per head.
    """
    model, w = load.model, load.width
    repeated = load.attention != "varlen" and model.kv_heads > 1
    values = 2 * model.query_width + 2 * (model.query_width if repeated else model.kv_width)
    if load.attention == "eager":
        return w * values + load.sequence_length * model.heads * (4 if w == 4 else 6)
    return w * values + 4 * model.heads + (w * load.sequence_length if load.attention == "masked" else 0)


def _estimate_feed_forward_bytes(load: PassShape) -> int:
    """Estimate the feed-forward layer per token: 4 i w gated (gate, activation, up, product), or 2 i w.

    A frozen layer does not keep its product. An expert also keeps its output before weighting and, if trained, a copy
    of its input, h w each; adapters of experts count as training. Routing a token there and back keeps four indices of
    8 bytes and a probability, in 4 bytes and in w. The router keeps its softmax in fp32. A shared expert keeps its
    output, h w, for the gate behind it.
    """
    model, w, trained = load.model, load.width, load.adapter is None
    per_width = w * ((4 if model.gated else 2) - (not trained))
    if not model.experts:
        return per_width * model.intermediate
    adapted = () if load.adapter is None else [each.name for each in load.adapter.experts]
    one = (per_width + w * ("down_proj" in adapted)) * model.intermediate
    trained = trained or "gate_up_proj" in adapted
    shared = per_width * model.shared_expert + w * (model.hidden + 1) if model.shared_expert else 0
    routed = model.experts_per_token * (one + (1 + trained) * w * model.hidden + 36 + w)
    return routed + shared + 4 * model.experts


def _estimate_adapter_bytes(load: PassShape, adapter: AdapterSpec) -> int:
    """Estimate what one layer's adapters keep per token.

    Adapters that read the same input keep it once; each keeps the output of its first matrix. With dropout each keeps
    its own input and the mask. DoRA keeps the outputs of layer and adapter.
    """
    w = load.width
    if adapter.dropout:
        inputs = sum((w + 1) * layer.inputs for layer in adapter.layers)
    else:
        # Attention already keeps the output of the heads.
        inputs = w * sum({layer.reads: layer.inputs for layer in adapter.layers if layer.reads != "heads"}.values())
    inner = w * adapter.rank * len(adapter.layers)
    results = 2 * w * sum(layer.outputs for layer in adapter.layers) if adapter.dora else 0
    return inputs + inner + results


def _estimate_selective_bytes(load: PassShape) -> int:
    """Estimate what selective checkpointing keeps of one layer per token (models/checkpointing.py).

    Its input, the output of attention with one sum per head, and the outputs of every second matrix product.
    """
    model, w = load.model, load.width
    scores = model.heads * load.sequence_length * w if load.attention == "eager" else 4 * model.heads
    kept = sum(product.outputs for product in list_products(model, load.adapter)[::2])
    return w * (model.hidden + model.query_width + kept) + scores


class MatrixProduct(NamedTuple):
    """Product of a layer's tokens with one matrix."""

    reads: Reads | None
    """Input of a linear layer; None of an adapter's two matrices."""
    inputs: int
    outputs: int


def list_products(model: ModelDims, adapter: AdapterSpec | None) -> list[MatrixProduct]:
    """Return a layer's matrix products with all tokens, in order of execution; adapters follow their linear layer.

    Experts have none: they multiply groups of tokens, after the product that picks the experts of each.
    """
    waiting = [] if adapter is None else [MatrixProduct(*layer[:3]) for layer in adapter.layers]
    products = []
    for product in _list_layer_products(model):
        products.append(product)
        if adapter is not None and product in waiting:
            waiting.remove(product)
            products.append(MatrixProduct(None, product.inputs, adapter.rank))
            products.append(MatrixProduct(None, adapter.rank, product.outputs))
    return products


def _list_layer_products(model: ModelDims) -> list[MatrixProduct]:
    """Return a layer's own matrix products; the family with learned positions has one for queries, keys and values."""
    hidden, queries, keys = model.hidden, model.query_width, model.kv_width
    widths = [queries + 2 * keys] if model.positions else [queries, keys, keys]
    attention = [MatrixProduct("attention", hidden, width) for width in widths]
    attention.append(MatrixProduct("heads", queries, hidden))
    if model.experts:
        shared = [
            MatrixProduct("feed_forward", hidden, model.shared_expert),
            MatrixProduct("feed_forward", hidden, model.shared_expert),
            MatrixProduct(None, model.shared_expert, hidden),
        ]
        router = MatrixProduct("feed_forward", hidden, model.experts)
        shared_gate = MatrixProduct("feed_forward", hidden, 1)
        return [*attention, *shared, router, shared_gate] if model.shared_expert else [*attention, router]
    into = [MatrixProduct("feed_forward", hidden, model.intermediate)] * (2 if model.gated else 1)
    return [*attention, *into, MatrixProduct("product", model.intermediate, hidden)]


def count_recomputed_flops(
    kind: ActivationCheckpointing, model: ModelDims, adapter: AdapterSpec | None, forward: float
) -> float:
    """Return the operations per token that a kind of checkpointing repeats; `forward` = those of a forward pass.

    Selective checkpointing repeats every second product and the experts. Recomputation ends before a layer's last
    product, because the layer's output is there already.
    """
    if kind != "selective":
        return forward if kind == "full" else 0.0
    repeated = [each for each in list_products(model, adapter)[1::2] if each.reads != "product"]
    experts = model.experts_per_token * model.feed_forward_parameters
    return 2.0 * model.layers * (sum(each.inputs * each.outputs for each in repeated) + experts)
