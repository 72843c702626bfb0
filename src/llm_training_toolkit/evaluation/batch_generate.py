"""Batched generation: completes many prompts, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from llm_training_toolkit.data.code.fim import draw_uniform_numbers
from llm_training_toolkit.data.tokenizer import TextEncoder
from llm_training_toolkit.evaluation.model import EvalModel
from llm_training_toolkit.models.sampling import Completion, SamplingParams, set_generation_config


def generate_completions(
    subject: EvalModel,
    prompts: Sequence[list[int]],
    how: SamplingParams,
    *,
    stops: Sequence[str],
    batch_size: int,
    done: Callable[[int], None],
) -> list[Completion]:
    """Complete each prompt, given as 1 to context - 1 token ids; `done` receives the number completed so far.

    Any special token ends a completion, and so does a text of `stops`, which is cut off. Prompts of similar length
    share a batch, because the longest one limits the new tokens of all. With a temperature, completions depend on the
    seed and the batch.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        together = order[start : start + batch_size]
        torch.manual_seed(int(draw_uniform_numbers(how.seed, 0, 0, start, "answers").first * 2**53))
        found = _generate_batch(subject, [prompts[index] for index in together], how, stops)
        answers |= dict(zip(together, found, strict=True))
        done(len(answers))
    return [answers[index] for index in range(len(prompts))]


@torch.no_grad()
def _generate_batch(
    subject: EvalModel, prompts: Sequence[list[int]], how: SamplingParams, stops: Sequence[str]
) -> list[Completion]:
    longest = max(map(len, prompts))
    pad = subject.text_encoder.get_special_token_id(subject.tokenization_spec.tokens.pad)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=subject.device)
    seen = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=subject.device
    )
    ends = _get_eos_ids(subject)
    room = subject.context_length - longest
    set_generation_config(subject.language_model, how, room=room, eos_ids=ends, pad_id=pad)
    criteria = [_StopTextCriteria(subject.text_encoder, longest, stops)] if stops else []
    out = subject.language_model.generate(ids, attention_mask=seen, stopping_criteria=criteria)
    return [_build_completion(row[longest:], subject.text_encoder, frozenset(ends), stops) for row in out.tolist()]


def _get_eos_ids(subject: EvalModel) -> list[int]:
    """Return the ids that end a completion: all special tokens, since code and prose contain none."""
    return [
        subject.text_encoder.get_special_token_id(token)
        for token in subject.tokenization_spec.tokens.all
        if subject.text_encoder.has_special_token(token)
    ]


def _build_completion(
    ids: Sequence[int], encoder: TextEncoder, ends: frozenset[int], stops: Sequence[str]
) -> Completion:
    length = next((place for place, token in enumerate(ids) if token in ends), None)
    text = encoder.decode(ids[:length])
    cut = find_first_stop(text, stops)
    return Completion(text[:cut], ended=length is not None or cut is not None)


def find_first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return the position of the first stop text, or None."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


class _StopTextCriteria(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Stops a row once its completion contains a stop text.

    transformers' `stop_strings` look at the prompt, too: a line break at its end begins a match (experiments/LOG.md).
    """

    def __init__(self, encoder: TextEncoder, start: int, stops: Sequence[str]) -> None:
        self._encoder, self._start, self._stops = encoder, start, stops

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_more: Any) -> torch.Tensor:  # noqa: ANN401, ARG002
        """Return (rows,) bool: which rows are complete."""
        texts = [self._encoder.decode(row) for row in input_ids[:, self._start :].tolist()]
        found = [find_first_stop(text, self._stops) is not None for text in texts]
        return torch.tensor(found, device=input_ids.device)
