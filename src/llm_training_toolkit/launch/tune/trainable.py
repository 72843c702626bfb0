"""Trial of a search: a complete run with its own worker groups, which waits for a decision at each rung.

Ray Tune holds one actor per trial, without a CPU. The actor drives the run in a thread, as `ltt train` would, and
reports the rungs to Tune. Stopping a trial resolves its rung with STOP: its workers end and release their resources.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from llm_training_toolkit.config import Config, parse_config_json
from llm_training_toolkit.config.search import SchedulerConfig
from llm_training_toolkit.data.prepare.builder import DatasetBuilder
from llm_training_toolkit.data.prepare.epochs import build_data_facts, get_tokenization_spec, prepare_epochs
from llm_training_toolkit.data.prepare.shards import render_in_process
from llm_training_toolkit.distributed.context import StopRequest
from llm_training_toolkit.distributed.events import Event, RungEvent, WorkerStartedEvent
from llm_training_toolkit.errors import LaunchError, ToolkitError
from llm_training_toolkit.launch.backend import prepare_environment
from llm_training_toolkit.launch.ray import nodes
from llm_training_toolkit.launch.ray.resources import build_resource_request
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.monitoring.terminal import TerminalStream
from llm_training_toolkit.plan import Plan, check_plan, make_plan
from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.runs.directory import RunDirectory, lock_run_directory
from llm_training_toolkit.runs.json_lines import read_newest_rows
from llm_training_toolkit.search.early_stopping import compute_rung_steps, get_bracket
from llm_training_toolkit.search.results import read_trained_tokens
from llm_training_toolkit.setup.background_prep import prepare_in_background
from llm_training_toolkit.setup.hub_weights import ask_for_size
from llm_training_toolkit.setup.resume import check_documents_unchanged, read_resume_state
from llm_training_toolkit.setup.run_files import write_run_files
from llm_training_toolkit.worker.precision import read_precision_notes

if TYPE_CHECKING:
    from llm_training_toolkit.launch.ray.controller import TrainController

_POLL_SECONDS = 0.2  # between checks of the stop marker, the metrics and the run's lock
_LOCK_TIMEOUT_SECONDS = 30.0  # the processes of a killed driver may hold the run's lock this long
_SHUTDOWN_TIMEOUT_SECONDS = 120.0  # for the workers of a stopped trial to end
_METRICS_TIMEOUT_SECONDS = 60.0  # until a row written on another node is readable: NFS clients flush after 30 s


@dataclass(frozen=True)
class TrialSpec:
    """Specification of a trial, passed to its actor."""

    number: int
    config: str
    """Configuration of the run, as JSON."""
    run: str
    metric: str
    scheduler: str
    """`SchedulerConfig`, as JSON."""
    working_directory: str
    """That of the search, the base of relative paths."""
    stop_marker: str
    """File that exists once the search is being stopped."""

    def to_tune_config(self) -> dict[str, Any]:
        """Return the spec as plain data, which Tune copies to its own files."""
        return dict(self.__dict__)


class TrialTrainable(tune.Trainable):
    """Drives a trial's run from its own actor; each `step` ends at a rung or at the end of the run."""

    def setup(self, config: dict[str, Any]) -> None:
        """Create the runner; the run itself starts with the first `step`."""
        prepare_environment()
        self._spec = TrialSpec(**config)
        if Path(self._spec.working_directory).is_dir():
            os.chdir(self._spec.working_directory)
        self._results: queue.Queue[dict[str, Any]] = queue.Queue()
        self._runner = _TrialRunner(self._spec, self._results)
        self._thread = threading.Thread(target=self._runner.run_trial, daemon=True, name="trial")
        self._started = False

    def step(self) -> dict[str, Any]:
        """Train to the next rung and return its result. Raises LaunchError if a retry may succeed."""
        if self._started:
            self._runner.resolve_rung(StopRequest.NONE)
        else:
            self._started = True
            self._thread.start()
        while True:
            try:
                result = self._results.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if Path(self._spec.stop_marker).exists():
                    self._runner.request_stop()
                continue
            if result["kind"] == "launch_failed":
                raise LaunchError(result["error"])
            return {"trial": self._spec.number, **result, "done": result["kind"] != "rung"}

    def cleanup(self) -> None:
        """Stop the run if it has not ended, and wait for its workers to end."""
        if self._started:
            self._runner.resolve_rung(StopRequest.STOP)
            self._runner.request_stop()
            self._thread.join(_SHUTDOWN_TIMEOUT_SECONDS)


class _TrialRunner:
    """Runs a trial in a thread beside Tune's."""

    def __init__(self, spec: TrialSpec, results: queue.Queue[dict[str, Any]]) -> None:
        self._spec, self._results = spec, results
        self._controller: TrainController | None = None
        self._waiting_step: int | None = None
        self._stop = False
        self._steps: tuple[int, ...] = ()

    def run_trial(self) -> None:
        """Train, and queue the outcome for `TrialTrainable.step`."""
        try:
            self._results.put(self._train_to_end())
        except LaunchError as error:  # caused by the machines: a retry may succeed
            self._results.put({"kind": "launch_failed", "error": str(error)})
        except ToolkitError as error:  # caused by the run itself: a retry would fail again
            trained = read_trained_tokens(self._run_directory.metrics_path)
            self._results.put({"kind": "end", "state": "failed", "error": str(error), "trained": trained})
        except Exception as error:  # noqa: BLE001 - the edge of a thread: Tune gets the error, and retries
            traceback.print_exc()
            self._results.put({"kind": "launch_failed", "error": f"{type(error).__name__}: {error}"})

    def request_stop(self) -> None:
        """Stop after the current step, with a checkpoint."""
        if not self._stop:
            self._stop = True
            if self._controller is not None:
                self._controller.request_stop()

    def resolve_rung(self, stop_request: StopRequest) -> None:
        """Send the decision for the rung that the run waits at, if any."""
        step, self._waiting_step = self._waiting_step, None
        if step is not None and self._controller is not None:
            self._controller.resolve_rung(step, stop_request)

    def handle_event(self, event: Event) -> None:
        """Handle an event of the workers; at a rung they wait for Tune's decision."""
        match event:
            case WorkerStartedEvent():
                write_atomically(self._placement_group_path, json.dumps([event.placement_group]))
            case RungEvent():
                self._waiting_step = event.step
                self._results.put({"kind": "rung", **self._read_rung_metrics(event.step)})

    @property
    def _placement_group_path(self) -> Path:
        """File that names the newest workers' placement group, so that the next start can release a leaked one."""
        return self._run_directory.path / "placement_group.json"

    @property
    def _run_directory(self) -> RunDirectory:
        return RunDirectory(Path(self._spec.run))

    def _train_to_end(self) -> dict[str, Any]:
        config = parse_config_json(self._spec.config)
        self._release_placement_groups()
        with (
            _wait_for_run_lock(self._run_directory) as run,
            (run.path / "trial.log").open("a") as log,
            TerminalStream(log.fileno()) as stream,  # a full disk must not end the trial
        ):
            console = Console(stream, listener=self.handle_event)
            plan = self._prepare_run(run, config, console)
            if plan is None:
                result = {"status": "finished", "step": self._steps[-1]}
            else:
                result = self._run_worker_groups(run, config, console)
        self._placement_group_path.unlink(missing_ok=True)
        if result["status"] == "finished":
            return {"kind": "end", "state": "finished", **self._read_rung_metrics(self._steps[-1])}
        return {"kind": "interrupted"}

    def _prepare_run(self, run: RunDirectory, config: Config, console: Console) -> Plan | None:
        """Prepare the data and write the run files. Return None if the run is already trained to its end."""
        resume_state = read_resume_state(run)
        config = resume_state.keep_saved_precision(config)
        ask_for_size(config)  # this node may be another one than the driver's
        dataset_info = resume_state.find_reusable_dataset(config, ())
        if dataset_info is None:
            builder = DatasetBuilder(config, get_tokenization_spec(config), console.update_stage, render_in_process)
            check_documents_unchanged(resume_state, config, builder, ())
            dataset_info = prepare_epochs(
                builder, config, resume_state.step, resume_state.sequences, until=resume_state.step + 1
            ).dataset_info
        data_facts = build_data_facts(dataset_info, resume_state.step, resume_state.sequences)
        plan = check_plan(make_plan(config).with_data(data_facts)).with_notes(read_precision_notes(run, config))
        assert plan.steps is not None, "the data is prepared"
        scheduler = SchedulerConfig.model_validate_json(self._spec.scheduler)
        self._steps = compute_rung_steps(scheduler, plan.steps, plan.tokens_per_step)
        self._bracket = get_bracket(scheduler, self._spec.number, len(self._steps))
        if resume_state.is_finished(plan):
            return None
        write_run_files(run, config, plan, dataset_info)
        write_atomically(run.config_path, "# A trial of a search: resolved.json has the whole configuration.\n")
        self._data_facts = data_facts
        return plan

    def _run_worker_groups(self, run: RunDirectory, config: Config, console: Console) -> dict[str, Any]:
        from llm_training_toolkit.launch.ray.capacity import AutoscalerClient
        from llm_training_toolkit.launch.ray.controller import TrainController
        from llm_training_toolkit.launch.ray.worker_group import RunSpec  # imports Ray Train

        request = build_resource_request(config, ray.cluster_resources().get("GPU", 0.0), console)
        run_spec = RunSpec(run, config, request, AutoscalerClient(request), self._steps[self._bracket : -1])
        with prepare_in_background(run, config, self._data_facts, console):
            self._controller = TrainController(run_spec, console)
            if self._stop:
                self._controller.request_stop()
            result: dict[str, Any] = self._controller.run_training()
        return result

    def _read_rung_metrics(self, step: int) -> dict[str, Any]:
        """Return the metric of a rung from the run's metrics log."""
        metrics = wait_for_metrics(self._run_directory.metrics_path, step, self._spec.metric)
        return {
            "rung": self._steps.index(step),
            "bracket": self._bracket,
            "step": step,
            "tokens": int(metrics["train/tokens"]),
            "value": float(metrics[self._spec.metric]),
        }

    def _release_placement_groups(self) -> None:
        if self._placement_group_path.exists():
            nodes.release_placement_groups(json.loads(self._placement_group_path.read_text()))


def wait_for_metrics(metrics: Path, step: int, metric: str, within: float = _METRICS_TIMEOUT_SECONDS) -> dict[str, Any]:
    """Return the metrics logged after a step, once `metric` is among them; newer attempts override older ones.

    Raises LaunchError if it cannot be read `within` so many seconds.
    """
    end = time.monotonic() + within
    while True:
        found: dict[str, Any] = {}
        for row in read_newest_rows(metrics):
            if row.get("step") == step:
                found |= row
        if metric in found:
            return found
        if time.monotonic() > end:
            raise LaunchError(f"{metric} after step {step} was not in {metrics} within {within:g} s")
        time.sleep(_POLL_SECONDS)


@contextmanager
def _wait_for_run_lock(run: RunDirectory) -> Iterator[RunDirectory]:
    """Yield the run, locked, once the processes of a killed driver have released it. Raises LaunchError."""
    end = time.monotonic() + _LOCK_TIMEOUT_SECONDS
    while True:
        lock = lock_run_directory(run)
        try:
            locked_run = lock.__enter__()
            break
        except LaunchError:
            if time.monotonic() > end:
                raise
            time.sleep(_POLL_SECONDS)
    try:
        yield locked_run
    finally:
        lock.__exit__(None, None, None)
