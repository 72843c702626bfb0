"""Advice for a plan that needs more memory than a device has: the key to change, by the part that takes the most."""

from __future__ import annotations

from collections.abc import Iterator

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.plan.plan import Plan


def suggest_memory_fix(config: Config, plan: Plan, largest: str) -> tuple[str, str]:
    """Return the key to change if `largest` takes the most memory, and the fix."""
    if largest == "logits" and config.model.loss_chunk_size != 1:
        return "model.loss_chunk_size", "Lower it"
    if largest == "activations":
        if plan.micro_batch > 1:
            return "train.micro_batch_size", "Lower it, or leave it to auto"
        if plan.activation_checkpointing != "full":
            return (
                "model.activation_checkpointing",
                "Set it to full: layers are computed twice instead of kept; or to auto",
            )
        return "data.sequence_length", "Lower it, or let several workers share a row: engine.sequence_parallel"
    smaller = "; or ".join([*_list_smaller_states(config, plan), "a smaller model"])
    if plan.tensor_parallel > 1:
        where = "engine.tensor_parallel"
        spread = "Raise it, or use more cluster.workers, which share the optimizer state at ZeRO 1"
    elif plan.zero < 3:
        where, spread = (
            "engine.zero_stage",
            "Raise it: 3 spreads weights, gradients and optimizer state over the workers",
        )
    else:
        where, spread = "cluster.workers", "Take more: they share weights, gradients and optimizer state"
    return where, f"{spread}; or {smaller}"


def _list_smaller_states(config: Config, plan: Plan) -> Iterator[str]:
    """Yield the settings that leave less of weights, gradients and optimizer state on a device."""
    lora = config.model.lora
    if plan.tensor_parallel > 1:
        if config.engine.offload == "none":
            yield "engine.offload: optimizer (into host memory)"
        return
    if lora is None:
        yield "model.lora (gradients and optimizer state of the adapters alone)"
    elif lora.quantize is None and "num_experts" not in plan.hf_config:  # experts are no linear layers
        yield "model.lora.quantize: nf4 (a quarter of the weights' bytes, at ZeRO 0 to 2)"
    if config.engine.offload == "none" and (lora is None or lora.quantize is None):
        yield "engine.offload: optimizer_and_weights (into host memory, at ZeRO 3)"
