"""End of a run: exports the newest checkpoint, then generates samples and runs tasks with the export.

Called by rank 0 after training, and by the next start if that was interrupted. Samples continue held-out documents, so
that they suit any training data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from llm_training_toolkit.checkpoint import find_latest_checkpoint, read_manifest
from llm_training_toolkit.checkpoint.run import Run
from llm_training_toolkit.config import Config
from llm_training_toolkit.data.dataloader import read_held_out_texts
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import Event, SampleEvent, WarningEvent
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.evaluation.run_tasks import format_failure_reason, has_finished_tasks, run_final_tasks
from llm_training_toolkit.export import read_source_checkpoint_name
from llm_training_toolkit.export.export_run import export_checkpoint
from llm_training_toolkit.generation.generator import TextGenerator
from llm_training_toolkit.models.sampling import SamplingParams
from llm_training_toolkit.monitoring.metrics import Metrics
from llm_training_toolkit.monitoring.trackers import open_trackers
from llm_training_toolkit.runs.directory import RunDirectory

EventReporter = Callable[[Event], None]
_COMPLETIONS = 2
_CHARACTERS = 80  # minimum length of a held-out document to be used as a prompt
_TEMPERATURE = 0.5  # small models repeat themselves under greedy decoding
_SHOWN = 240  # characters of a prompt: enough to see what the model was given, few enough to read


def format_sample_markdown(sample: SampleEvent) -> str:
    """Return Markdown for TensorBoard, with prompt and generated text apart."""
    sections = [
        f"**{sample.title}**",
        "given",
        _format_code_block(sample.prefix),
        "written",
        _format_code_block(sample.written),
    ]
    return "\n\n".join([*sections, "given", _format_code_block(sample.suffix)] if sample.suffix else sections)


def _format_code_block(text: str) -> str:
    return f"```\n{text}\n```"


def finish_run(trained: Run, *, metrics: Metrics, context: RunContext) -> None:
    """Export the newest checkpoint, generate samples from the export and run the tasks of `eval.tasks`.

    Raises CheckpointError if the export fails.
    """
    run, checkpoint = trained.directory, trained.open_latest_checkpoint()
    if checkpoint is None:
        raise CheckpointError(f"{run.path}: nothing to export: the run has no complete checkpoint")
    exported = export_checkpoint(trained, checkpoint, run.export_dir, merge=False)
    try:
        for sample in generate_samples(run.export_dir, trained.config, trained.dataset_info, str(context.device)):
            metrics.add_text(exported.step, f"samples/{sample.title}", format_sample_markdown(sample))
            context.report(sample)
    except Exception as error:  # noqa: BLE001 - the run and its export are whole; samples are a courtesy
        context.report(WarningEvent(f"no samples: {format_failure_reason(error)}"))
    run_final_tasks(trained, metrics=metrics, context=context)


def is_exported(run: RunDirectory) -> bool:
    """Return whether the export is of the newest checkpoint, not of one before the run was extended."""
    directory = find_latest_checkpoint(run.checkpoints_dir)
    return directory is not None and read_source_checkpoint_name(run.export_dir) == directory.name


def is_run_finished(run: RunDirectory, config: Config) -> bool:
    """Return whether everything that `finish_run` does is done."""
    return is_exported(run) and has_finished_tasks(run, config)


def complete_interrupted_finish(run: RunDirectory, config: Config, report: EventReporter) -> None:
    """Complete a `finish_run` that was interrupted, in a single process without workers."""
    directory = find_latest_checkpoint(run.checkpoints_dir)
    assert directory is not None
    manifest = read_manifest(directory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context = RunContext(rank=0, world_size=1, device=device, event_listener=report)
    trackers = open_trackers(config, run, manifest.run_id, None)
    metrics = Metrics(run, manifest.attempt, manifest.step, context, trackers)
    trained = Run(run, config, DatasetInfo.from_json(run.dataset_info_path.read_text()))
    (run_final_tasks if is_exported(run) else finish_run)(trained, metrics=metrics, context=context)
    metrics.close()


def generate_samples(exported: Path, config: Config, dataset_info: DatasetInfo, device: str) -> Iterator[SampleEvent]:
    """Yield two completions of held-out documents, and one infilling if the run was trained on FIM."""
    texts = list(read_held_out_texts(dataset_info, limit=_COMPLETIONS + 1, characters=_CHARACTERS))
    if not texts:
        return
    generator, room = TextGenerator.from_directory(exported, device), config.data.sequence_length
    for number, text in enumerate(texts[:_COMPLETIONS], start=1):
        prefix = _trim_to_whole_lines(text[: min(len(text) // 2, _SHOWN)])
        written = generator.complete_prompt(prefix, SamplingParams(min(48, room // 4), _TEMPERATURE))
        yield SampleEvent(f"completion {number}", prefix, written.text)
    if any(source.fim is not None for source in config.data.sources):
        prefix, suffix = _split_around_middle_line(texts[-1][: 2 * _SHOWN])
        written = generator.fill_middle(prefix, suffix, SamplingParams(min(32, room // 8), _TEMPERATURE))
        yield SampleEvent("infilling", prefix, written.text, suffix)


def _trim_to_whole_lines(text: str) -> str:
    """Return the text up to its last line break, if any: models continue better from the start of a line."""
    return text[: text.rfind("\n") + 1].lstrip("\n") or text


def _split_around_middle_line(text: str) -> tuple[str, str]:
    """Return the text before and after its middle line."""
    lines = text.lstrip("\n").splitlines(keepends=True)
    middle = len(lines) // 2
    return "".join(lines[:middle]), "".join(lines[middle + 1 :])
