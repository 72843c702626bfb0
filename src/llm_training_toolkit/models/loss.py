"""The objective: a sum of token losses, with the vocabulary taken in chunks.

`LossModule` is what the engine wraps. The output head computes loss and gradients chunk by chunk,
so that whole logits (4.6 GiB a row at 8,192 tokens of Qwen's vocabulary in fp32) never exist.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_training_toolkit.models.dropout import Draws

IGNORED = -100
"""Label of a position without loss."""


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy summed over tokens; the gradient is computed beside the loss, in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:  # noqa: ANN401
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        trained = ctx.needs_input_grad[1]  # beside adapters the head is frozen
        grad_weight = torch.zeros(weight.shape if trained else 0, dtype=torch.float32, device=weight.device)
        for rows, targets, out in zip(*_split(chunk, hidden, labels, grad_hidden), strict=True):
            logits = (rows @ weight.T).float()
            log_norm = torch.logsumexp(logits, dim=-1, keepdim=True)
            loss += (log_norm.squeeze(-1) - logits.gather(1, targets[:, None]).squeeze(1)).sum()
            gradient = torch.exp(logits.sub_(log_norm))
            gradient[torch.arange(len(targets), device=targets.device), targets] -= 1.0
            low = gradient.to(weight.dtype)
            torch.matmul(low, weight, out=out)
            if trained:
                grad_weight += low.T @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # noqa: ANN401
        grad_hidden, grad_weight = ctx.saved_tensors
        # Scaled in fp32: rounded to bf16 the scale is off by up to 0.4 %, differently for every number of workers.
        scale = grad_outputs[0]
        of_weight = (grad_weight * scale).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return (grad_hidden.float() * scale).to(ctx.dtype), of_weight, None, None


def _split(chunk: int, *tensors: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    """Each tensor in pieces of `chunk` rows; no pieces where there are no rows."""
    if len(tensors[0]) == 0:
        return tuple(() for _ in tensors)
    return tuple(torch.split(tensor, chunk or len(tensor)) for tensor in tensors)


def token_loss_sum(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Summed cross-entropy of `hidden` (N, H) against `labels` (N,) under output weights (V, H), as fp32 scalar.

    Positions labelled -100 are left out before the product, so padding costs nothing here. With no
    label at all the loss is zero and still connected to both inputs: every rank runs every backward.
    """
    kept = labels != IGNORED
    hidden, labels = hidden[kept], labels[kept]
    if torch.is_grad_enabled():
        loss: Tensor = _ChunkedLoss.apply(hidden, weight, labels, chunk)  # type: ignore[no-untyped-call]
        return loss
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for rows, targets in zip(*_split(chunk, hidden, labels), strict=True):
        total += F.cross_entropy((rows @ weight.T).float(), targets, reduction="sum")
    return total


class LossHead(nn.Linear):
    """An output head that returns logits, or the summed loss when labels are given.

    The loss is computed inside the head's own forward so that ZeRO-3 has its weight at hand.
    """

    loss_chunk: int

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits (..., V) of `hidden` (..., H), or with `labels` of the same leading shape their summed loss."""
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        return token_loss_sum(hidden.reshape(-1, hidden.shape[-1]), self.weight, labels.reshape(-1), self.loss_chunk)


class LossModule(nn.Module):
    """A causal language model whose forward pass is the objective.

    Documents in a row are isolated by `position_ids` that restart at 0 for each of them; that needs
    `use_cache=False` and no attention mask, in training and in evaluation alike.
    """

    def __init__(self, model: nn.Module, loss_chunk: int) -> None:
        super().__init__()
        self.lm = model
        self.draws = Draws()
        """What dropout draws from; whoever runs the forward pass says which sequences it sees."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        assert head.bias is None, "LossHead computes the loss without a bias"
        head.__class__ = LossHead
        head.loss_chunk = loss_chunk

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        """Summed loss of (B, T) tokens; `labels` (B, T) are already shifted, -100 = no loss."""
        decoder = self.lm.get_decoder()  # type: ignore[operator]
        hidden = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        loss: Tensor = self.lm.get_output_embeddings()(hidden, labels)  # type: ignore[operator]
        return loss

    def logits(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Logits (B, T, V) of (B, T) tokens; for checks and tests, whole on purpose."""
        out = self.lm(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        logits: Tensor = out.logits
        return logits
