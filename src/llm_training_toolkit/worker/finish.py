"""The end of a run: export the newest checkpoint, then let the exported model show and measure what it can do.

Called by rank 0 when training is over, and by the next start if that was cut short. The samples
continue held-out documents, so that they suit whatever the run was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from llm_training_toolkit.checkpoint import Checkpoint, newest
from llm_training_toolkit.config import Config
from llm_training_toolkit.data.dataloader import held_out_beginnings
from llm_training_toolkit.data.prepare.dataset_info import Receipt
from llm_training_toolkit.distributed.context import Event, RunContext
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.evaluation.run_tasks import are_carried_out, carry_out, reason
from llm_training_toolkit.export import exported_from
from llm_training_toolkit.export.export_run import Trained, export_checkpoint
from llm_training_toolkit.generation.generator import Generator, Writing
from llm_training_toolkit.monitoring.metrics import Metrics
from llm_training_toolkit.runs.directory import RunDirectory

Report = Callable[[Event], None]
_COMPLETIONS = 2
_CHARACTERS = 80
"""A held-out document shorter than this is no prompt."""
_TEMPERATURE = 0.5
"""A small model that always takes the likeliest token repeats itself."""
_SHOWN = 240
"""Characters of a prompt: enough to see what the model was given, few enough to read."""


@dataclass(frozen=True)
class Sample:
    """What the model wrote, and what it was given."""

    title: str
    before: str
    written: str
    after: str = ""

    def to_event(self) -> Event:
        """For the screen."""
        return {"kind": "sample", **self.__dict__}

    def to_markdown(self) -> str:
        """For TensorBoard: given and written text apart."""
        parts = [f"**{self.title}**", "given", _block(self.before), "written", _block(self.written)]
        return "\n\n".join([*parts, "given", _block(self.after)] if self.after else parts)


def _block(text: str) -> str:
    return f"```\n{text}\n```"


def finish(trained: Trained, *, metrics: Metrics, context: RunContext) -> None:
    """Export the newest checkpoint, then sample from the export and carry out the tasks of `eval.tasks`.

    Raises CheckpointError when the export fails.
    """
    run = trained.run
    directory = newest(run.checkpoints)
    if directory is None:
        raise CheckpointError(f"{run.path}: nothing to export: the run has no complete checkpoint")
    exported = export_checkpoint(trained, Checkpoint(directory), run.export, merge=False, say=lambda _text: None)
    context.report({"kind": "exported", "path": exported.path})
    try:
        for sample in samples(run.export, trained.config, trained.receipt, str(context.device)):
            metrics.text(exported.step, f"samples/{sample.title}", sample.to_markdown())
            context.report(sample.to_event())
    except Exception as error:  # noqa: BLE001 - the run and its export are whole; samples are a courtesy
        context.report({"kind": "warning", "message": f"no samples: {reason(error)}"})
    carry_out(trained, metrics=metrics, context=context)


def is_exported(run: RunDirectory) -> bool:
    """Whether the export is that of the newest checkpoint, and not of one before the run was lengthened."""
    directory = newest(run.checkpoints)
    return directory is not None and exported_from(run.export) == directory.name


def is_finished(run: RunDirectory, config: Config) -> bool:
    """Whether everything that `finish` does has been done."""
    return is_exported(run) and are_carried_out(run, config)


def finish_again(run: RunDirectory, config: Config, report: Report) -> None:
    """Make up for what is missing of a `finish` that was cut short, in a process of its own."""
    directory = newest(run.checkpoints)
    assert directory is not None
    manifest = Checkpoint(directory).manifest
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context = RunContext(rank=0, world_size=1, device=device, report=report)
    metrics = Metrics(run, manifest.attempt, manifest.step, context)
    trained = Trained(run, config, Receipt.from_json(run.receipt.read_text()))
    (carry_out if is_exported(run) else finish)(trained, metrics=metrics, context=context)
    metrics.close()


def samples(exported: Path, config: Config, receipt: Receipt, device: str) -> Iterator[Sample]:
    """Two completions of held-out documents, and one infilling where the run learnt to infill."""
    texts = list(held_out_beginnings(receipt, limit=_COMPLETIONS + 1, characters=_CHARACTERS))
    if not texts:
        return
    generator, room = Generator.open(exported, device), config.data.sequence_length
    for number, text in enumerate(texts[:_COMPLETIONS], start=1):
        before = _whole_lines(text[: min(len(text) // 2, _SHOWN)])
        written = generator.complete(before, Writing(min(48, room // 4), _TEMPERATURE))
        yield Sample(f"completion {number}", before, written.text)
    if any(source.fim is not None for source in config.data.sources):
        before, after = _around_a_line(texts[-1][: 2 * _SHOWN])
        written = generator.infill(before, after, Writing(min(32, room // 8), _TEMPERATURE))
        yield Sample("infilling", before, written.text, after)


def _whole_lines(text: str) -> str:
    """The text up to its last line break, if it has one: models write better from the beginning of a line."""
    return text[: text.rfind("\n") + 1].lstrip("\n") or text


def _around_a_line(text: str) -> tuple[str, str]:
    """What stands before and after the middle line of a text."""
    lines = text.lstrip("\n").splitlines(keepends=True)
    middle = len(lines) // 2
    return "".join(lines[:middle]), "".join(lines[middle + 1 :])
