"""Held-out loss, as loss, perplexity and bits per byte.

Called by the training loop at step 0, every `eval.interval` steps and at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llm_training_toolkit.data.collate import MicroBatch
from llm_training_toolkit.distributed.context import RunContext

if TYPE_CHECKING:  # DeepSpeed takes seconds to import, and only training needs it
    from llm_training_toolkit.engine import Engine


@dataclass(frozen=True)
class EvalLoss:
    """Held-out loss."""

    loss: float
    """Mean loss per token, in nats."""
    tokens: int
    """Number of tokens in the mean."""
    bytes: int
    """Bytes of text encoded by those tokens; special tokens count as 0."""

    @property
    def token_perplexity(self) -> float:
        """Exponential of the loss; infinite on overflow."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, comparable between tokenizers."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan

    def to_metrics(self) -> dict[str, float]:
        """Return the values by metric name."""
        return {
            "eval/loss": self.loss,
            "eval/perplexity": self.token_perplexity,
            "eval/bits_per_byte": self.bits_per_byte,
        }


def compute_eval_loss(
    engine: Engine, batches: Iterable[MicroBatch], tokens: int, text_bytes: int, context: RunContext
) -> EvalLoss:
    """Evaluate this rank's batches and sum over the ranks. Collective: every rank has the same number of batches.

    `tokens` and `text_bytes` are totals of the whole held-out part, known from the index.
    """
    [total] = context.all_reduce_sum(math.fsum(engine.compute_loss_sum(batch) for batch in batches))
    return EvalLoss(loss=total / tokens, tokens=tokens, bytes=text_bytes)
