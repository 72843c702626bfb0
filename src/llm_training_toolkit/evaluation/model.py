"""Model under evaluation: directory, source run, tokenizer, family and context length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from llm_training_toolkit import families
from llm_training_toolkit.checkpoint.run import Run
from llm_training_toolkit.data.tokenizer import TextEncoder, TokenizationSpec, open_tokenizer
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.export import read_source_checkpoint_name
from llm_training_toolkit.models.load_exported import load_exported_model, move_to_device, resolve_device
from llm_training_toolkit.runs.directory import RunDirectory, find_model_directory, parse_checkpoint_name
from llm_training_toolkit.runs.storage.storage import LocalStorage, Storage

# Tokens, for a model without a run. A published model may allow 262,144, and attention over that many needs more memory
# than most machines have.
_MAX_DEFAULT_CONTEXT = 4096


@dataclass(frozen=True)
class ExportedRun(Run):
    """A run that a model was exported from, and the model's step."""

    step: int


class EvalModel:
    """Model to evaluate. Weights and tokenizer are loaded on first access."""

    def __init__(
        self, path: Path, *, storage: Storage | None = None, device: str = "auto", context: int | None = None
    ) -> None:
        self.directory, self._requested_context = find_model_directory(path), context
        self.device = torch.device(resolve_device(device))
        self.origin = _find_exported_run(RunDirectory(self.directory.parent, storage or LocalStorage()), self.directory)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Tokenizer. Special-token text in documents is encoded as plain text."""
        return open_tokenizer(str(self.directory))

    @cached_property
    def tokenization_spec(self) -> TokenizationSpec:
        """Tokenization rules of the run's family, or of the family with the most special tokens in the tokenizer."""
        name = self.origin.config.model.name if self.origin is not None else ""
        family = families.find_tokenizer_family(name, self.text_encoder.has_special_token)
        if family is None:
            raise PlanError(f"{self.directory}: its tokenizer is of no family that is known here (no end of text)")
        return TokenizationSpec.from_family(family)

    @cached_property
    def language_model(self) -> Any:  # noqa: ANN401 - transformers has no types
        """Hugging Face model, on `device`."""
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        return move_to_device(load_exported_model(self.directory), self.device)

    @cached_property
    def context_length(self) -> int:
        """Maximum tokens per sequence: as requested, else the run's `sequence_length`, else at most 4,096.

        Raises PlanError if the request exceeds the model's positions.
        """
        allowed = int(self.language_model.config.max_position_embeddings)
        if self._requested_context is not None:
            if self._requested_context > allowed:
                raise PlanError(f"--context {self._requested_context}: the model has {allowed} positions")
            return self._requested_context
        return self.origin.config.data.sequence_length if self.origin else min(allowed, _MAX_DEFAULT_CONTEXT)


def _find_exported_run(run: RunDirectory, exported: Path) -> ExportedRun | None:
    """Return the run that contains an `ltt export` directory, or None for an export outside a run."""
    checkpoint = read_source_checkpoint_name(exported)
    place = parse_checkpoint_name(Path(checkpoint)) if checkpoint is not None else None
    if place is None or not (run.resolved_config_path.is_file() and run.dataset_info_path.is_file()):
        return None
    found = Run.read(run)
    return ExportedRun(run, found.config, found.dataset_info, place[0])
