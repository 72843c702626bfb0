"""Objective: a sum of token losses, computed in chunks of tokens. The engine wraps `LossModule`.

The output head computes loss and gradients chunk by chunk, so that whole logits (4.6 GiB a row at 8,192 tokens of
Qwen's vocabulary in fp32) never exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_training_toolkit.distributed.sequence_group import SequenceGroup
from llm_training_toolkit.models.attention import build_attention_arguments, compute_cu_seqlens, takes_cu_seqlens
from llm_training_toolkit.models.dropout import BatchPosition
from llm_training_toolkit.models.layer_compiler import LayerCompiler, get_decoder_layers, mark_dynamic_bounds
from llm_training_toolkit.models.linear_attention import (
    build_sequence_index,
    has_linear_attention,
    isolate_linear_attention,
)
from llm_training_toolkit.models.router import RouterMonitor, find_routers
from llm_training_toolkit.models.tensor_parallel import TensorParallelModel
from llm_training_toolkit.plan import compute_loss_chunk_size

IGNORE_INDEX = -100  # label of a position without loss
_SCALE_BLOCK_ELEMENTS = 2**22  # 16 MB in fp32


class _ChunkedLoss(torch.autograd.Function):
    """Cross-entropy summed over tokens; the forward pass computes the gradients beside the loss.

    Each chunk has one matrix of logits, which becomes their gradient in place. Summing the weight gradient over several
    chunks would take an fp32 copy of the weights (2.2 GB for Qwen2.5-7B). Instead, it is computed by blocks of the
    vocabulary from recomputed logits: a third more work in the output layer.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:  # noqa: ANN401
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        log_norms = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight: Tensor | None = None
        chunk = min(chunk or len(hidden), len(hidden))
        for rows, targets, norms, out in _split_chunks(chunk, hidden, labels, log_norms, grad_hidden):
            part, gradient = _compute_loss_and_gradient((rows @ weight.T).float(), targets, norms, weight.dtype)
            loss += part
            torch.matmul(gradient, weight, out=out)
            if ctx.needs_input_grad[1] and chunk == len(hidden):
                grad_weight = gradient.T @ rows
            del gradient  # frees memory for the next chunk's logits
        if ctx.needs_input_grad[1] and grad_weight is None:
            grad_weight = _compute_weight_gradient(hidden, weight, labels, log_norms, chunk)
        ctx.gradients = (grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # noqa: ANN401
        assert ctx.gradients is not None, "they are scaled in place, so the loss has one backward pass"
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None
        for gradient in (grad_hidden, grad_weight):
            if gradient is not None:
                _scale_gradient(gradient, grad_outputs[0])
        return grad_hidden, grad_weight, None, None


def _split_chunks(chunk: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield each tensor in pieces of `chunk` rows, if there are rows."""
    if chunk:
        yield from zip(*(torch.split(tensor, chunk) for tensor in tensors), strict=True)


def _compute_loss_and_gradient(
    logits: Tensor, targets: Tensor, log_norms: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of fp32 logits (R, V) and its gradient in them, rounded to `dtype`.

    Overwrites logits and log_norms, because torch.logsumexp would take a second matrix of this size.
    """
    top = logits.amax(dim=-1)
    chosen = logits.gather(1, targets[:, None]).squeeze(1)
    probabilities = logits.sub_(top[:, None]).exp_()
    total = probabilities.sum(dim=-1)
    torch.add(total.log(), top, out=log_norms)
    probabilities.div_(total[:, None])
    probabilities[torch.arange(len(targets), device=targets.device), targets] -= 1.0
    return (log_norms - chosen).sum(), probabilities.to(dtype)


def _compute_weight_gradient(hidden: Tensor, weight: Tensor, labels: Tensor, log_norms: Tensor, chunk: int) -> Tensor:
    """Return the gradient of the weights (V, H), computed by blocks of the vocabulary.

    A block has a quarter of a chunk's logits, because the gradient itself now takes memory, too.
    """
    if not chunk:
        return torch.zeros_like(weight)
    found = torch.empty_like(weight)
    block = -(-chunk * len(weight) // (4 * len(hidden)))
    for start in range(0, len(weight), block):
        part = weight[start : start + block]
        gradient = _compute_block_gradient((hidden @ part.T).float(), labels - start, log_norms, weight.dtype)
        torch.matmul(gradient.T, hidden, out=found[start : start + block])
        del gradient  # frees memory for the next block's logits
    return found


def _compute_block_gradient(logits: Tensor, targets: Tensor, log_norms: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient in a block's logits (R, B), overwriting them; targets outside [0, B) are of other blocks."""
    probabilities = logits.sub_(log_norms[:, None]).exp_()
    own = ((targets >= 0) & (targets < logits.shape[1])).float()  # a mask: indexing would wait for the GPU
    probabilities[torch.arange(len(targets), device=targets.device), targets.clamp(0, logits.shape[1] - 1)] -= own
    return probabilities.to(dtype)


def _scale_gradient(gradient: Tensor, scale: Tensor) -> None:
    """Multiply in place and in fp32: a bf16 scale is off by up to 0.4 %, differently for every number of workers.

    Block by block, because a full fp32 copy would be as large as the memory that chunks save.
    """
    for block in torch.split(gradient, max(1, _SCALE_BLOCK_ELEMENTS // gradient.shape[1])):
        block.copy_(block.float() * scale)


def compute_token_loss_sum(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Return the cross-entropy of `hidden` (N, H) with `labels` (N,), output weights (V, H), as summed fp32 scalar.

    Positions labelled -100 are dropped before the product, so padding costs nothing here. Without any label the loss is
    zero and still connected to both inputs, because every rank runs every backward.
    """
    kept = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # waits for the device once; two masks would wait twice
    hidden, labels = hidden[kept], labels[kept]
    if torch.is_grad_enabled():
        loss: Tensor = _ChunkedLoss.apply(hidden, weight, labels, chunk)  # type: ignore[no-untyped-call]
        return loss
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for rows, targets in _split_chunks(min(chunk or len(hidden), len(hidden)), hidden, labels):
        total += F.cross_entropy((rows @ weight.T).float(), targets, reduction="sum")
    return total


class LossHead(nn.Linear):
    """Output head that returns logits, or the summed loss if labels are given.

    The loss is computed inside the head's own forward, for which ZeRO-3 gathers its weight.
    """

    loss_chunk: int

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits (..., V) of `hidden` (..., H), or their summed loss with `labels` of the same leading shape."""
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        return compute_token_loss_sum(
            hidden.reshape(-1, hidden.shape[-1]), self.weight, labels.reshape(-1), self.loss_chunk
        )


class LossModule(nn.Module):
    """Causal language model whose forward pass is the objective.

    Documents in a row are isolated by `position_ids` that restart at 0 for each, or by `cu_seqlens` where the attention
    takes them. Isolation needs `use_cache=False` and no attention mask, in training and in evaluation alike.

    With a `sequence_group` a forward pass takes this rank's slice of the tokens, and returns the loss of those.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_chunk: int | Literal["auto"],
        router_balance: float | None = None,
        sequence_group: SequenceGroup | None = None,
        tensor_parallel: TensorParallelModel | None = None,
    ) -> None:
        super().__init__()
        self.lm = model
        self.sequence_group = sequence_group
        self.tensor_parallel = tensor_parallel
        """Slices of the model's matrices, if `model` was cut over ranks."""
        self.batch_position = BatchPosition()
        """Sequences of the forward pass, set by its caller; dropout draws from them."""
        self._layer_compiler: LayerCompiler | None = None
        self._has_linear_attention = has_linear_attention(model)
        isolate_linear_attention(model)
        routers = find_routers(model)
        self.router_monitor = RouterMonitor(routers, router_balance) if routers else None
        """Observer of a mixture's routers in training, which adds the balance loss; None for a dense model."""
        # If the head was trained whole beside adapters, peft keeps two: the original and the trained copy.
        given = model.get_output_embeddings().modules()  # type: ignore[operator]
        heads: list[Any] = [module for module in given if isinstance(module, nn.Linear)]
        # Under ZeRO-3 a head's weight is partitioned and empty here, so the configuration gives its number of rows.
        chunk = compute_loss_chunk_size(loss_chunk, model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        for head in heads:
            assert head.bias is None, "LossHead computes the loss without a bias"
            head.__class__ = LossHead
            head.loss_chunk = chunk

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile the decoder layers for training, each when it first runs. Adapters must be there already."""
        self._layer_compiler = LayerCompiler(get_decoder_layers(self.lm), backend)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Return the summed loss of (B, T) tokens; `labels` (B, T) are already shifted, -100 = no loss.

        In training the balance loss of a mixture of experts is part of it, if there is one.

        `cu_seqlens` (documents + 1,) int32 bounds the documents of all rows, one row after another, and `max_seqlen`
        is the longest of them. Without them they are read from `position_ids`, which waits for the device. With a
        sequence group they are needed, and bound the documents of all its ranks.
        """
        self.batch_position.rows = len(input_ids)
        compiler = self._layer_compiler
        is_compiled = compiler is not None and compiler.begin_forward(input_ids, training=self.training)
        given = self._build_inputs(input_ids, position_ids, cu_seqlens, max_seqlen, is_compiled=is_compiled)
        if self.sequence_group is not None:
            assert cu_seqlens is not None, "a slice does not show where documents begin"
            given["sequence_group"] = self.sequence_group
        monitor = self.router_monitor if self.training else None
        if monitor is not None:
            monitor.begin_forward(labels != IGNORE_INDEX)
        hidden = self.lm.get_decoder()(**given).last_hidden_state  # type: ignore[operator]
        loss: Tensor = self.lm.get_output_embeddings()(hidden, labels.reshape(given["input_ids"].shape))  # type: ignore[operator]
        return loss if monitor is None else monitor.end_forward(loss)

    def compute_logits(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return the whole logits (B, T, V) of (B, T) tokens, for checks and tests."""
        self.batch_position.rows = len(input_ids)
        if self.router_monitor is not None:
            self.router_monitor.stop()
        if self._layer_compiler is not None:
            self._layer_compiler.stop()
        logits: Tensor = self.lm(**self._build_inputs(input_ids, position_ids, None, None)).logits
        return logits.reshape(*input_ids.shape, -1)

    def _build_inputs(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        *,
        is_compiled: bool = False,
    ) -> dict[str, Any]:
        """Return the arguments of the model, with all rows as one if its attention takes the documents' bounds."""
        flat = takes_cu_seqlens(self.lm)
        given = {"input_ids": input_ids, "position_ids": position_ids}
        if flat:
            given = {name: tensor.reshape(1, -1) for name, tensor in given.items()}
        if not flat and not self._has_linear_attention:
            return {**given, "use_cache": False}
        if cu_seqlens is None or max_seqlen is None:
            bounds, max_seqlen = compute_cu_seqlens(position_ids)
            cu_seqlens = bounds.to(input_ids.device)
        if is_compiled:
            mark_dynamic_bounds(cu_seqlens)
            max_seqlen = input_ids.shape[1]  # a bound that never changes: as a constant, each would be another graph
        if self._has_linear_attention:
            given["seq_idx"] = build_sequence_index(cu_seqlens, input_ids.numel())
        return {**given, "use_cache": False, **build_attention_arguments(cu_seqlens, max_seqlen)}
