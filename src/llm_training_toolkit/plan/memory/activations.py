"""Bytes that forward and backward take per token of a micro-batch, by kind of checkpointing and attention. Pure.

w = bytes of a number in the forward pass, h = hidden size, i = width of the feed-forward layer, T = tokens. Compared
with autograd by tests/unit/models/test_activations.py, with passes by tests/unit/models/test_dry_run.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from llm_training_toolkit.families import AdapterSpec, ModelDims
from llm_training_toolkit.families.family import LinearAttentionDims
from llm_training_toolkit.families.lora import MixerKind
from llm_training_toolkit.plan.memory.linear_attention import (
    estimate_mixing_bytes,
    estimate_recurrence_bytes,
    estimate_recurrence_gradient_bytes,
)
from llm_training_toolkit.plan.memory.matrix_products import list_products

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
    """`masked` keeps masks and repeated keys, `eager` all probabilities, `varlen` none of these."""
    exchanges_tokens: bool = False
    """Whether ranks share the tokens and exchange them for heads around attention."""
    mixer: MixerKind = "attention"
    """Kind of layer that is meant where one is; hybrid models have two."""

    @property
    def linear(self) -> LinearAttentionDims | None:
        """The linear attention of the layer that is meant, or None for one with attention between all tokens."""
        return self.model.linear_attention if self.mixer == "linear_attention" else None

    def list_layer_kinds(self) -> list[tuple[PassShape, int]]:
        """Return the shape of each kind of layer, and the number of its layers."""
        linear = self.model.linear_attention
        if linear is None:
            return [(self, self.model.layers)]
        counts: tuple[tuple[MixerKind, int], ...] = (
            ("attention", self.model.attention_layers),
            ("linear_attention", linear.layers),
        )
        return [
            (replace(self, mixer=mixer, adapter=self.adapter and self.adapter.restrict_to(mixer)), count)
            for mixer, count in counts
            if count
        ]


def get_attention_memory(implementation: str) -> AttentionMemory:
    """Return what an implementation of attention keeps; flash, flex and varlen kernels need no mask of T x T."""
    return "eager" if implementation == "eager" else "masked" if implementation == "sdpa" else "varlen"


def estimate_kept_bytes(load: PassShape) -> int:
    """Estimate what all layers keep between forward and backward: everything, or what checkpoints save."""
    mask = load.sequence_length if load.attention == "masked" else 0  # boolean, one for all layers
    layers = sum(count * _estimate_held_bytes(kind) for kind, count in load.list_layer_kinds())
    sums = load.model.layers * _estimate_expert_sum_bytes(load) if load.checkpointing == "none" else 0
    return load.tokens * (layers + mask) + sums


def estimate_final_norm_bytes(load: PassShape) -> int:
    """Estimate what the norm after the last layer keeps, until its own backward pass frees it."""
    return load.tokens * (_estimate_norm_bytes(load, norms=1) + load.model.hidden * load.width)


def estimate_backward_bytes(load: PassShape) -> int:
    """Estimate what the backward pass of one layer adds: recomputed tensors and the gradients in its widest place.

    The last layer of a hybrid model has attention; when a layer of linear attention recomputes, what that one kept is
    gone. Without recomputation the peak lies in the last layer.
    """
    last, *others = (kind for kind, _ in load.list_layer_kinds())
    moments = [_estimate_feed_forward_backward_bytes(last)]
    if load.checkpointing != "none":
        gone = load.tokens * _estimate_held_bytes(last)
        moments += [_estimate_feed_forward_backward_bytes(kind) - gone for kind in others]
        moments += [_estimate_recurrence_backward_bytes(kind) - gone for kind in others]
    return max(moments)


def _estimate_held_bytes(load: PassShape) -> int:
    """Estimate what one layer keeps per token between forward and backward: everything, or what checkpoints save."""
    if load.checkpointing == "none":
        return estimate_layer_bytes(load)
    return _estimate_selective_bytes(load) if load.checkpointing == "selective" else _estimate_input_bytes(load)


def _estimate_recurrence_backward_bytes(load: PassShape) -> int:
    """Estimate what the recurrence of linear attention has beside it in the backward pass.

    The tensors behind it are gone, those before it are there: the layer's first norm and the convolution.
    """
    assert load.linear is not None, "a layer of linear attention"
    kept = estimate_recurrence_bytes(load.linear, load.width, trained=load.adapter is None)
    gradients = estimate_recurrence_gradient_bytes(load.linear, load.width) + load.model.hidden * load.width
    return load.tokens * (_estimate_norm_bytes(load, norms=1) + kept + gradients)


def _estimate_feed_forward_backward_bytes(load: PassShape) -> int:
    """Estimate what the backward pass of a feed-forward layer adds to the bytes that are kept.

    These are the gradients of its product and of its factors, or of its product and its matrix. With dropout on the
    adapters' input there is also a scaled copy.
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
    4). Norms of queries and keys keep the same but the output. Only for weight gradients does a linear layer keep its
    input, and an RMSNorm the normalized value.
    """
    norms = _estimate_norm_bytes(load, norms=2) + _estimate_head_norm_bytes(load)
    feed_forward = _estimate_feed_forward_bytes(load)
    adapters = 0 if load.adapter is None else _estimate_adapter_bytes(load, load.adapter)
    return norms + _estimate_mixer_bytes(load) + feed_forward + adapters


def _estimate_norm_bytes(load: PassShape, *, norms: int) -> int:
    w, rms = load.width, load.model.rms_norms
    if load.adapter is None:
        return norms * load.model.hidden * (w + _get_normalized_width(load) + (4 if rms else 0))
    return norms * load.model.hidden * (4 if rms else w)


def _get_normalized_width(load: PassShape) -> int:
    """Return the bytes of a normalized number, which the gradient of the norm's weight needs."""
    return 4 if load.model.centered_norms else load.width


def _estimate_mixer_bytes(load: PassShape) -> int:
    """Estimate what mixes the tokens: attention between all of them, or a recurrence along them."""
    if load.linear is not None:
        return estimate_mixing_bytes(load.linear, load.width, trained=load.adapter is None)
    return _estimate_attention_bytes(load) + _estimate_output_gate_bytes(load)


def _estimate_output_gate_bytes(load: PassShape) -> int:
    """Estimate the gate of the heads' output after its sigmoid, and the product, which the last matrix reads.

    In fp32 the norm of the queries keeps their projection as it is, with the gate's half.
    """
    if not load.model.output_gate:
        return 0
    trained, shared = load.adapter is None, load.width == 4
    return load.width * load.model.query_width * (1 + trained + shared)


def _estimate_head_norm_bytes(load: PassShape) -> int:
    model = load.model
    if not model.head_norms or load.linear is not None:
        return 0
    return (model.query_width + model.kv_width) * (4 + (_get_normalized_width(load) if load.adapter is None else 0))


def _estimate_attention_bytes(load: PassShape) -> int:
    """Estimate queries, keys, values and output, and what attention itself keeps.

    Masked and eager attention repeat keys and values for every query head unless there is only one key-value head.
    Packed documents need a mask there, T w. Eager attention keeps scores as probabilities instead, in fp32 and again in
    bf16; the others keep one fp32 sum per head. Sent back to the ranks of its tokens, the output is another tensor
    than the one that attention keeps, and the last matrix reads it.
    """
    model, w = load.model, load.width
    repeated = load.attention != "varlen" and model.kv_heads > 1
    values = 2 * model.query_width + 2 * (model.query_width if repeated else model.kv_width)
    if load.exchanges_tokens and load.adapter is None:
        values += model.query_width
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
        # Attention keeps its output unless it is gated or exchanged.
        kept = set() if load.model.output_gate or load.exchanges_tokens else {"heads"}
        inputs = w * sum({each.reads: each.inputs for each in adapter.layers if each.reads not in kept}.values())
    inner = w * adapter.rank * len(adapter.layers)
    results = 2 * w * sum(layer.outputs for layer in adapter.layers) if adapter.dora else 0
    return inputs + inner + results


def _estimate_selective_bytes(load: PassShape) -> int:
    """Estimate what selective checkpointing keeps of one layer per token (models/checkpointing.py).

    Its input, the output of attention with one sum per head, and the outputs of every second matrix product. The
    kernels of linear attention are none of torch's, so they run again.
    """
    model, w = load.model, load.width
    kept = w * (model.hidden + sum(each.outputs for each in list_products(model, load.adapter, load.mixer)[::2]))
    if load.linear is not None:
        return kept
    scores = model.heads * load.sequence_length * w if load.attention == "eager" else 4 * model.heads
    return kept + w * model.query_width + scores


def count_recomputed_flops(
    kind: ActivationCheckpointing, model: ModelDims, adapter: AdapterSpec | None, forward: float
) -> float:
    """Return the operations per token that a kind of checkpointing repeats; `forward` = those of a forward pass.

    Selective checkpointing repeats every second product, the experts and linear attention. Recomputation ends before a
    layer's last product, because the layer's output is there already.
    """
    if kind != "selective":
        return forward if kind == "full" else 0.0
    linear = model.linear_attention
    total = model.layers * model.experts_per_token * model.feed_forward_parameters
    total += model.attention_layers * _count_repeated_weights(model, adapter, "attention")
    if linear is not None:
        recurrence = 3 * linear.value_width * linear.key_head_dim  # a third of its training (families/flops.py), halved
        total += linear.layers * (_count_repeated_weights(model, adapter, "linear_attention") + recurrence)
    return 2.0 * total


def _count_repeated_weights(model: ModelDims, adapter: AdapterSpec | None, mixer: MixerKind) -> int:
    """Return the weights of the products that selective checkpointing repeats in one layer."""
    repeated = [each for each in list_products(model, adapter, mixer)[1::2] if each.reads != "product"]
    return sum(each.inputs * each.outputs for each in repeated)
