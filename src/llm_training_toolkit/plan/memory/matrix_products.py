"""Matrix products of a decoder layer: their sizes, for activations, FLOPs and recomputation."""

from __future__ import annotations

from typing import NamedTuple

from llm_training_toolkit.families import AdapterSpec, ModelDims
from llm_training_toolkit.families.lora import MixerKind, Reads


class MatrixProduct(NamedTuple):
    """Product of a layer's tokens with one matrix."""

    reads: Reads | None
    """Input of a linear layer; None of an adapter's two matrices."""
    inputs: int
    outputs: int


def list_products(model: ModelDims, adapter: AdapterSpec | None, mixer: MixerKind = "attention") -> list[MatrixProduct]:
    """Return a layer's matrix products with all tokens, in order of execution; adapters follow their linear layer.

    Experts have none: they multiply groups of tokens, after the product that picks the experts of each.
    """
    waiting = [] if adapter is None else [MatrixProduct(*each[:3]) for each in adapter.restrict_to(mixer).layers]
    products = []
    for product in (*_list_mixer_products(model, mixer), *_list_feed_forward_products(model)):
        products.append(product)
        if adapter is not None and product in waiting:
            waiting.remove(product)
            products.append(MatrixProduct(None, product.inputs, adapter.rank))
            products.append(MatrixProduct(None, adapter.rank, product.outputs))
    return products


def _list_mixer_products(model: ModelDims, mixer: MixerKind) -> list[MatrixProduct]:
    """Return the products of attention; the family with learned positions has one for queries, keys and values."""
    hidden, queries, keys = model.hidden, model.query_width, model.kv_width
    linear = model.linear_attention if mixer == "linear_attention" else None
    if linear is not None:
        heads = linear.value_heads
        joint = [linear.input_width, 2 * heads]
        widths = [linear.convolved_width, linear.value_width, heads, heads] if linear.gate_apart else joint
        inputs = linear.value_width
    else:
        projected = (2 if model.output_gate else 1) * queries
        widths = [queries + 2 * keys] if model.positions else [projected, keys, keys]
        inputs = queries
    return [*(MatrixProduct("attention", hidden, width) for width in widths), MatrixProduct("heads", inputs, hidden)]


def _list_feed_forward_products(model: ModelDims) -> list[MatrixProduct]:
    """Return the products after attention: of the feed-forward layer, or of shared expert and router."""
    hidden = model.hidden
    if model.experts:
        shared = [
            MatrixProduct("feed_forward", hidden, model.shared_expert),
            MatrixProduct("feed_forward", hidden, model.shared_expert),
            MatrixProduct(None, model.shared_expert, hidden),
        ]
        router = MatrixProduct("feed_forward", hidden, model.experts)
        return [*shared, router, MatrixProduct("feed_forward", hidden, 1)] if model.shared_expert else [router]
    into = [MatrixProduct("feed_forward", hidden, model.intermediate)] * (2 if model.gated else 1)
    return [*into, MatrixProduct("product", model.intermediate, hidden)]
