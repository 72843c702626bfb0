"""A profile holds the steps that were asked for, and a profile that cannot be written ends nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch

from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import Event, NoteEvent, WarningEvent
from llm_training_toolkit.train.profiler import StepProfiler


def build_profiler(steps: tuple[int, int] | None, directory: Path, events: list[Event] | None = None) -> StepProfiler:
    listener = None if events is None else events.append
    return StepProfiler(steps, directory, RunContext(0, 1, torch.device("cpu"), event_listener=listener))


def run_steps(profiler: StepProfiler, first: int, last: int) -> None:
    for step in range(first, last + 1):
        with profiler.record_step(step):
            torch.ones(4, 4) @ torch.ones(4, 4)


def read_markers(trace: Path) -> list[str]:
    """Markers of steps in a trace, in order."""
    events: list[dict[str, Any]] = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = {str(event["name"]) for event in events if str(event.get("name")).startswith("ProfilerStep#")}
    assert any("aten::mm" in str(event.get("name")) for event in events)
    return sorted(names)


def test_a_profile_holds_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    events: list[Event] = []
    profiler = build_profiler((3, 4), tmp_path / "profile", events)
    run_steps(profiler, 1, 6)
    profiler.close()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank_0.pt.trace.json.gz"]
    assert read_markers(tmp_path / "profile" / "rank_0.pt.trace.json.gz") == ["ProfilerStep#3", "ProfilerStep#4"]
    assert [type(event) for event in events] == [NoteEvent]


def test_a_run_that_ends_within_the_steps_leaves_those_it_has_done(tmp_path: Path) -> None:
    profiler = build_profiler((3, 9), tmp_path)
    run_steps(profiler, 2, 4)
    profiler.close()
    assert {"ProfilerStep#3", "ProfilerStep#4"} <= set(read_markers(tmp_path / "rank_0.pt.trace.json.gz"))


def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file where the directory should be")
    events: list[Event] = []
    run_steps(build_profiler((1, 1), tmp_path / "profile", events), 1, 3)
    [warning] = events
    assert isinstance(warning, WarningEvent)
    assert "the profile of rank 0 cannot be written" in warning.message


def test_steps_that_were_done_before_are_reported(tmp_path: Path) -> None:
    events: list[Event] = []
    profiler = build_profiler((3, 4), tmp_path, events)
    profiler.warn_of_past_steps(3)
    assert events == []
    profiler.warn_of_past_steps(4)
    assert [type(event) for event in events] == [WarningEvent]


def test_without_steps_nothing_is_recorded(tmp_path: Path) -> None:
    profiler = build_profiler(None, tmp_path)
    run_steps(profiler, 1, 2)
    profiler.close()
    assert list(tmp_path.iterdir()) == []
