"""What a model writes after each of many prompts, some prompts at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria

from llm_training_toolkit.data.code.fim import draw
from llm_training_toolkit.data.tokenizer import TextEncoder
from llm_training_toolkit.evaluation.model import Subject

_TOP_P = 0.95
"""With a temperature: the likeliest tokens that make up this share, as Codex, StarCoder and Qwen2.5-Coder sampled."""


@dataclass(frozen=True)
class Writing:
    """How answers are written.

    tokens: most new ones; fewer where the context ends. stops: texts that end an answer, and are no part of it.
    temperature 0: always the likeliest token.
    """

    tokens: int
    stops: Sequence[str] = ()
    temperature: float = 0.0
    seed: int = 0
    batch: int = 8


@dataclass(frozen=True)
class Written:
    """What was written, and whether the model ended it itself: by a special token, or a text that is a stop."""

    text: str
    ended: bool


def write(
    subject: Subject, prompts: Sequence[list[int]], how: Writing, done: Callable[[int], None] = lambda _: None
) -> list[Written]:
    """The answer to each prompt, given as token ids of 1 to context - 1 tokens. Any special token ends an answer.

    Prompts of like length are answered together, so that none waits for the room of a longer one. With a temperature
    the answers depend on the seed and the batch.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, Written] = {}
    for start in range(0, len(order), how.batch):
        together = order[start : start + how.batch]
        torch.manual_seed(int(draw(how.seed, 0, 0, start, "answers").first * 2**53))
        found = _answers(subject, [prompts[index] for index in together], how)
        answers |= dict(zip(together, found, strict=True))
        done(len(answers))
    return [answers[index] for index in range(len(prompts))]


@torch.no_grad()
def _answers(subject: Subject, prompts: Sequence[list[int]], how: Writing) -> list[Written]:
    longest = max(map(len, prompts))
    pad = subject.encoder.id_of(subject.markers.tokens.pad)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=subject.device)
    seen = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=subject.device
    )
    ends = _ends(subject)
    # What the model's own file says of sampling is not what was asked for here.
    subject.lm.generation_config = GenerationConfig(
        max_new_tokens=min(how.tokens, subject.context - longest),
        eos_token_id=ends,
        pad_token_id=pad,
        use_cache=True,
        **({"do_sample": True, "temperature": how.temperature, "top_p": _TOP_P, "top_k": 0} if how.temperature else {}),
    )
    criteria = [_Stops(subject.encoder, longest, how.stops)] if how.stops else []
    out = subject.lm.generate(ids, attention_mask=seen, stopping_criteria=criteria)
    return [_written(row[longest:], subject.encoder, frozenset(ends), how.stops) for row in out.tolist()]


def _ends(subject: Subject) -> list[int]:
    """The ids that end an answer: code and prose have no special token in them."""
    return [subject.encoder.id_of(token) for token in subject.markers.tokens.all if subject.encoder.knows(token)]


def _written(ids: Sequence[int], encoder: TextEncoder, ends: frozenset[int], stops: Sequence[str]) -> Written:
    length = next((place for place, token in enumerate(ids) if token in ends), None)
    text = encoder.decode(ids[:length])
    cut = first_stop(text, stops)
    return Written(text[:cut], ended=length is not None or cut is not None)


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stops begins; None where the text has none."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


class _Stops(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Ends an answer that has come to one of the stops."""

    def __init__(self, encoder: TextEncoder, start: int, stops: Sequence[str]) -> None:
        self._encoder, self._start, self._stops = encoder, start, stops

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_more: Any) -> torch.Tensor:  # noqa: ANN401, ARG002
        """(rows,) bool: which answers are complete."""
        texts = [self._encoder.decode(row) for row in input_ids[:, self._start :].tolist()]
        found = [first_stop(text, self._stops) is not None for text in texts]
        return torch.tensor(found, device=input_ids.device)
