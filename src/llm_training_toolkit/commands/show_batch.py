"""`ltt show-batch`: the exact sequences of a step, for a run that has started or not."""

from __future__ import annotations

from typing import Any

from rich.console import Console as Terminal
from rich.text import Text

from llm_training_toolkit.checkpoint import list_complete_checkpoints, read_manifest
from llm_training_toolkit.config import Config
from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.data.prepare.epochs import build_data_facts, prepare_epochs
from llm_training_toolkit.data.preview import DocumentPreview, SequencePreview, preview_step
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.families import recall_plan
from llm_training_toolkit.launch.backend import create_dataset_builder
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.plan import check_plan, make_plan
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.printable import escape_control_characters
from llm_training_toolkit.runs.storage.open import get_run_location, open_path
from llm_training_toolkit.setup.hub_weights import ask_for_size
from llm_training_toolkit.setup.resume import check_run_unchanged, read_resume_state

_LOSS, _PLAIN, _SPECIAL = "black on bright_green", "dim", "bold"


def load_batch_sequences(config: Config, step: int, console: Console) -> list[SequencePreview]:
    """Return the sequences of step `step`, counted from 1; prepare the data if needed.

    Raises PlanError for a step outside the run.
    """
    with open_path(get_run_location(config)) as run:
        return _load_run_batch(run, config, step, console)


def _load_run_batch(run: RunDirectory, config: Config, step: int, console: Console) -> list[SequencePreview]:
    config = recall_plan(config, run.path)
    ask_for_size(config, console.print_line)
    resume_state = read_resume_state(run)
    check_run_unchanged(resume_state, config, (), extend=False)
    dataset_info = (
        resume_state.find_reusable_dataset(config, ())
        or prepare_epochs(
            create_dataset_builder(config, console), config, resume_state.step, resume_state.sequences, until=step
        ).dataset_info
    )
    data_facts = build_data_facts(dataset_info, resume_state.step, resume_state.sequences)
    plan = check_plan(make_plan(config).with_data(data_facts))
    if not 1 <= step <= (plan.steps or step):
        raise PlanError(f"--step {step}: the run has the steps 1 to {plan.steps}")
    origin = _find_checkpoint_before(run, dataset_info, plan.global_batch, step)
    sequences = PackedDataset(dataset_info, global_batch=plan.global_batch, epochs=config.train.epochs, origin=origin)
    return preview_step(sequences, step)


def _find_checkpoint_before(
    run: RunDirectory, dataset_info: DatasetInfo, global_batch: int, step: int
) -> tuple[int, int]:
    """Return (steps, sequences) of the last checkpoint before the step.

    A short last step of an epoch or a new batch size breaks sequences = steps x global batch. Raises PlanError if that
    happened at an unknown step between two remaining checkpoints.
    """
    manifests = (read_manifest(directory) for directory in list_complete_checkpoints(run.checkpoints_dir))
    positions = sorted(
        (each.step, each.sequences) for each in manifests if each.data_fingerprint == dataset_info.fingerprint
    )
    origin = max((position for position in positions if position[0] < step), default=(0, 0))
    later = next((position for position in positions if position[0] >= step), None)
    if later and later[1] - origin[1] != (later[0] - origin[0]) * global_batch and later[0] > step:
        raise PlanError(
            f"--step {step}: between the steps {origin[0]} and {later[0]} the run had a short step or another "
            "train.global_batch_size, and the checkpoint that knows where is gone. Steps outside of these can be shown"
        )
    return origin


def build_batch_json(step: int, shown: list[SequencePreview]) -> dict[str, Any]:
    """Return the JSON object of `ltt show-batch --json`."""
    return {"step": step, "sequences": [sequence.to_json() for sequence in shown]}


def print_batch(step: int, shown: list[SequencePreview], terminal: Terminal) -> None:
    """Print every sequence as text: predicted tokens on green, special tokens bold, the rest dim."""
    legend = Text.assemble("to be predicted", " is ", ("like this", _LOSS), ", the rest ", ("like this", _PLAIN))
    terminal.print(f"step {step}: {len(shown)} sequences;", legend)
    for number, sequence in enumerate(shown, start=1):
        terminal.rule(f"sequence {number}", align="left")
        for piece in sequence.pieces:
            terminal.print(_format_heading(piece), _format_piece(piece), sep="\n", soft_wrap=True)
        if sequence.padding:
            terminal.print(f"({sequence.padding:,} tokens of padding)", style=_PLAIN)


def _format_heading(piece: DocumentPreview) -> Text:
    numbers = f"{piece.tokens:,} tokens, {piece.loss_tokens:,} to be predicted"
    return Text(escape_control_characters(f"{piece.source}: {piece.document} ({numbers})"), style="cyan")


def _format_piece(piece: DocumentPreview) -> Text:
    segments = []
    for stretch in piece.spans:
        style = _LOSS if stretch.loss else _PLAIN
        segments.append((escape_control_characters(stretch.text), f"{style} {_SPECIAL}" if stretch.special else style))
    return Text.assemble(*segments)
