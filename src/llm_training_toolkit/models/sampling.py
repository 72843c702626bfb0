"""Sampling parameters and completions, for generation and evaluation alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters. max_new_tokens: capped by the context. temperature 0: greedy. top_p 1: no nucleus."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Completion:
    """Generated text. `ended`: by an end token or a stop text, rather than at max_new_tokens."""

    text: str
    ended: bool


def set_generation_config(
    model: Any,  # noqa: ANN401 - transformers has no types
    how: SamplingParams,
    *,
    room: int,
    eos_ids: Sequence[int],
    pad_id: int | None,
) -> None:
    """Replace the model's generation configuration, and its base's; `room` caps the new tokens.

    `generate` fills whatever a configuration leaves open from the model's generation_config.json and from
    transformers' defaults (top_k 50), so top_k, top_p or a repetition penalty would apply unasked. Adapters without a
    `task_type` generate by the configuration of their base alone.
    """
    sampling = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=min(how.max_new_tokens, room),
        eos_token_id=list(eos_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
        **(sampling if how.temperature > 0 else {"do_sample": False}),
    )
    for each in (model, model.get_base_model()) if hasattr(model, "get_base_model") else (model,):
        each.generation_config = config
