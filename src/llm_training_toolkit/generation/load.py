"""Opens the model for `ltt generate`: an export, adapters with their base, or a checkpoint of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from llm_training_toolkit.checkpoint.run import Run
from llm_training_toolkit.export.export_run import check_adapter_base, find_stop_tokens, select_checkpoint
from llm_training_toolkit.export.weights import load_stored_weights
from llm_training_toolkit.generation.generator import TextGenerator
from llm_training_toolkit.models import build_model
from llm_training_toolkit.models.build import DTYPES
from llm_training_toolkit.models.load_exported import move_to_device, resolve_device
from llm_training_toolkit.runs.directory import RunDirectory, check_run, find_model_directory


def open_model(run: RunDirectory, *, step: int | None, device: str) -> tuple[TextGenerator, str]:
    """Return the model of a run or exported directory, and the URI it was read from.

    For a run: its export if there is one and `step` is None, else a checkpoint. Raises CheckpointError if both are
    missing, and for adapters without their base.
    """
    if step is not None or (run.resolved_config_path.is_file() and not run.export_dir.is_dir()):
        return open_checkpoint(check_run(run), step, resolve_device(device))
    directory = find_model_directory(run.path)
    return TextGenerator.from_directory(directory, resolve_device(device)), run.storage.get_uri(directory)


def open_checkpoint(run: RunDirectory, step: int | None, device: str) -> tuple[TextGenerator, str]:
    """Open the checkpoint of `step`, by default the newest complete one, in the run's precision."""
    trained = Run.read(run)
    checkpoint = select_checkpoint(run, step)
    adapter, precision = trained.get_adapter(checkpoint), trained.config.train.precision
    hf_config = checkpoint.manifest.extra["hf_config"]
    model: Any
    if adapter is None:
        model = build_model(hf_config, precision=precision, attention="sdpa")
    else:
        from llm_training_toolkit.models.lora import add_adapters

        check_adapter_base(trained, checkpoint)
        base = trained.find_base_directory(checkpoint)
        model = build_model(hf_config, precision=precision, attention="sdpa", path=base)
        add_adapters(model, adapter, seed=0, dtype=DTYPES[precision])
    load_stored_weights(model, checkpoint)
    ends = find_stop_tokens(trained.config, trained.dataset_info)
    model.generation_config = GenerationConfig(
        eos_token_id=list(ends.values()), pad_token_id=trained.dataset_info.pad_id
    )
    model.config.use_cache = True
    opened = TextGenerator(move_to_device(model.eval(), device), Path(trained.dataset_info.tokenizer_path))
    return opened, run.storage.get_uri(checkpoint.directory)
