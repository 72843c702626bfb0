"""Exports a run's checkpoint, for `ltt export` and when a run finishes.

Written under a temporary name, reloaded, compared with the checkpoint, then renamed: complete or absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from llm_training_toolkit import families
from llm_training_toolkit.checkpoint import (
    BaseWeights,
    CheckpointReader,
    check_base_matches,
    list_complete_checkpoints,
    read_base_weights,
)
from llm_training_toolkit.checkpoint.hub_commit import find_hub_commit
from llm_training_toolkit.checkpoint.run import Run
from llm_training_toolkit.config import Config
from llm_training_toolkit.data.chat.template import ChatTemplate, read_special_tokens_map
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo, get_cache_directory
from llm_training_toolkit.data.tokenizer import open_tokenizer
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import CheckpointError, PlanError
from llm_training_toolkit.export import (
    CheckpointWeights,
    ModelFiles,
    WeightSource,
    atomic_export_dir,
    check_full_model,
    write_model,
)
from llm_training_toolkit.export.model_card import ExportKind, format_model_card
from llm_training_toolkit.families import AdapterSpec
from llm_training_toolkit.models import build_model
from llm_training_toolkit.runs.directory import RunDirectory, parse_checkpoint_name


@dataclass(frozen=True)
class ExportResult:
    """Result of an export."""

    path: str
    kind: ExportKind
    checkpoint: str
    """Name of the checkpoint."""
    step: int
    difference: float
    """Largest deviation of a logit, as a share of the largest logit. 0 except for merged adapters."""

    def __str__(self) -> str:
        same = "equal" if self.difference == 0.0 else f"within {self.difference:.2g} of the largest"
        return f"{self.kind} of {self.checkpoint} in {self.path}; logits compared with the checkpoint's: {same}"

    def to_json(self) -> dict[str, Any]:
        """Return the documented output of `ltt export --json`."""
        return asdict(self)


def export_run(
    run: RunDirectory, *, step: int | None, merge: bool, out: Path | None, say: Callable[[str], None]
) -> ExportResult:
    """Export the newest complete checkpoint of a run, or that of `step`, by default to a directory in the run.

    Raises CheckpointError for a missing or damaged checkpoint, and for adapters without their base.
    """
    disable_progress_bar()
    trained = Run.read(run)
    if merge and trained.config.model.lora is None:
        raise CheckpointError(
            f"{run.path}: there is nothing to merge, the run trained the model itself: leave out --merge"
        )
    checkpoint = select_checkpoint(run, step)
    suffix = ("" if step is None else f"_step_{step}") + ("_merged" if merge else "")
    destination = (out or run.path / f"export{suffix}").expanduser().absolute()
    _check_destination(destination, run)
    return export_checkpoint(trained, checkpoint, destination, merge=merge, say=say)


def _check_destination(destination: Path, run: RunDirectory) -> None:
    """Raise CheckpointError for a destination that is the adapters' base or inside another run."""
    destination = destination.resolve()
    around = RunDirectory(destination.parent)
    if around.resolved_config_path.is_file() and (
        around.path != run.path.resolve() or destination == around.base_weights_dir
    ):
        what = "what its adapters stand beside" if destination == around.base_weights_dir else "and that is another run"
        raise CheckpointError(f"--out {destination} belongs to {around.path}, {what}: name another directory")


def select_checkpoint(run: RunDirectory, step: int | None) -> CheckpointReader:
    """Return the newest complete checkpoint, or that of `step`. Raises CheckpointError if missing or damaged."""
    checkpoint = CheckpointReader(_select_checkpoint_path(run, step), run.storage)
    faults = checkpoint.verify_files()
    if faults:
        raise CheckpointError(f"{checkpoint.directory} is damaged: {faults[0]}. Take another one: --step")
    return checkpoint


def _select_checkpoint_path(run: RunDirectory, step: int | None) -> Path:
    found = list_complete_checkpoints(run.checkpoints_dir)
    steps = {place[0]: path for path in found if (place := parse_checkpoint_name(path))}
    if step is None and found:
        return found[-1]
    if step in steps:
        return steps[step]
    there = f"complete are steps {', '.join(map(str, steps))}" if steps else "the run has no complete checkpoint"
    if step is None:
        raise CheckpointError(f"{run.path}: nothing to export: {there}")
    half = any(run.checkpoints_dir.glob(f"step_{step:09d}_a*"))
    what = "is not complete (it has no manifest.json)" if half else "is not there"
    raise CheckpointError(f"{run.path}: the checkpoint of step {step} {what}; {there}")


def export_checkpoint(
    trained: Run,
    checkpoint: CheckpointReader,
    destination: Path,
    *,
    merge: bool,
    say: Callable[[str], None] | None = None,
) -> ExportResult:
    """Write a checkpoint to `destination`, and compare the result with it."""
    adapter = trained.get_adapter(checkpoint)
    config, precision = trained.config, trained.config.train.precision
    kind: ExportKind = "model" if adapter is None else "merged" if merge else "adapters"
    name, hub = checkpoint.directory.name, find_hub_commit(checkpoint.manifest.extra, config.model)
    text = format_model_card(
        trained.directory, config, trained.dataset_info, checkpoint.manifest, kind=kind, base=trained.base_path
    )
    about = build_model_files(config, trained.dataset_info, text, name)
    if say is not None:
        say(f"writing {kind} of {name}")
    with atomic_export_dir(destination) as directory:
        if adapter is None or merge:
            weights, hf_config = build_full_weights(trained, checkpoint)
            write_model(weights, directory, hf_config=hf_config, precision=precision, beside=about)
            del weights
        else:
            from llm_training_toolkit.export.adapters import AdapterBase, write_adapters

            check_adapter_base(trained, checkpoint)
            base = AdapterBase(trained.base_path, hub.commit if hub else None)
            write_adapters(checkpoint, directory, adapter, base=base, precision=precision, beside=about)
        if say is not None:
            say("comparing logits")
        difference = _check_export(trained, checkpoint, directory, adapter, kind)
    return ExportResult(
        trained.directory.storage.get_uri(destination), kind, name, checkpoint.manifest.step, difference
    )


def _check_export(
    trained: Run, checkpoint: CheckpointReader, directory: Path, adapter: AdapterSpec | None, kind: ExportKind
) -> float:
    precision = trained.config.train.precision
    if adapter is None:
        return check_full_model(directory, checkpoint, checkpoint.manifest.extra["hf_config"], precision)
    from llm_training_toolkit.export.adapters import check_adapters, get_merge_tolerance

    base, hf_config = trained.find_base_directory(checkpoint), checkpoint.manifest.extra["hf_config"]
    tolerance = get_merge_tolerance(hf_config, precision) if kind == "merged" else 0.0
    how = {"base": base, "hf_config": hf_config, "precision": precision, "tolerance": tolerance}
    return check_adapters(directory, checkpoint, adapter, **how)


def build_full_weights(trained: Run, checkpoint: CheckpointReader) -> tuple[WeightSource, Mapping[str, Any]]:
    """Return all weights of the trained model, adapters merged, and its Hugging Face configuration."""
    hf_config: Mapping[str, Any] = checkpoint.manifest.extra["hf_config"]
    adapter = trained.get_adapter(checkpoint)
    if adapter is None:
        return CheckpointWeights(checkpoint), hf_config
    from llm_training_toolkit.export.adapters import MergedWeights

    check_adapter_base(trained, checkpoint)
    path = trained.find_base_directory(checkpoint)
    base = build_model(hf_config, precision=trained.config.train.precision, attention="sdpa", path=path)
    return MergedWeights(base, checkpoint, adapter), hf_config


def check_adapter_base(trained: Run, checkpoint: CheckpointReader) -> None:
    """Raise CheckpointError unless the base of a checkpoint's adapters is present and unchanged."""
    alone = RunContext(0, 1, torch.device("cpu"))
    found = read_base_weights(trained.find_base_directory(checkpoint), alone, get_cache_directory(trained.config))
    check_base_matches(BaseWeights.from_json(checkpoint.manifest.extra["base"]), replace(found, path=trained.base_path))


def build_model_files(config: Config, dataset_info: DatasetInfo, text: str, origin: str) -> ModelFiles:
    """Return the files to write besides a run's weights."""
    return ModelFiles(
        tokenizer=Path(dataset_info.tokenizer_path),
        stop_token_ids=find_stop_tokens(config, dataset_info),
        pad=dataset_info.pad_id,
        card=text,
        checkpoint_name=origin,
        run_name=config.run.name,
    )


def find_stop_tokens(config: Config, dataset_info: DatasetInfo) -> dict[str, int]:
    """Return the special tokens that end generation, with their ids: the end of an answer first, then the model's own.

    A chat-tuned model still ends its turns after training on text; its tokenizer names the token.
    """
    directory, encoder = Path(dataset_info.tokenizer_path), open_tokenizer(dataset_info.tokenizer_path)
    family = families.find_tokenizer_family(config.model.name, encoder.has_special_token)
    if family is None:
        raise PlanError(f"{directory}: the tokenizer is of no known family: it has none of their ends of text")
    end_of_text = family.special_tokens.end_of_text
    own = read_special_tokens_map(directory).get("eos_token", end_of_text)
    ends = [own if encoder.has_special_token(own) else end_of_text, end_of_text]
    if any(source.format == "chat" for source in config.data.sources):
        ends.insert(0, ChatTemplate.from_tokenizer(directory, family.chat_template).end_of_turn or end_of_text)
    return {token: encoder.get_special_token_id(token) for token in dict.fromkeys(ends)}
