"""Generation: complete a prompt, or fill in the middle, from an exported directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llm_training_toolkit.errors import CheckpointError, PlanError
from llm_training_toolkit.families import FAMILIES


@dataclass(frozen=True)
class Sentinels:
    """The fill-in-the-middle markers of a family."""

    prefix: str
    suffix: str
    middle: str


def sentinels_of(path: str | Path) -> Sentinels:
    """The markers that the tokenizer of an exported directory has. Raises PlanError when it has none."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds to import

    vocabulary = AutoTokenizer.from_pretrained(str(path)).get_vocab()
    for family in FAMILIES.values():
        tokens = family.special_tokens
        if tokens.has_fim and tokens.fim_prefix in vocabulary:
            return Sentinels(tokens.fim_prefix, tokens.fim_suffix, tokens.fim_middle)
    raise PlanError(f"{path}: the tokenizer has no fill-in-the-middle markers: this model cannot fill in the middle")


def exported_directory(path: Path) -> Path:
    """`path`, or the export of the run that lies there. Raises CheckpointError for a run without one."""
    if not (path / "resolved.json").is_file():
        return path
    if not (path / "export").is_dir():
        raise CheckpointError(
            f"{path} is a run without an export: ltt export {path} makes one of its newest checkpoint"
        )
    return path / "export"


class Generator:
    """A model loaded for generation."""

    def __init__(self, path: str | Path, device: str = "cpu") -> None:
        from transformers import AutoTokenizer  # noqa: PLC0415 - seconds to import
        from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

        from llm_training_toolkit.models.exported import open_exported  # noqa: PLC0415

        disable_progress_bar()
        self._model: Any = open_exported(Path(path)).to(device)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(path))

    def complete(self, prompt: str, *, tokens: int = 64, temperature: float = 0.0, seed: int = 0) -> str:
        """What the model writes after `prompt`, at most `tokens` tokens; temperature 0 = always the likeliest."""
        return self._continue(self._ids(prompt), tokens, temperature, seed)

    def infill(
        self,
        prefix: str,
        suffix: str,
        sentinels: Sentinels,
        *,
        tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """What the model writes between `prefix` and `suffix`, in prefix-suffix-middle order."""
        marks = [self._marker(name) for name in (sentinels.prefix, sentinels.suffix, sentinels.middle)]
        ids = [marks[0], *self._ids(prefix), marks[1], *self._ids(suffix), marks[2]]
        return self._continue(ids, tokens, temperature, seed)

    def _ids(self, text: str) -> list[int]:
        # Marker text inside a prompt is text, not a marker.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def _marker(self, name: str) -> int:
        found = self._tokenizer.get_vocab().get(name)
        if found is None:
            raise PlanError(f"the tokenizer has no {name}: this model cannot fill in the middle")
        return int(found)

    @torch.no_grad()
    def _continue(self, ids: list[int], tokens: int, temperature: float, seed: int) -> str:
        limit = int(self._model.config.max_position_embeddings)
        if not ids:
            raise PlanError("the prompt is empty: give at least one character")
        if len(ids) + tokens > limit:
            raise PlanError(f"prompt of {len(ids)} tokens plus {tokens} new ones exceed the model's context of {limit}")
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        prompt = torch.tensor([ids], device=self._model.device)
        mask = torch.ones_like(prompt)
        out = self._model.generate(prompt, attention_mask=mask, max_new_tokens=tokens, **sampling)
        text: str = self._tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        return text
