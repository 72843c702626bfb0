"""Profile of chosen steps: a trace of every rank by torch's profiler, and on GPUs the history of its memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import NoteEvent, WarningEvent

_MAX_MEMORY_EVENTS = 100_000  # newest allocations kept of a GPU's memory, as many as torchtitan keeps


class StepProfiler:
    """Profiler of one attempt on one rank. A failure to write its files is reported, and training continues."""

    def __init__(self, steps: tuple[int, int] | None, directory: Path, context: RunContext) -> None:
        """Profile the first to the last of `steps`, counted from 1, into `directory`; None = no profile."""
        self._steps, self._directory, self._context = steps, directory, context
        self._profile: profile | None = None

    def warn_of_past_steps(self, completed: int) -> None:
        """Report that nothing will be profiled, if all the steps were done by an earlier attempt."""
        if self._steps is not None and self._steps[1] <= completed and self._context.is_rank_zero:
            first, last = self._steps
            self._context.report(
                WarningEvent(
                    f"profile.steps = [{first}, {last}]: the run continues after step {completed}, so nothing is "
                    "profiled. Give steps to come, or null"
                )
            )

    @contextmanager
    def record_step(self, step: int) -> Iterator[None]:
        """Record the block as a step, if it is one of those to profile; after the last one, write the profile."""
        if self._steps is None or not self._steps[0] <= step <= self._steps[1]:
            yield
            return
        if self._profile is None:
            self._profile = _start_profile(step, self._context.device)
        yield
        if step < self._steps[1]:
            self._profile.step()
        else:
            self.close()

    def close(self) -> None:
        """Write the steps recorded so far, if there are any."""
        recorded, self._profile = self._profile, None
        if recorded is None:
            return
        self._context.heartbeat.set_phase("writing the profile")
        try:
            recorded.stop()
            self._write_files(recorded)
        except (OSError, RuntimeError) as error:  # torch's own writer in C++ raises RuntimeError
            message = f"the profile of rank {self._context.rank} cannot be written ({error}); training continues"
            self._context.report(WarningEvent(message))
        else:
            if self._context.is_rank_zero:
                self._context.report(NoteEvent(f"profile of the steps: {self._directory}"))

    def _write_files(self, recorded: profile) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"rank_{self._context.rank}"
        # The profiler's view in TensorBoard finds traces by this ending, and torch compresses those that end in .gz.
        trace = self._directory / f"{name}.pt.trace.json.gz"
        partial = self._directory / f".{trace.name}"
        recorded.export_chrome_trace(str(partial))
        partial.replace(trace)
        if self._context.device.type == "cuda":
            snapshot = str(self._directory / f"{name}.memory.pickle")
            torch.cuda.memory._dump_snapshot(snapshot)  # type: ignore[no-untyped-call] # noqa: SLF001
            torch.cuda.memory._record_memory_history(enabled=None)  # noqa: SLF001 - its only name


def _start_profile(step: int, device: torch.device) -> profile:
    """Start to record, with the run's number of each step in its marker `ProfilerStep#number`."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history(max_entries=_MAX_MEMORY_EVENTS)  # noqa: SLF001 - its only name
    recording = profile(activities=activities, schedule=lambda _: ProfilerAction.RECORD, record_shapes=True)
    recording.step_num = step
    recording.start()
    return recording
