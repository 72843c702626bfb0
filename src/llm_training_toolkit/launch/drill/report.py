"""What a drill found, from the files of its two runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_training_toolkit.checkpoint import complete, newest, read_manifest
from llm_training_toolkit.data.prepare.dataset_info import Receipt
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.drill.data_audit import compare, fetched_along, stretches
from llm_training_toolkit.runs.attempts import attempt_record
from llm_training_toolkit.runs.directory import RunDirectory, checkpoint_place
from llm_training_toolkit.runs.goodput import Split, in_words
from llm_training_toolkit.runs.status import goodput


@dataclass(frozen=True)
class Injected:
    """A failure and how the run came back."""

    kind: str
    step: int
    """The last step that was complete."""
    seconds_to_recover: float
    """Until the next attempt had completed a step."""
    group_seconds: float
    """Of these, from the start of the new workers on."""
    newest: str | None
    """The newest complete and undamaged checkpoint when the failure was there."""
    went_on_from: str | None
    """The checkpoint that the next attempt took; None = it began anew."""
    half_written: bool
    """A checkpoint was being written when the failure was there."""

    @property
    def is_wrong(self) -> bool:
        """Whether the run went on from an older or a damaged checkpoint: it may have completed a newer one since."""
        return _place(self.went_on_from) < _place(self.newest)


@dataclass(frozen=True)
class Report:
    """What a drill found: the contract of `ltt drill --json`."""

    run: str
    seed: int
    steps: int
    failures: tuple[Injected, ...]
    sequences_missing: int
    sequences_doubled: int
    checkpoints_wrong: int
    """Failures after which the run did not go on from the newest sound checkpoint."""
    steps_repeated: int
    max_loss_difference: float
    """Of any step, along the lineage."""
    weights_equal: bool
    """The final weights and moments are those of the undisturbed run, bit for bit."""
    cold_start_seconds: float
    """From the undisturbed run's command to its first step."""
    cold_group_seconds: float
    """From the start of its workers to its first step: what recovering is to be compared with."""
    wall_seconds: float
    """Of the disturbed run, from its first command to the end of its last one, by the drill's clock."""
    wall_seconds_undisturbed: float
    goodput: Split
    goodput_undisturbed: Split

    @property
    def is_whole(self) -> bool:
        """Nothing was lost: what the exit code says."""
        return not (self.sequences_missing or self.sequences_doubled or self.checkpoints_wrong)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Clock:
    """What the drill measured itself, in seconds."""

    cold_start: float
    calm: float
    hurt: float


def report(seed: int, calm: RunDirectory, hurt: RunDirectory, failures: Sequence[Injected], clock: Clock) -> Report:
    """Compare a disturbed run with the undisturbed one. Raises LaunchError, CheckpointError where files are missing."""
    lines = {run.name: fetched_along(run, stretches(run, _newest(run).name)) for run in (calm, hurt)}
    epochs = [stream.sequences for stream in Receipt.from_json(hurt.receipt.read_text()).streams]
    count = compare(lines[hurt.name], lines[calm.name], epochs)
    mine, wanted = _losses(hurt), _losses(calm)
    files = [read_manifest(_newest(run)).files for run in (hurt, calm)]
    return Report(
        run=str(hurt.path),
        seed=seed,
        steps=max(wanted),
        failures=tuple(failures),
        sequences_missing=count.missing,
        sequences_doubled=count.doubled,
        checkpoints_wrong=sum(each.is_wrong for each in failures),
        steps_repeated=len(rows(hurt)) - len(mine),
        max_loss_difference=max(abs(mine.get(step, float("inf")) - loss) for step, loss in wanted.items()),
        weights_equal=files[0] == files[1],
        cold_start_seconds=clock.cold_start,
        cold_group_seconds=rows(calm)[0]["time"] - attempt_record(calm, 1)["group_began"],
        wall_seconds=clock.hurt,
        wall_seconds_undisturbed=clock.calm,
        goodput=goodput(hurt),
        goodput_undisturbed=goodput(calm),
    )


def lines_of(report: Report) -> list[str]:
    """A report for a person."""
    several = [
        f"  {each.kind:<10} step {each.step:>7}  {each.seconds_to_recover:6.1f} s  {each.went_on_from or 'the start'}"
        for each in report.failures
    ]
    return [
        f"{len(report.failures)} failures in {report.steps} steps: the last one before, the seconds to the next one, "
        "and the checkpoint it went on from",
        *several,
        f"a cold start takes {report.cold_start_seconds:.1f} s, {report.cold_group_seconds:.1f} s of it its workers",
        f"sequences missing: {report.sequences_missing}, doubled: {report.sequences_doubled}; wrong checkpoints: "
        f"{report.checkpoints_wrong}",
        f"steps repeated: {report.steps_repeated}",
        f"largest difference of a loss: {report.max_loss_difference:g}; final weights "
        + ("bit for bit the same" if report.weights_equal else "not bit for bit the same"),
        f"undisturbed: {_split_in_words(report.goodput_undisturbed, report.wall_seconds_undisturbed)}",
        f"disturbed:   {_split_in_words(report.goodput, report.wall_seconds)}",
    ]


def _split_in_words(split: Split, wall: float) -> str:
    return f"{in_words(split)}: {sum(split.values()) / wall:.1%} of the {wall:.1f} s by the drill's clock"


def newest_undamaged(run: RunDirectory, damaged: str | None) -> str | None:
    """The newest complete checkpoint but the one that was damaged; None where there is none."""
    found = [path.name for path in complete(run.checkpoints) if path.name != damaged]
    return found[-1] if found else None


def rows(run: RunDirectory) -> list[dict[str, Any]]:
    """Every row of a step, in order."""
    if not run.metrics.exists():
        return []
    lines = [line for line in run.metrics.read_text().splitlines() if line.endswith("}")]
    return [row for row in map(json.loads, lines) if "train/loss" in row]


def _newest(run: RunDirectory) -> Path:
    found = newest(run.checkpoints)
    if found is None:
        raise LaunchError(f"{run.path} has no checkpoint")
    return found


def _losses(run: RunDirectory) -> dict[int, float]:
    """The loss of each step; of several attempts the last counts."""
    return {int(row["step"]): float(row["train/loss"]) for row in rows(run)}


def _place(name: str | None) -> tuple[int, int]:
    return (checkpoint_place(Path(name)) if name else None) or (0, 0)
