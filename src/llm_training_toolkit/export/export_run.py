"""A run's checkpoint as a directory for other programs: what `ltt export` calls, and a run when it finishes.

Written under a temporary name, loaded again and compared with the checkpoint, then renamed: complete or absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from llm_training_toolkit import families
from llm_training_toolkit.checkpoint import Base, Checkpoint, base_of, complete, refuse_other_base
from llm_training_toolkit.config import Config, from_json
from llm_training_toolkit.data.chat.template import ChatTemplate, named_tokens
from llm_training_toolkit.data.prepare.dataset_info import Receipt
from llm_training_toolkit.data.tokenizer import open_tokenizer
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.export import Beside, CheckpointWeights, Weights, appearing, check_whole, write_model
from llm_training_toolkit.export.model_card import Kind, card
from llm_training_toolkit.families import Adapter
from llm_training_toolkit.models import build_model
from llm_training_toolkit.runs.directory import RunDirectory, checkpoint_place
from llm_training_toolkit.runs.storage import storage_of


@dataclass(frozen=True)
class Trained:
    """A run as it lies on disk."""

    run: RunDirectory
    config: Config
    receipt: Receipt

    def adapter(self, checkpoint: Checkpoint) -> Adapter | None:
        """The run's adapters; None where the model itself was trained."""
        return families.adapter(self.config, checkpoint.manifest.extra["hf_config"])

    @property
    def base(self) -> str:
        """Where the weights lie that its adapters stand beside."""
        return self.config.model.path or str(self.run.base)


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: str
    kind: Kind
    checkpoint: str
    """Name of the checkpoint."""
    step: int
    difference: float
    """Largest difference of a logit from the checkpoint's, as a share of the largest: 0 but for merged adapters."""

    def __str__(self) -> str:
        same = "equal" if self.difference == 0.0 else f"within {self.difference:.2g} of the largest"
        return f"{self.kind} of {self.checkpoint} in {self.path}; logits compared with the checkpoint's: {same}"

    def to_json(self) -> dict[str, Any]:
        """The contract of `ltt export --json`."""
        return asdict(self)


def read_run(run: RunDirectory) -> Trained:
    """A run's configuration and receipt. Raises CheckpointError where it has none."""
    if not run.receipt.is_file():
        raise CheckpointError(f"{run.path}: nothing was trained there yet (no data/receipt.json)")
    config = from_json(run.resolved.read_text(), where=str(run.resolved))
    return Trained(run, config, Receipt.from_json(run.receipt.read_text()))


def export_run(
    run: RunDirectory, *, step: int | None, merge: bool, out: Path | None, say: Callable[[str], None]
) -> Exported:
    """Export the newest complete checkpoint of a run, or that of `step`; by default beside the run's own export.

    Raises CheckpointError where there is none, where it is damaged, and for adapters without their base.
    """
    disable_progress_bar()
    trained = read_run(run)
    if merge and trained.config.model.lora is None:
        raise CheckpointError(
            f"{run.path}: there is nothing to merge, the run trained the model itself: leave out --merge"
        )
    checkpoint = checkpoint_of(run, step)
    suffix = ("" if step is None else f"_step_{step}") + ("_merged" if merge else "")
    destination = (out or run.path / f"export{suffix}").expanduser().absolute()
    _refuse_what_others_need(destination, run)
    return export_checkpoint(trained, checkpoint, destination, merge=merge, say=say)


def _refuse_what_others_need(destination: Path, run: RunDirectory) -> None:
    """Raise CheckpointError where an export would take the place of adapters' base, or of something in another run."""
    destination = destination.resolve()
    around = RunDirectory(destination.parent)
    if around.resolved.is_file() and (around.path != run.path.resolve() or destination == around.base):
        what = "what its adapters stand beside" if destination == around.base else "and that is another run"
        raise CheckpointError(f"--out {destination} belongs to {around.path}, {what}: name another directory")


def checkpoint_of(run: RunDirectory, step: int | None) -> Checkpoint:
    """The newest complete checkpoint of a run, or that of `step`. Raises CheckpointError without it, or damaged."""
    checkpoint = Checkpoint(_chosen(run, step))
    faults = checkpoint.faults()
    if faults:
        raise CheckpointError(f"{checkpoint.directory} is damaged: {faults[0]}. Take another one: --step")
    return checkpoint


def _chosen(run: RunDirectory, step: int | None) -> Path:
    """The directory of a complete checkpoint."""
    found = complete(run.checkpoints)
    steps = {place[0]: path for path in found if (place := checkpoint_place(path))}
    if step is None and found:
        return found[-1]
    if step in steps:
        return steps[step]
    there = f"complete are steps {', '.join(map(str, steps))}" if steps else "the run has no complete checkpoint"
    if step is None:
        raise CheckpointError(f"{run.path}: nothing to export: {there}")
    half = any(run.checkpoints.glob(f"step_{step:09d}_a*"))
    what = "is not complete (it has no manifest.json)" if half else "is not there"
    raise CheckpointError(f"{run.path}: the checkpoint of step {step} {what}; {there}")


def export_checkpoint(
    trained: Trained, checkpoint: Checkpoint, destination: Path, *, merge: bool, say: Callable[[str], None]
) -> Exported:
    """Write a checkpoint to `destination` and compare what was written with it."""
    adapter = trained.adapter(checkpoint)
    config, precision = trained.config, trained.config.train.precision
    kind: Kind = "model" if adapter is None else "merged" if merge else "adapters"
    name = checkpoint.directory.name
    text = card(trained.run, config, trained.receipt, checkpoint.manifest, kind=kind, base=trained.base)
    about = beside(config, trained.receipt, text, name)
    say(f"writing {kind} of {name}")
    with appearing(destination) as directory:
        if adapter is None or merge:
            weights, hf_config = whole_weights(trained, checkpoint)
            write_model(weights, directory, hf_config=hf_config, precision=precision, beside=about)
            del weights
        else:
            from llm_training_toolkit.export.adapters import write_adapters

            refuse_missing_base(trained, checkpoint)
            write_adapters(checkpoint, directory, adapter, base=trained.base, precision=precision, beside=about)
        say("comparing logits")
        difference = _check(trained, checkpoint, directory, adapter, kind)
    return Exported(storage_of(destination).address(destination), kind, name, checkpoint.manifest.step, difference)


def _check(trained: Trained, checkpoint: Checkpoint, directory: Path, adapter: Adapter | None, kind: Kind) -> float:
    precision = trained.config.train.precision
    if adapter is None:
        return check_whole(directory, checkpoint, checkpoint.manifest.extra["hf_config"], precision)
    from llm_training_toolkit.export.adapters import MERGE_TOLERANCE, check_adapters

    tolerance = MERGE_TOLERANCE[precision] if kind == "merged" else 0.0
    base, hf_config = trained.base, checkpoint.manifest.extra["hf_config"]
    how = {"base": base, "hf_config": hf_config, "precision": precision, "tolerance": tolerance}
    return check_adapters(directory, checkpoint, adapter, **how)


def whole_weights(trained: Trained, checkpoint: Checkpoint) -> tuple[Weights, Mapping[str, Any]]:
    """All weights of the trained model, adapters merged into them, and its Hugging Face configuration."""
    hf_config: Mapping[str, Any] = checkpoint.manifest.extra["hf_config"]
    adapter = trained.adapter(checkpoint)
    if adapter is None:
        return CheckpointWeights(checkpoint), hf_config
    from llm_training_toolkit.export.adapters import MergedWeights

    refuse_missing_base(trained, checkpoint)
    base = build_model(hf_config, precision=trained.config.train.precision, attention="sdpa", path=trained.base)
    return MergedWeights(base, checkpoint, adapter), hf_config


def refuse_missing_base(trained: Trained, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the base of a checkpoint's adapters is there and what it was."""
    alone = RunContext(0, 1, torch.device("cpu"))
    refuse_other_base(Base.from_json(checkpoint.manifest.extra["base"]), base_of(trained.base, alone))


def beside(config: Config, receipt: Receipt, text: str, origin: str) -> Beside:
    """What stands beside a run's weights."""
    return Beside(
        tokenizer=Path(receipt.tokenizer_path),
        ends=ends_of(config, receipt),
        pad=receipt.pad_id,
        card=text,
        origin=origin,
    )


def ends_of(config: Config, receipt: Receipt) -> dict[str, int]:
    """The special tokens that the model ends with, that of an answer first: those it has learnt here, and its own.

    With their ids. A model that was tuned to converse still ends its turns after a training on text, and its tokenizer
    says by what.
    """
    family, directory = families.find(config.model.name).family, Path(receipt.tokenizer_path)
    encoder = open_tokenizer(receipt.tokenizer_path)
    end_of_text = family.special_tokens.end_of_text
    own = named_tokens(directory).get("eos_token", end_of_text)
    ends = [own if encoder.knows(own) else end_of_text, end_of_text]
    if any(source.format == "chat" for source in config.data.sources):
        ends.insert(0, ChatTemplate.open(directory, family.chat_template).end_of_turn or end_of_text)
    return {token: encoder.id_of(token) for token in dict.fromkeys(ends)}
