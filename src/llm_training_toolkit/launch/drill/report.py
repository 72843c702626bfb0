"""Report of a drill, from the files of its two runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_training_toolkit.checkpoint import find_latest_checkpoint, list_complete_checkpoints, read_manifest
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.drill.data_audit import audit_sequences, read_attempt_spans, read_fetched_sequences
from llm_training_toolkit.runs.attempts import read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory, parse_checkpoint_name
from llm_training_toolkit.runs.goodput import SecondsByCategory, format_goodput
from llm_training_toolkit.runs.json_lines import read_json_lines
from llm_training_toolkit.runs.status import read_goodput


@dataclass(frozen=True)
class InjectedFault:
    """Injected fault and the recovery of the run."""

    kind: str
    step: int
    """Last complete step."""
    seconds_to_recover: float
    """Seconds until the next attempt had completed a step."""
    group_seconds: float
    """Part of these seconds after the start of the new workers."""
    newest: str | None
    """Newest complete and undamaged checkpoint at the fault."""
    went_on_from: str | None
    """Checkpoint that the next attempt resumed from; `None` = it started from the beginning."""
    half_written: bool
    """A checkpoint was being written at the fault."""

    @property
    def has_wrong_checkpoint(self) -> bool:
        """Return whether the run resumed from a checkpoint older than `newest`; a newer one may be complete since."""
        return _parse_step_attempt(self.went_on_from) < _parse_step_attempt(self.newest)


@dataclass(frozen=True)
class DrillReport:
    """Results of a drill: the contract of `ltt drill --json`."""

    run: str
    seed: int
    steps: int
    failures: tuple[InjectedFault, ...]
    sequences_missing: int
    sequences_doubled: int
    checkpoints_wrong: int
    """Faults after which the run did not resume from the newest valid checkpoint."""
    steps_repeated: int
    max_loss_difference: float
    """Largest difference of any step's loss, along the lineage."""
    weights_equal: bool
    """The final weights and moments equal those of the undisturbed run, bit for bit."""
    cold_start_seconds: float
    """Seconds from the undisturbed run's command to its first step."""
    cold_group_seconds: float
    """Seconds from the start of its workers to its first step, the baseline of `group_seconds`."""
    wall_seconds: float
    """Seconds of the disturbed run from its first command to the end of its last one, by the drill's clock."""
    wall_seconds_undisturbed: float
    goodput: SecondsByCategory
    goodput_undisturbed: SecondsByCategory

    @property
    def is_lossless(self) -> bool:
        """Return whether sequences and checkpoints were all right; this decides the exit code."""
        return not (self.sequences_missing or self.sequences_doubled or self.checkpoints_wrong)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data, for `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class DrillTimings:
    """Durations measured by the drill itself, in seconds."""

    cold_start: float
    undisturbed: float
    disturbed: float


def build_report(
    seed: int, calm: RunDirectory, hurt: RunDirectory, failures: Sequence[InjectedFault], clock: DrillTimings
) -> DrillReport:
    """Compare a disturbed run with the undisturbed one. Raises LaunchError, CheckpointError if files are missing."""
    lines = {
        run.name: read_fetched_sequences(run, read_attempt_spans(run, _get_latest_checkpoint(run).name))
        for run in (calm, hurt)
    }
    epochs = [
        stream.sequences_per_epoch for stream in DatasetInfo.from_json(hurt.dataset_info_path.read_text()).streams
    ]
    count = audit_sequences(lines[hurt.name], lines[calm.name], epochs)
    mine, wanted = _read_losses(hurt), _read_losses(calm)
    files = [read_manifest(_get_latest_checkpoint(run)).files for run in (hurt, calm)]
    return DrillReport(
        run=str(hurt.path),
        seed=seed,
        steps=max(wanted),
        failures=tuple(failures),
        sequences_missing=count.missing,
        sequences_doubled=count.doubled,
        checkpoints_wrong=sum(each.has_wrong_checkpoint for each in failures),
        steps_repeated=len(read_step_rows(hurt)) - len(mine),
        max_loss_difference=max(abs(mine.get(step, float("inf")) - loss) for step, loss in wanted.items()),
        weights_equal=files[0] == files[1],
        cold_start_seconds=clock.cold_start,
        cold_group_seconds=read_step_rows(calm)[0]["time"] - read_attempt_record(calm, 1)["group_began"],
        wall_seconds=clock.disturbed,
        wall_seconds_undisturbed=clock.undisturbed,
        goodput=read_goodput(hurt),
        goodput_undisturbed=read_goodput(calm),
    )


def format_report(report: DrillReport) -> list[str]:
    """Format the report for people."""
    several = [
        f"  {each.kind:<18} step {each.step:>7}  {each.seconds_to_recover:6.1f} s  {each.went_on_from or 'the start'}"
        for each in report.failures
    ]
    return [
        f"{len(report.failures)} failures in {report.steps} steps: the last one before, the seconds to the next one, "
        "and the checkpoint it resumed from",
        *several,
        f"a cold start takes {report.cold_start_seconds:.1f} s, {report.cold_group_seconds:.1f} s of it its workers",
        f"sequences missing: {report.sequences_missing}, doubled: {report.sequences_doubled}; wrong checkpoints: "
        f"{report.checkpoints_wrong}",
        f"steps repeated: {report.steps_repeated}",
        f"largest difference of a loss: {report.max_loss_difference:g}; final weights "
        + ("bit for bit the same" if report.weights_equal else "not bit for bit the same"),
        f"undisturbed: {_format_drill_goodput(report.goodput_undisturbed, report.wall_seconds_undisturbed)}",
        f"disturbed:   {_format_drill_goodput(report.goodput, report.wall_seconds)}",
    ]


def _format_drill_goodput(split: SecondsByCategory, wall: float) -> str:
    return f"{format_goodput(split)}: {sum(split.values()) / wall:.1%} of the {wall:.1f} s by the drill's clock"


def find_undamaged_checkpoint(run: RunDirectory, damaged: str | None) -> str | None:
    """Return the newest complete checkpoint other than the damaged one, or None."""
    found = [path.name for path in list_complete_checkpoints(run.checkpoints_dir) if path.name != damaged]
    return found[-1] if found else None


def read_step_rows(run: RunDirectory) -> list[dict[str, Any]]:
    """Return every step row, in order."""
    return [row for row in read_json_lines(run.metrics_path) if "train/loss" in row]


def _get_latest_checkpoint(run: RunDirectory) -> Path:
    found = find_latest_checkpoint(run.checkpoints_dir)
    if found is None:
        raise LaunchError(f"{run.path} has no checkpoint")
    return found


def _read_losses(run: RunDirectory) -> dict[int, float]:
    """Return the loss of each step, from the last attempt that did it."""
    return {int(row["step"]): float(row["train/loss"]) for row in read_step_rows(run)}


def _parse_step_attempt(name: str | None) -> tuple[int, int]:
    return (parse_checkpoint_name(Path(name)) if name else None) or (0, 0)
