"""Simulation of worker groups, attempts and checkpoints: whatever dies between two steps, the lineage stays whole.

A hypothesis state machine calls the policies and records of a run (`runs/attempts.py`, `failure_policy.py`, the search
for the newest checkpoint) on real files. Groups die between any two steps, or work on after their end was declared. The
seed is fixed, so that every session does the same steps.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llm_training_toolkit.checkpoint import find_latest_checkpoint
from llm_training_toolkit.config.schema import FailuresConfig
from llm_training_toolkit.launch.drill.data_audit import read_attempt_spans
from llm_training_toolkit.launch.ray.failure_policy import (
    AttemptFailure,
    find_abort_reason,
    find_counted_failures,
    find_restart_pause,
)
from llm_training_toolkit.runs.attempts import (
    begin_attempt,
    end_attempt,
    find_last_attempt,
    find_takeover,
    read_attempt_record,
    update_attempt,
)
from llm_training_toolkit.runs.directory import RunDirectory, parse_checkpoint_name

POLICY = FailuresConfig(max_failures=2, max_same_step_failures=2)


@dataclass
class Group:
    """A worker group: its attempt, the run it believes to be in, and its completed steps."""

    attempt: int
    run_id: str
    step: int
    begun_at: int
    may_save: bool = False
    """It has looked, and its run was its own."""
    has_failed: bool = False


class RunSimulation(RuleBasedStateMachine):
    """One run, its current group, and groups of earlier attempts that are still at work somewhere."""

    @initialize()
    def make_run(self) -> None:
        self.run = RunDirectory(Path(tempfile.mkdtemp(dir="/dev/shm")) / "run")
        self.groups: list[Group] = []
        self.numbers: list[int] = []
        self.failures_since_checkpoint = 0
        self.ended = False

    def is_newest_at_work(self) -> bool:
        """Whether the group of the newest attempt lives, and the driver knows of no failure."""
        newest = self.groups[-1] if self.groups else None
        return newest is not None and not newest.has_failed and newest.attempt == max(self.numbers, default=0)

    def teardown(self) -> None:
        shutil.rmtree(self.run.path.parent)

    @precondition(lambda self: not self.ended)
    @rule(dies=st.sampled_from(["not", "record empty", "record not yet there", "checkpoint not looked for"]))
    def start_group(self, dies: str) -> None:
        if dies == "record empty":  # killed between the exclusive create and the record
            self.run.attempts_dir.mkdir(parents=True, exist_ok=True)
            number = 1 + find_last_attempt(self.run)
            (self.run.attempts_dir / f"{number:04d}.json").touch()
            self.numbers.append(number)
            return
        if dies == "record not yet there":  # killed in an atomic write
            self.run.attempts_dir.mkdir(parents=True, exist_ok=True)
            (self.run.attempts_dir / ".0009.json.0a1b2c3d").write_text("{")
            return
        number = begin_attempt(self.run, {"workers": 1})
        self.numbers.append(number)
        if dies == "checkpoint not looked for":
            return
        newest = find_latest_checkpoint(self.run.checkpoints_dir)
        update_attempt(self.run, number, resumed=newest.name if newest else None)
        found = parse_checkpoint_name(newest) if newest else None
        step = found[0] if found else 0
        self.groups.append(Group(number, str(read_attempt_record(self.run, number)["run_id"]), step, step))

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), steps=st.integers(1, 3))
    def train(self, data: st.DataObject, steps: int) -> None:
        """Also of a group whose end was declared: its node was only cut off."""
        data.draw(st.sampled_from(self.groups)).step += steps

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def look_before_saving(self, data: st.DataObject) -> None:
        group = data.draw(st.sampled_from(self.groups))
        taken = find_takeover(self.run, group.attempt, group.run_id)
        if taken:
            self.groups.remove(group)
            return
        assert group.attempt == max(self.numbers, default=0), "an earlier attempt would save beside a later one"
        group.may_save = True

    @precondition(lambda self: any(group.may_save for group in self.groups))
    @rule(data=st.data(), dies=st.sampled_from(["not", "before the manifest"]))
    def save(self, data: st.DataObject, dies: str) -> None:
        """Perhaps long after it looked, while another attempt has begun."""
        group = data.draw(st.sampled_from([each for each in self.groups if each.may_save]))
        group.may_save = False
        directory = self.run.get_checkpoint_dir(group.step, group.attempt)
        if group.step == group.begun_at or (directory / "manifest.json").exists() or not self.run.attempts_dir.exists():
            return
        directory.mkdir(parents=True, exist_ok=True)
        if dies != "not":
            self.groups.remove(group)
            return
        (directory / "manifest.json").write_text(json.dumps({"run_id": group.run_id}))
        self.failures_since_checkpoint = 0

    @precondition(lambda self: self.groups)
    @rule()
    def kill(self) -> None:
        """Process and driver: nothing is recorded."""
        self.groups.pop()

    @precondition(lambda self: self.is_newest_at_work())
    @rule(step_related=st.booleans(), lives_on=st.booleans())
    def fail(self, step_related: bool, lives_on: bool) -> None:
        """The driver records the failure of the newest group and decides; the group may live on, cut off."""
        group = self.groups[-1]
        group.has_failed = True
        if not lives_on:
            self.groups.pop()
        failure = AttemptFailure("killed" if step_related else "node_lost", "a cause", group.step + 1, 0, "10.0.0.1")
        end_attempt(self.run, group.attempt, "failed", failure=failure.to_json())
        self.failures_since_checkpoint += 1
        records = {number: read_attempt_record(self.run, number) for number in self.numbers}
        newest = find_latest_checkpoint(self.run.checkpoints_dir)
        place = parse_checkpoint_name(newest) if newest else None
        failures = find_counted_failures(records)
        reason = find_abort_reason(failures, place[1] if place else 0, POLICY)
        assert find_restart_pause(failures) == 0.0, "the group had done a step"
        assert reason or self.failures_since_checkpoint <= POLICY.max_failures + 1, "restarted without end"
        assert not reason or len(failures) > 1, "the first failure of a run ends it"
        self.ended = bool(reason)

    @precondition(lambda self: self.ended)
    @rule()
    def give_the_command_again(self) -> None:
        self.ended = False
        self.failures_since_checkpoint = 0

    @precondition(lambda self: self.numbers and self.run.path.exists())
    @rule()
    def remove_the_run(self) -> None:
        """Groups at work do not know, and must not write into the run that begins in its place."""
        shutil.rmtree(self.run.path)
        for group in self.groups:
            group.may_save = False
        self.numbers, self.ended, self.failures_since_checkpoint = [], False, 0

    @invariant()
    def every_step_went_once_into_the_newest_checkpoint(self) -> None:
        newest = find_latest_checkpoint(self.run.checkpoints_dir)
        if newest is None:
            return
        spans = read_attempt_spans(self.run, newest.name)
        assert [span.after_step for span in spans] == [0, *(span.last_step for span in spans[:-1])]
        assert all(span.after_step < span.last_step for span in spans)

    @invariant()
    def attempts_are_numbered_without_a_double_and_share_the_id_of_their_run(self) -> None:
        assert self.numbers == sorted(set(self.numbers))
        ids = {read_attempt_record(self.run, number).get("run_id") for number in self.numbers} - {None}
        assert len(ids) <= 1
        written = {json.loads(path.read_text())["run_id"] for path in self.run.checkpoints_dir.glob("*/manifest.json")}
        assert written <= ids


def test_no_step_is_lost_or_done_twice_whatever_dies() -> None:
    how = settings(max_examples=40, stateful_step_count=30, derandomize=True, database=None, deadline=None)
    run_state_machine_as_test(RunSimulation, settings=how)
