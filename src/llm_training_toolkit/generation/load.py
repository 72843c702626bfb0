"""`ltt generate`: opens what a person named, an export, adapters with their base, or a checkpoint of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from llm_training_toolkit.export.export_run import checkpoint_of, ends_of, read_run, refuse_missing_base
from llm_training_toolkit.export.weights import load_stored
from llm_training_toolkit.generation.generator import Generator
from llm_training_toolkit.models import build_model
from llm_training_toolkit.models.build import DTYPES
from llm_training_toolkit.models.load_exported import device_of, on_device
from llm_training_toolkit.runs.directory import RunDirectory, model_directory, run_of
from llm_training_toolkit.runs.storage import storage_of


def open_model(path: Path, *, step: int | None, device: str) -> tuple[Generator, str]:
    """The model at a path, and where it was read from.

    A run's export where it has one and no `step` is asked for, otherwise its checkpoint. Raises CheckpointError where
    there is neither, and for adapters without their base.
    """
    run = RunDirectory(path)
    if step is not None or (run.resolved.is_file() and not run.export.is_dir()):
        return open_checkpoint(run_of(path), step, device_of(device))
    directory = model_directory(path)
    return Generator.open(directory, device_of(device)), storage_of(directory).address(directory)


def open_checkpoint(run: RunDirectory, step: int | None, device: str) -> tuple[Generator, str]:
    """The model of a checkpoint, of the newest complete one without `step`, in the run's precision."""
    trained = read_run(run)
    checkpoint = checkpoint_of(run, step)
    adapter, precision = trained.adapter(checkpoint), trained.config.train.precision
    hf_config = checkpoint.manifest.extra["hf_config"]
    model: Any
    if adapter is None:
        model = build_model(hf_config, precision=precision, attention="sdpa")
    else:
        from llm_training_toolkit.models.lora import add_adapters

        refuse_missing_base(trained, checkpoint)
        model = build_model(hf_config, precision=precision, attention="sdpa", path=trained.base)
        add_adapters(model, adapter, seed=0, dtype=DTYPES[precision])
    load_stored(model, checkpoint)
    ends = ends_of(trained.config, trained.receipt)
    model.generation_config = GenerationConfig(eos_token_id=list(ends.values()), pad_token_id=trained.receipt.pad_id)
    model.config.use_cache = True
    opened = Generator(on_device(model.eval(), device), Path(trained.receipt.tokenizer_path))
    return opened, storage_of(checkpoint.directory).address(checkpoint.directory)
