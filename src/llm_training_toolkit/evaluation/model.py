"""The model that is evaluated: where it lies, the run it came from, its tokenizer, its family and its context."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llm_training_toolkit import families
from llm_training_toolkit.config import Config, from_json
from llm_training_toolkit.data.prepare.dataset_info import Receipt
from llm_training_toolkit.data.tokenizer import Markers, TextEncoder, open_tokenizer
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.export import exported_from
from llm_training_toolkit.models.load_exported import device_of, on_device, open_exported
from llm_training_toolkit.runs.directory import RunDirectory, checkpoint_place, model_directory

_LONGEST = 4096
"""Tokens of context where no run says how long its sequences were: a published model may allow 262,144, whose attention
needs more memory than most machines have."""


@dataclass(frozen=True)
class Origin:
    """The run that a model came from."""

    run: RunDirectory
    config: Config
    receipt: Receipt
    step: int


class Subject:
    """A model to be evaluated. It is loaded when it is first asked for something."""

    def __init__(self, path: Path, *, device: str = "auto", context: int | None = None) -> None:
        self.directory, self._asked = model_directory(path), context
        self.device = torch.device(device_of(device))
        self.origin = _origin(RunDirectory(self.directory.parent), self.directory)

    @cached_property
    def encoder(self) -> TextEncoder:
        """The tokenizer. Marker text stays text."""
        return open_tokenizer(str(self.directory))

    @cached_property
    def markers(self) -> Markers:
        """What decides about tokens in its family: the run's, or that whose special tokens the tokenizer has."""
        if self.origin is not None:
            return Markers.of(families.find(self.origin.config.model.name).family)
        known = [
            (sum(map(self.encoder.knows, family.special_tokens.all)), family)
            for family in families.FAMILIES.values()
            if self.encoder.knows(family.special_tokens.end_of_text)
        ]
        if not known:
            raise PlanError(f"{self.directory}: its tokenizer is of no family that is known here (no end of text)")
        return Markers.of(max(known, key=lambda pair: pair[0])[1])

    @cached_property
    def lm(self) -> Any:  # noqa: ANN401 - transformers has no types
        """The model itself, on its device."""
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        return on_device(open_exported(self.directory), self.device)

    @cached_property
    def context(self) -> int:
        """Tokens the model sees at most: as asked for, as its run's sequences, or what it allows up to 4,096.

        Raises PlanError where more is asked for than it allows.
        """
        allowed = int(self.lm.config.max_position_embeddings)
        if self._asked is not None:
            if self._asked > allowed:
                raise PlanError(f"--context {self._asked}: the model has {allowed} positions")
            return self._asked
        return self.origin.config.data.sequence_length if self.origin else min(allowed, _LONGEST)


def _origin(run: RunDirectory, exported: Path) -> Origin | None:
    """The run that an export lies in, as `ltt export` writes it; None where it lies elsewhere."""
    checkpoint = exported_from(exported)
    place = checkpoint_place(Path(checkpoint)) if checkpoint is not None else None
    if place is None or not (run.resolved.is_file() and run.receipt.is_file()):
        return None
    config = from_json(run.resolved.read_text(), where=str(run.resolved))
    return Origin(run, config, Receipt.from_json(run.receipt.read_text()), place[0])
