"""Losses of examples, summed over batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from llm_training_toolkit.data.collate import MicroBatch, collate_rows
from llm_training_toolkit.data.prepare.packing import pack_examples
from llm_training_toolkit.data.types import Example
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.evaluation.model import EvalModel
from llm_training_toolkit.evaluation.task import ProgressCallback
from llm_training_toolkit.evaluation.validation import EvalLoss
from llm_training_toolkit.models import LossModule
from llm_training_toolkit.models.attention import choose_loss_attention, using_attention

_LOSS_CHUNK = 1024


class LossAccumulator:
    """Sums of losses, tokens and bytes."""

    def __init__(self, subject: EvalModel, progress: ProgressCallback) -> None:
        self._device, self._progress = subject.device, progress
        self._module = LossModule(subject.language_model, _LOSS_CHUNK)
        self._attention = choose_loss_attention(self._module.lm, self._device)
        self._sizes = subject.text_encoder.count_bytes_per_token()
        self._losses: list[float] = []
        self._tokens = self._bytes = 0

    @torch.no_grad()
    def add_batches(self, batches: Iterable[MicroBatch]) -> None:
        """Add the losses of batches."""
        for batch in batches:
            tensors = (batch.input_ids, batch.position_ids, batch.labels, batch.cu_seqlens)
            with using_attention(self._module.lm, self._attention):
                loss = self._module(*(tensor.to(self._device) for tensor in tensors), batch.max_seqlen)
            self._losses.append(float(loss))
            labels = batch.labels.numpy()
            targets = labels[labels >= 0]
            self._tokens += len(targets)
            self._bytes += int(self._sizes[targets].sum())
            self._progress("tokens evaluated", self._tokens, 0)

    def compute_loss(self) -> EvalLoss:
        """Return the loss over all batches. Raises DataError without a token to predict."""
        if not self._tokens:
            raise DataError("--data: nothing to predict in these documents: each is empty, or a single token")
        return EvalLoss(math.fsum(self._losses) / self._tokens, self._tokens, self._bytes)


def pack_into_batches(examples: Sequence[Example], subject: EvalModel, batch: int) -> Iterator[MicroBatch]:
    """Pack examples into full rows, without attention between examples."""
    if not examples:
        return
    pad = subject.text_encoder.get_special_token_id(subject.tokenization_spec.tokens.pad)
    lengths: Any = np.array([len(example.tokens) for example in examples])
    targets: Any = np.array([int(example.loss[1:].sum()) for example in examples])
    plan = pack_examples(lengths, subject.context_length, targets=targets)
    for start in range(0, len(plan), batch):
        rows = [
            [examples[i] for i in plan.get_examples(row).tolist()]
            for row in range(start, min(start + batch, len(plan)))
        ]
        yield collate_rows(rows, subject.context_length, pad)
