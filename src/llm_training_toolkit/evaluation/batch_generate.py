"""Batched generation: completes many prompts, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria

from llm_training_toolkit.data.code.fim import draw_uniform_numbers
from llm_training_toolkit.data.tokenizer import TextEncoder
from llm_training_toolkit.evaluation.model import EvalModel

_TOP_P = 0.95  # nucleus sampling if temperature > 0; as in Codex, StarCoder and Qwen2.5-Coder


@dataclass(frozen=True)
class BatchSamplingParams:
    """Sampling parameters.

    max_new_tokens: capped by the context. stops: texts that end a completion and are cut off. temperature 0: greedy.
    """

    max_new_tokens: int
    stops: Sequence[str] = ()
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 8


@dataclass(frozen=True)
class BatchCompletion:
    """Generated text. `ended`: the model ended it by a special token or a stop text."""

    text: str
    ended: bool


def generate_completions(
    subject: EvalModel,
    prompts: Sequence[list[int]],
    how: BatchSamplingParams,
    done: Callable[[int], None] = lambda _: None,
) -> list[BatchCompletion]:
    """Complete each prompt, given as 1 to context - 1 token ids. Any special token ends a completion.

    Prompts of similar length share a batch, because the longest one limits the new tokens of all. With a temperature,
    completions depend on the seed and the batch.
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
    # Replaces the model's own generation_config.json, whose sampling defaults were not requested.
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
    """Return the ids that end a completion: all special tokens, since code and prose contain none."""
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
    """Return the position of the first stop text, or None."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


class _StopTextCriteria(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Stops a row once it contains a stop text."""

    def __init__(self, encoder: TextEncoder, start: int, stops: Sequence[str]) -> None:
        self._encoder, self._start, self._stops = encoder, start, stops

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_more: Any) -> torch.Tensor:  # noqa: ANN401, ARG002
        """Return (rows,) bool: which rows are complete."""
        texts = [self._encoder.decode(row) for row in input_ids[:, self._start :].tolist()]
        found = [find_first_stop(text, self._stops) is not None for text in texts]
        return torch.tensor(found, device=input_ids.device)
