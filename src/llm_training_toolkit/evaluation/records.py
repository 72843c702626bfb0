"""Evaluation results in a run's `eval/`: one JSON file per task, step, data and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.evaluation.task import EvalResult
from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.runs.directory import RunDirectory

_METADATA_FIELDS = ("task", "data", "settings", "model", "run", "step", "date")


@dataclass(frozen=True)
class EvalRecord:
    """Figures of a task with the metadata needed to interpret them."""

    task: str
    figures: Mapping[str, float]
    data: str
    settings: Mapping[str, Any]
    model: str | None
    """Directory of the model, or None for given completions."""
    run: str | None
    """Name of the model's run."""
    step: int | None
    """Training step of the model."""
    date: str
    """Time of the measurement, in UTC."""

    @classmethod
    def from_result(
        cls, task: str, measured: EvalResult, model: Path | None, run: str | None, step: int | None
    ) -> EvalRecord:
        """Build a record from a result, dated now."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        where = str(model) if model is not None else None
        return cls(task, dict(measured.figures), measured.data, dict(measured.settings), where, run, step, now)

    def to_json(self) -> dict[str, Any]:
        """Return the documented output of `ltt evaluate --json`: the task, its figures, then the metadata."""
        about = {name: getattr(self, name) for name in _METADATA_FIELDS if name != "task"}
        return {"task": self.task, **self.figures, **about}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EvalRecord:
        """Parse the output of `to_json`. Raises KeyError or TypeError for other JSON."""
        about = {name: values[name] for name in _METADATA_FIELDS}
        return cls(
            figures={name: float(value) for name, value in values.items() if name not in _METADATA_FIELDS}, **about
        )

    def to_metrics(self) -> dict[str, float]:
        """Return the figures by metric name."""
        return {f"eval/{self.task}_{name}": value for name, value in self.figures.items()}

    @property
    def record_key(self) -> str:
        """Hash that tells records of one task and step apart. A repeated evaluation replaces the earlier one."""
        settings = {name: value for name, value in self.settings.items() if name != "contained_by"}
        kind = Path(self.model).name if self.model is not None else ""  # adapters, or the same ones merged
        text = json.dumps([kind, self.data, settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def write_eval_record(run: RunDirectory, evaluation: EvalRecord, items: Iterable[Mapping[str, Any]]) -> Path:
    """Write a record into its run, and its items beside it. Return the record's path."""
    place = run.evaluations_dir / f"{evaluation.task}_step_{evaluation.step or 0:09d}_{evaluation.record_key}.json"
    if lines := format_jsonl(items):
        write_atomically(place.with_suffix(".items.jsonl"), lines)
    write_atomically(place, json.dumps(evaluation.to_json(), indent=1) + "\n")
    return place


def format_jsonl(items: Iterable[Mapping[str, Any]]) -> str:
    """Return the items as JSON lines."""
    return "".join(json.dumps(item) + "\n" for item in items)


def read_eval_records(run: RunDirectory) -> Iterator[EvalRecord]:
    """Read a run's records, sorted by task, step and date. Raises CheckpointError for an invalid file."""
    found = []
    for path in run.evaluations_dir.glob("*.json"):
        try:
            found.append(EvalRecord.from_json(json.loads(path.read_text())))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: is no evaluation ({type(error).__name__}: {error}): remove it") from error
    yield from sorted(found, key=lambda each: (each.task, each.step or 0, each.date))
