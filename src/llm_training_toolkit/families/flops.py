"""Floating-point operations of training, by what they grow with. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from llm_training_toolkit.families.family import ModelDims
from llm_training_toolkit.families.lora import AdapterSpec


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of a forward and backward pass; recomputed activations and logits are left out.

    A product costs 2 FLOPs a weight and token forward, 2 for the gradient of its input, and 2 for that of its weights,
    which frozen weights lack. Source: PaLM (Chowdhery et al. 2022), appendix B. Like there, attention is not halved for
    the causal mask, and embedding lookups, norms and activations are left out.
    """

    per_token: int
    """FLOPs of the matrices, except the output layer, that a token passes."""
    per_loss_token: int
    """FLOPs of the output layer, which only tokens with a loss reach."""
    per_attended_token: int
    """FLOPs of a query and one key and value that it attends to, in all layers and heads."""
    window: int | None
    """Tokens that a token attends to at most, itself included; without a sliding window None."""

    def count_step_flops(self, tokens: int, loss_tokens: int, attended_tokens: int) -> int:
        """Return the FLOPs of a step; a document of n tokens adds n x min(n, window) to `attended_tokens`."""
        return self.per_token * tokens + self.per_loss_token * loss_tokens + self.per_attended_token * attended_tokens


def compute_training_flops(model: ModelDims, beside: AdapterSpec | None = None) -> TrainingFlops:
    """Return the FLOPs of training the model, or the adapters beside it.

    A layer of linear attention reads its state (key x value head) twice and updates it once: 6 FLOPs forward, 18 in
    all, an element and value head.
    """
    output_layer = model.vocab * model.hidden
    matrices, state = model.matmul_parameters - output_layer, 0
    if (linear := model.linear_attention) is not None:
        state = 18 * linear.layers * linear.value_width * linear.key_head_dim
    layers, head = 6 * matrices, 6
    if beside is not None:
        layers = 4 * matrices + _count_adapter_flops(model, beside)
        head = 6 if "lm_head" in beside.modules_to_save else 4
    return TrainingFlops(
        per_token=layers + state,
        per_loss_token=head * output_layer,
        per_attended_token=12 * model.attention_layers * model.query_width,
        window=model.window,
    )


def _count_adapter_flops(model: ModelDims, beside: AdapterSpec) -> int:
    """Return the FLOPs of a token's adapters.

    Adapters of experts are added to the weights before they multiply: what remains per token is the gradient of the
    sum's weights. The addition itself does not depend on tokens and is left out.
    """
    of_experts = beside.count_expert_adapters(model.layers)
    gradients = model.layers * beside.adapted_expert_elements * model.experts_per_token // max(model.experts, 1)
    return 6 * (beside.matrices - of_experts) + 2 * gradients
