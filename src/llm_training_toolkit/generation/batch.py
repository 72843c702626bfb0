"""Generation for several prompts at once, each with its own sampling, stop texts, stream and end.

Rows are left-padded to the longest prompt, and drawn from their own random generators: apart from rounding, the
other rows of a batch do not change an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from transformers import LogitsProcessor, StoppingCriteria, TopPLogitsWarper

from llm_training_toolkit.generation.generator import TextGenerator, TokenizedPrompt
from llm_training_toolkit.generation.text_stream import StopTextFilter, TokenDecoder
from llm_training_toolkit.models.sampling import SamplingParams, set_generation_config

FinishReason = Literal["stop", "length", "cancelled"]


class RowListener(Protocol):
    """Receiver of one row's text; called from the generating thread."""

    def on_text(self, piece: str) -> None:
        """Receive a piece of text."""

    def on_finish(self, reason: FinishReason, new_tokens: int) -> None:
        """Receive the reason of the end and the number of generated tokens, the end token included."""

    def is_cancelled(self) -> bool:
        """Return whether the rest is no longer wanted; asked after every token."""


@dataclass(frozen=True, eq=False)
class BatchRow:
    """One prompt of a batch. `written_ids`: special tokens that are written out, such as those around a tool call."""

    prompt: TokenizedPrompt
    how: SamplingParams
    listener: RowListener
    stops: tuple[str, ...] = ()
    written_ids: frozenset[int] = frozenset()


Row = TypeVar("Row", bound=BatchRow)


def select_batch(waiting: Sequence[Row], context: int, size: int) -> list[Row]:
    """Select the oldest row and the next ones that can share a batch with it, `size` at most.

    A row that has ended continues until the last one has: the longest prompt and the longest answer together must fit
    into the context, because learned positions (StarCoder 1) end there.
    """
    chosen: list[Row] = []
    for row in waiting:
        together = [*chosen, row]
        longest = max(len(each.prompt.ids) for each in together) + max(each.how.max_new_tokens for each in together)
        if not chosen or longest <= context:
            chosen = together
        if len(chosen) == size:
            break
    return chosen


@torch.no_grad()
def generate_batch(generator: TextGenerator, rows: Sequence[BatchRow]) -> None:
    """Generate until every row has ended; each listener is told at the end of its own row.

    The longest prompt and the longest answer together must fit into the context of the model (`select_batch`).
    """
    model = generator.model
    longest = max(len(row.prompt.ids) for row in rows)
    pad = generator.pad_id or 0  # masked
    paddings = [longest - len(row.prompt.ids) for row in rows]
    ids = [[pad] * padding + list(row.prompt.ids) for padding, row in zip(paddings, rows, strict=True)]
    mask = [[0] * padding + [1] * len(row.prompt.ids) for padding, row in zip(paddings, rows, strict=True)]
    most = max(row.how.max_new_tokens for row in rows)
    # Without end tokens for the batch: they are the rows' own, and `_RowEnds` knows them.
    set_generation_config(model, SamplingParams(most), room=most, eos_ids=(), pad_id=pad)
    model.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        logits_processor=[_RowSampler(rows, model.device)],
        stopping_criteria=[_RowEnds(generator, rows)],
    )


class _RowSampler(LogitsProcessor):  # type: ignore[misc]  # transformers has no types
    """Adds each row's own Gumbel noise to its scaled logits: their maximum is then a draw from the softmax."""

    def __init__(self, rows: Sequence[BatchRow], device: torch.device) -> None:
        self._rows = rows
        self._random = [torch.Generator(device).manual_seed(row.how.seed) for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return logits (rows, vocabulary) whose argmax is the next token; those of greedy rows are unchanged."""
        scores = scores.clone()
        for number, (row, random) in enumerate(zip(self._rows, self._random, strict=True)):
            if row.how.temperature > 0:
                logits = scores[number : number + 1].float() / row.how.temperature
                if row.how.top_p < 1:
                    logits = TopPLogitsWarper(row.how.top_p)(input_ids, logits)
                noise = torch.empty_like(logits).exponential_(generator=random)
                scores[number] = (logits - noise.log())[0]
        return scores


class _RowEnds(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Tells each listener its new token's text, and which rows have ended."""

    def __init__(self, generator: TextGenerator, rows: Sequence[BatchRow]) -> None:
        self._writers = [_RowWriter(generator, row) for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_more: Any) -> torch.Tensor:  # noqa: ANN401, ARG002
        """Return (rows,) bool: which rows have ended."""
        for writer, token in zip(self._writers, input_ids[:, -1].tolist(), strict=True):
            if not writer.ended:
                writer.write_token(token)
        return torch.tensor([writer.ended for writer in self._writers], device=input_ids.device)


class _RowWriter:
    """Decodes a row's tokens for its listener, up to its end."""

    def __init__(self, generator: TextGenerator, row: BatchRow) -> None:
        self._row = row
        self._decoder = TokenDecoder(generator.encoder, row.written_ids)
        self._filter = StopTextFilter(row.stops)
        self._new_tokens = 0
        self.ended = False

    def write_token(self, token: int) -> None:
        """Pass on the token's text, or end the row."""
        self._new_tokens += 1
        if token in self._row.prompt.end_ids:
            self.finish("stop")
            return
        self._say(self._filter.push_text(self._decoder.push_token(token)))
        if self._filter.stopped:
            self.finish("stop")
        elif self._row.listener.is_cancelled():
            self.finish("cancelled")
        elif self._new_tokens == self._row.how.max_new_tokens:
            self.finish("length")

    def _say(self, text: str) -> None:
        if text:
            self._row.listener.on_text(text)

    def finish(self, reason: FinishReason) -> None:
        """Pass on the rest of the text, and the end."""
        self._say(self._filter.push_text(self._decoder.flush()))
        self._say(self._filter.flush())
        self.ended = True
        self._row.listener.on_finish("stop" if self._filter.stopped else reason, self._new_tokens)
