"""`ltt show-batch`: the exact sequences of a step, of a run that has begun or of one that has not."""

from __future__ import annotations

from typing import Any

from rich.console import Console as Terminal
from rich.text import Text

from llm_training_toolkit.checkpoint import Checkpoint, complete
from llm_training_toolkit.config import Config
from llm_training_toolkit.data.dataset import Sequences
from llm_training_toolkit.data.prepare.dataset_info import Receipt
from llm_training_toolkit.data.prepare.epochs import facts_of, prepare_epochs
from llm_training_toolkit.data.preview import ShownPiece, ShownSequence, shown_step
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.launch.backend import preparation_of
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.plan import make_plan, require
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.storage import opened
from llm_training_toolkit.runs.storage.open import place_of
from llm_training_toolkit.setup.resume import refuse_changed_run, standing_of

_LOSS, _PLAIN, _SPECIAL = "black on bright_green", "dim", "bold"


def show_batch(config: Config, step: int, console: Console) -> list[ShownSequence]:
    """The sequences of the step numbered `step`, the first being 1; the data is prepared when it has not been.

    Raises PlanError for a step outside the run.
    """
    with opened(place_of(config)) as path:
        return _shown(RunDirectory(path), config, step, console)


def _shown(run: RunDirectory, config: Config, step: int, console: Console) -> list[ShownSequence]:
    standing = standing_of(run)
    refuse_changed_run(standing, config, (), extend=False)
    receipt = (
        standing.prepared(config, ())
        or prepare_epochs(
            preparation_of(config, console), config, standing.step, standing.sequences, until=step
        ).receipt
    )
    plan = require(make_plan(config, facts_of(receipt, standing.step, standing.sequences)))
    if not 1 <= step <= (plan.steps or step):
        raise PlanError(f"--step {step}: the run has the steps 1 to {plan.steps}")
    origin = _origin(run, receipt, plan.global_batch, step)
    sequences = Sequences(receipt, global_batch=plan.global_batch, epochs=config.train.epochs, origin=origin)
    return shown_step(sequences, step)


def _origin(run: RunDirectory, receipt: Receipt, global_batch: int, step: int) -> tuple[int, int]:
    """(steps, sequences) of the last checkpoint before the step: after an epoch's short last step they part ways.

    Raises PlanError where they have parted between two checkpoints that are left, and nobody knows at which step.
    """
    manifests = (Checkpoint(directory).manifest for directory in complete(run.checkpoints))
    places = sorted((each.step, each.sequences) for each in manifests if each.data_fingerprint == receipt.fingerprint)
    origin = max((place for place in places if place[0] < step), default=(0, 0))
    later = next((place for place in places if place[0] >= step), None)
    if later and later[1] - origin[1] != (later[0] - origin[0]) * global_batch and later[0] > step:
        raise PlanError(
            f"--step {step}: between the steps {origin[0]} and {later[0]} the run had a short step or another "
            "train.global_batch, and the checkpoint that knows where is gone. Steps outside of these can be shown"
        )
    return origin


def batch_json(step: int, shown: list[ShownSequence]) -> dict[str, Any]:
    """The contract of `ltt show-batch --json`."""
    return {"step": step, "sequences": [sequence.to_json() for sequence in shown]}


def print_batch(step: int, shown: list[ShownSequence], terminal: Terminal) -> None:
    """Every sequence as text: what is to be predicted on green, special tokens bold, the rest dim."""
    legend = Text.assemble("to be predicted", " is ", ("like this", _LOSS), ", the rest ", ("like this", _PLAIN))
    terminal.print(f"step {step}: {len(shown)} sequences;", legend)
    for number, sequence in enumerate(shown, start=1):
        terminal.rule(f"sequence {number}", align="left")
        for piece in sequence.pieces:
            terminal.print(_heading(piece), _text(piece), sep="\n", soft_wrap=True)
        if sequence.padding:
            terminal.print(f"({sequence.padding:,} tokens of padding)", style=_PLAIN)


def _heading(piece: ShownPiece) -> Text:
    numbers = f"{piece.tokens:,} tokens, {piece.loss_tokens:,} to be predicted"
    return Text(f"{piece.source}: {piece.document} ({numbers})", style="cyan")


def _text(piece: ShownPiece) -> Text:
    parts = []
    for stretch in piece.stretches:
        style = _LOSS if stretch.loss else _PLAIN
        parts.append((stretch.text, f"{style} {_SPECIAL}" if stretch.special else style))
    return Text.assemble(*parts)
