"""What a model writes after each of many prompts, some prompts at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria

from llm_training_toolkit.data.code.fim import draw_uniform_numbers
from llm_training_toolkit.data.tokenizer import TextEncoder
from llm_training_toolkit.evaluation.model import EvalModel

_TOP_P = 0.95
"""With a temperature: the likeliest tokens that make up this share, as Codex, StarCoder and Qwen2.5-Coder sampled."""


@dataclass(frozen=True)
class BatchSamplingParams:
    """How answers are written.

    tokens: most new ones; fewer where the context ends. stops: texts that end an answer, and are no part of it.
    temperature 0: always the likeliest token.
    """

    max_new_tokens: int
    stops: Sequence[str] = ()
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 8


@dataclass(frozen=True)
class BatchCompletion:
    """What was written, and whether the model ended it itself: by a special token, or a text that is a stop."""

    text: str
    ended: bool


def generate_completions(
    subject: EvalModel,
    prompts: Sequence[list[int]],
    how: BatchSamplingParams,
    done: Callable[[int], None] = lambda _: None,
) -> list[BatchCompletion]:
    """The answer to each prompt, given as token ids of 1 to context - 1 tokens. Any special token ends an answer.

    Prompts of like length are answered together, so that none waits for the room of a longer one. With a temperature
    the answers depend on the seed and the batch.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, BatchCompletion] = {}
    for start in range(0, len(order), how.batch_size):
        together = order[start : start + how.batch_size]
        torch.manual_seed(int(draw_uniform_numbers(how.seed, 0, 0, start, "answers").first * 2**53))
        found = _generate_batch(subject, [prompts[index] for index in together], how)
        answers |= dict(zip(together, found, strict=True))
        done(len(answers))
    return [answers[index] for index in range(len(prompts))]


@torch.no_grad()
def _generate_batch(
    subject: EvalModel, prompts: Sequence[list[int]], how: BatchSamplingParams
) -> list[BatchCompletion]:
    longest = max(map(len, prompts))
    pad = subject.text_encoder.get_special_token_id(subject.tokenization_spec.tokens.pad)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=subject.device)
    seen = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=subject.device
    )
    ends = _get_eos_ids(subject)
    # What the model's own file says of sampling is not what was asked for here.
    subject.language_model.generation_config = GenerationConfig(
        max_new_tokens=min(how.max_new_tokens, subject.context_length - longest),
        eos_token_id=ends,
        pad_token_id=pad,
        use_cache=True,
        **({"do_sample": True, "temperature": how.temperature, "top_p": _TOP_P, "top_k": 0} if how.temperature else {}),
    )
    criteria = [_StopTextCriteria(subject.text_encoder, longest, how.stops)] if how.stops else []
    out = subject.language_model.generate(ids, attention_mask=seen, stopping_criteria=criteria)
    return [_build_completion(row[longest:], subject.text_encoder, frozenset(ends), how.stops) for row in out.tolist()]


def _get_eos_ids(subject: EvalModel) -> list[int]:
    """The ids that end an answer: code and prose have no special token in them."""
    return [
        subject.text_encoder.get_special_token_id(token)
        for token in subject.tokenization_spec.tokens.all
        if subject.text_encoder.has_special_token(token)
    ]


def _build_completion(
    ids: Sequence[int], encoder: TextEncoder, ends: frozenset[int], stops: Sequence[str]
) -> BatchCompletion:
    length = next((place for place, token in enumerate(ids) if token in ends), None)
    text = encoder.decode(ids[:length])
    cut = find_first_stop(text, stops)
    return BatchCompletion(text[:cut], ended=length is not None or cut is not None)


def find_first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stops begins; None where the text has none."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


class _StopTextCriteria(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Ends an answer that has come to one of the stops."""

    def __init__(self, encoder: TextEncoder, start: int, stops: Sequence[str]) -> None:
        self._encoder, self._start, self._stops = encoder, start, stops

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_more: Any) -> torch.Tensor:  # noqa: ANN401, ARG002
        """(rows,) bool: which answers are complete."""
        texts = [self._encoder.decode(row) for row in input_ids[:, self._start :].tolist()]
        found = [find_first_stop(text, self._stops) is not None for text in texts]
        return torch.tensor(found, device=input_ids.device)
