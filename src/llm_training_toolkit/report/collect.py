"""Everything that the page shows of one run, read from the files of its directory. A file may be absent."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llm_training_toolkit.checkpoint import Manifest, list_complete_checkpoints, read_manifest
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.errors import ToolkitError
from llm_training_toolkit.evaluation.records import EvalRecord, read_eval_records
from llm_training_toolkit.runs.attempts import find_last_attempt, read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.goodput import GOODPUT_CATEGORIES, SecondsByCategory, read_seconds_by_category
from llm_training_toolkit.runs.history import RunHistory, read_history
from llm_training_toolkit.runs.json_lines import read_json_lines
from llm_training_toolkit.runs.status import RunStatus, read_run_status

_MAX_ITEMS = 5  # of an evaluation: examples to look at, not its data
_MAX_CHARACTERS = 2000  # of a text
_PLAN_KEYS = (
    *("model", "parameters", "trainable_parameters", "precision"),
    *("global_batch", "sequence_length", "tokens_per_step"),
)
"""Keys of plan.json that the page needs."""
_SAMPLE_TAG = "samples/"  # of the texts that the end of a run writes for TensorBoard


@dataclass(frozen=True)
class AttemptReport:
    """One start of the workers: its record, the seconds of its time by category, and its steps."""

    number: int
    record: Mapping[str, Any]
    seconds: SecondsByCategory
    """`idle` comes before the attempt's start."""
    first_step: int | None
    last_step: int | None


@dataclass(frozen=True)
class EvaluationReport:
    """One evaluation with some of its items as (name, text) pairs."""

    record: EvalRecord
    items: tuple[tuple[tuple[str, str], ...], ...]


@dataclass(frozen=True)
class RunReport:
    """Content of the page for one run."""

    name: str
    uri: str
    status: RunStatus
    plan: Mapping[str, Any]
    """plan.json; empty before the first start has written it, and if it cannot be used."""
    environment: Mapping[str, Any]
    history: RunHistory
    attempts: tuple[AttemptReport, ...]
    dataset: DatasetInfo | None
    checkpoints: tuple[tuple[str, Manifest | None], ...]
    """Directory name and manifest; None for a manifest that cannot be read."""
    evaluations: tuple[EvaluationReport, ...]
    samples: tuple[tuple[str, str], ...]
    """Title and text of each sample of the newest end."""
    problems: tuple[str, ...]
    """Files that could not be read."""

    def get_values(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) of a metric."""
        return [(int(row["step"]), float(row[name])) for row in self.history.rows if name in row]

    def get_median(self, name: str) -> float | None:
        """Return the median of a metric, or None without values."""
        values = [value for _, value in self.get_values(name)]
        return statistics.median(values) if values else None


def collect_run(run: RunDirectory) -> RunReport:
    """Read a run. Absent files leave their part empty; unreadable ones are listed in `problems`."""
    problems: list[str] = []
    history = read_history(run.metrics_path)
    return RunReport(
        name=run.name,
        uri=run.uri,
        status=read_run_status(run),
        plan=_read_plan(run, problems),
        environment=_read_json_object(run, "env.json", problems),
        history=history,
        attempts=tuple(_iter_attempts(run, history)),
        dataset=_read_dataset_info(run, problems),
        checkpoints=tuple(_iter_checkpoints(run, problems)),
        evaluations=tuple(_iter_evaluations(run, problems)),
        samples=tuple(_iter_samples(run)),
        problems=tuple(problems),
    )


def _read_plan(run: RunDirectory, problems: list[str]) -> Mapping[str, Any]:
    plan = _read_json_object(run, "plan.json", problems)
    absent = [key for key in _PLAN_KEYS if key not in plan]
    if plan and absent:
        problems.append(f"plan.json: without {', '.join(absent)}")
        return {}
    return plan


def _read_json_object(run: RunDirectory, name: str, problems: list[str]) -> Mapping[str, Any]:
    path = run.path / name
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{name}: {error}")
        return {}
    return found if isinstance(found, dict) else {}


def _read_dataset_info(run: RunDirectory, problems: list[str]) -> DatasetInfo | None:
    if not run.dataset_info_path.is_file():
        return None
    try:
        return DatasetInfo.from_json(run.dataset_info_path.read_text(encoding="utf-8"))
    except (OSError, ToolkitError) as error:
        problems.append(str(error))
        return None


def _iter_checkpoints(run: RunDirectory, problems: list[str]) -> Iterator[tuple[str, Manifest | None]]:
    for directory in list_complete_checkpoints(run.checkpoints_dir):
        try:
            yield directory.name, read_manifest(directory)
        except (OSError, ToolkitError) as error:
            problems.append(str(error))
            yield directory.name, None


def _iter_attempts(run: RunDirectory, history: RunHistory) -> Iterator[AttemptReport]:
    """Yield every attempt; its seconds are the growth of the run's seconds since the attempt before."""
    before: SecondsByCategory = dict.fromkeys(GOODPUT_CATEGORIES, 0.0)
    for number in range(1, find_last_attempt(run) + 1):
        rows = [row for row in history.all_rows if row.get("attempt") == number]
        totals = [split for row in rows if (split := read_seconds_by_category(row))]
        seconds: SecondsByCategory = {}
        if totals:
            seconds = {name: max(0.0, totals[-1][name] - before[name]) for name in totals[-1]}
            before = before | totals[-1]
        steps = [int(row["step"]) for row in rows if "train/loss" in row]
        record = read_attempt_record(run, number)
        yield AttemptReport(number, record, seconds, min(steps, default=None), max(steps, default=None))


def _iter_evaluations(run: RunDirectory, problems: list[str]) -> Iterator[EvaluationReport]:
    try:
        records = list(read_eval_records(run))
    except ToolkitError as error:
        problems.append(str(error))
        return
    for record in records:
        name = f"{record.task}_step_{record.step or 0:09d}_{record.record_key}.items.jsonl"
        items = list(read_json_lines(run.evaluations_dir / name))[:_MAX_ITEMS]
        yield EvaluationReport(record, tuple(tuple(_iter_item_texts(item)) for item in items))


def _iter_item_texts(item: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in item.items():
        yield name, _shorten(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _iter_samples(run: RunDirectory) -> Iterator[tuple[str, str]]:
    """Yield the newest text of each sample from TensorBoard's event files, the only place that holds them."""
    if not any(run.tensorboard_dir.glob("events.out.tfevents.*")):
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415 - half a second

    # At each resume it logs that the points of a lost attempt go.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(run.tensorboard_dir), size_guidance={"scalars": 1, "tensors": 0})
    events.Reload()
    for tag in events.Tags()["tensors"]:
        if tag.startswith(_SAMPLE_TAG):
            [text] = events.Tensors(tag)[-1].tensor_proto.string_val
            title = tag.removeprefix(_SAMPLE_TAG).removesuffix("/text_summary")
            yield title, _shorten(text.decode(errors="replace"))


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} … ({len(text):,} characters)"
