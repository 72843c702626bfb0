"""A trial of a search: a complete run with groups of workers of its own, that waits at its rungs.

Ray Tune holds one actor for each trial, which takes no CPU: it drives the run as `ltt train` would, in a thread, and
hands what the rungs say to Tune. Stopping a trial answers the rung it waits at, upon which its workers end by
themselves and give back what they held.
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
from typing import Any

import ray
from ray import tune

from llm_training_toolkit.config import Config, from_json
from llm_training_toolkit.config.search import Scheduler
from llm_training_toolkit.data.prepare.builder import Preparation
from llm_training_toolkit.data.prepare.epochs import facts_of, markers_of, prepare_epochs
from llm_training_toolkit.data.prepare.shards import in_this_process
from llm_training_toolkit.distributed.context import Event, Wish
from llm_training_toolkit.errors import LaunchError, ToolkitError
from llm_training_toolkit.launch.backend import prepare_environment
from llm_training_toolkit.launch.ray import nodes
from llm_training_toolkit.launch.ray.resources import wanted_of
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.plan import Plan, make_plan, require
from llm_training_toolkit.runs.directory import RunDirectory, claim, write_atomically
from llm_training_toolkit.runs.metrics_log import newest_rows
from llm_training_toolkit.search.early_stopping import bracket_of, rung_steps
from llm_training_toolkit.search.results import spent
from llm_training_toolkit.setup.background_prep import preparing_ahead
from llm_training_toolkit.setup.resume import standing_of
from llm_training_toolkit.setup.run_files import write_down
from llm_training_toolkit.worker.precision import precision_notes

_LOOK_EVERY = 0.2
"""Seconds between two looks whether the search is being stopped."""
_HELD_FOR = 30.0
"""Seconds that the processes of a killed driver may hold a trial's run."""
_ENDS_WITHIN = 120.0
"""Seconds that the workers of a stopped trial may take to end."""
_SEEN_WITHIN = 60.0
"""Seconds until a line that another node has written can be read here: NFS clients flush after 30 s."""


@dataclass(frozen=True)
class Order:
    """What a trial is started with."""

    number: int
    config: str
    """As JSON."""
    run: str
    metric: str
    scheduler: str
    """As JSON."""
    here: str
    """The search's working directory, from which relative paths count."""
    stopping: str
    """The file that says, once it is there, that the search is being stopped."""

    def to_tune(self) -> dict[str, Any]:
        """As plain data, which Tune copies to files of its own."""
        return dict(self.__dict__)


class TrialDriver(tune.Trainable):
    """Drives a trial's run from an actor of its own; each `step` of Tune's ends at a rung."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the order; the run itself starts with the first step."""
        prepare_environment()
        self._order = Order(**config)
        if Path(self._order.here).is_dir():
            os.chdir(self._order.here)
        self._told: queue.Queue[dict[str, Any]] = queue.Queue()
        self._work = _Work(self._order, self._told)
        self._thread = threading.Thread(target=self._work.run, daemon=True, name="trial")
        self._begun = False

    def step(self) -> dict[str, Any]:
        """Train to the next rung; what it says. Raises what a new start may not meet again."""
        if self._begun:
            self._work.answer(Wish.GO_ON)
        else:
            self._begun = True
            self._thread.start()
        while True:
            try:
                told = self._told.get(timeout=_LOOK_EVERY)
            except queue.Empty:
                if Path(self._order.stopping).exists():
                    self._work.stop()
                continue
            if told["kind"] == "broken":
                raise LaunchError(told["error"])
            return {"trial": self._order.number, **told, "done": told["kind"] != "rung"}

    def cleanup(self) -> None:
        """End the run, if it is not at its end, and wait until its workers are gone."""
        if self._begun:
            self._work.answer(Wish.STOP)
            self._work.stop()
            self._thread.join(_ENDS_WITHIN)


class _Work:
    """The run of a trial, in a thread beside Tune's."""

    def __init__(self, order: Order, told: queue.Queue[dict[str, Any]]) -> None:
        self._order, self._told = order, told
        self._groups: Any = None
        self._waits_at: int | None = None
        self._stop = False
        self._steps: tuple[int, ...] = ()

    def run(self) -> None:
        """Train, and tell how it ended."""
        try:
            self._told.put(self._train())
        except LaunchError as error:  # the machines: another start may have more luck
            self._told.put({"kind": "broken", "error": str(error)})
        except ToolkitError as error:  # the run itself: another start would meet it again
            trained = spent(self._run.metrics)
            self._told.put({"kind": "end", "state": "failed", "error": str(error), "trained": trained})
        except Exception as error:  # noqa: BLE001 - the edge of a thread: Tune is told, and tries again
            traceback.print_exc()
            self._told.put({"kind": "broken", "error": f"{type(error).__name__}: {error}"})

    def stop(self) -> None:
        """Stop after the step that is being done, with a checkpoint."""
        if not self._stop:
            self._stop = True
            if self._groups is not None:
                self._groups.stop()

    def answer(self, wish: Wish) -> None:
        """Answer the rung that the run waits at, if it does."""
        step, self._waits_at = self._waits_at, None
        if step is not None:
            self._groups.answer(step, wish)

    def heard(self, event: Event) -> None:
        """What the workers tell: at a rung they wait until Tune has decided."""
        if event["kind"] == "introduction":
            write_atomically(self._places, json.dumps([event["places"]]))
        if event["kind"] != "rung":
            return
        self._waits_at = event["step"]
        self._told.put({"kind": "rung", **self._at(event["step"])})

    @property
    def _places(self) -> Path:
        """The placement group of the newest workers: what ends without giving it back, the next start does."""
        return self._run.path / "places.json"

    @property
    def _run(self) -> RunDirectory:
        return RunDirectory(Path(self._order.run))

    def _train(self) -> dict[str, Any]:
        run, config = self._run, from_json(self._order.config)
        self._give_back()
        with _claimed(run), (run.path / "trial.log").open("a") as log:
            console = _Ears(log, self)
            plan = self._make_ready(run, config, console)
            if plan is None:
                result = {"status": "finished", "step": self._steps[-1]}
            else:
                result = self._groups_of(run, config, console)
        self._places.unlink(missing_ok=True)
        if result["status"] == "finished":
            return {"kind": "end", "state": "finished", **self._at(self._steps[-1])}
        return {"kind": "interrupted"}

    def _make_ready(self, run: RunDirectory, config: Config, console: Console) -> Plan | None:
        """Prepare and write down what workers need; None where the run has been trained to its end."""
        standing = standing_of(run)
        config = standing.kept(config)
        prepared = standing.prepared(config, ())
        if prepared is None:
            work = Preparation(config, markers_of(config), console.stage, in_this_process)
            prepared = prepare_epochs(work, config, standing.step, standing.sequences, until=standing.step + 1).receipt
        facts = facts_of(prepared, standing.step, standing.sequences)
        plan = require(make_plan(config, facts)).with_notes(precision_notes(run, config))
        assert plan.steps is not None, "the data is prepared"
        scheduler = Scheduler.model_validate_json(self._order.scheduler)
        self._steps = rung_steps(scheduler, plan.steps, plan.tokens_per_step)
        self._bracket = bracket_of(scheduler, self._order.number, len(self._steps))
        if standing.is_finished(plan):
            return None
        write_down(run, config, plan, prepared)
        write_atomically(run.config, "# A trial of a search: resolved.json has the whole configuration.\n")
        self._facts = facts
        return plan

    def _groups_of(self, run: RunDirectory, config: Config, console: Console) -> dict[str, Any]:
        from llm_training_toolkit.launch.ray.autoscaler import Autoscaler
        from llm_training_toolkit.launch.ray.controller import Groups
        from llm_training_toolkit.launch.ray.worker_group import Job  # Ray Train comes with it

        wanted = wanted_of(config, ray.cluster_resources().get("GPU", 0.0), console)
        job = Job(run, config, wanted, Autoscaler(wanted), self._steps[self._bracket : -1])
        with preparing_ahead(run, config, self._facts, console):
            self._groups = Groups(job, console)
            if self._stop:
                self._groups.stop()
            result: dict[str, Any] = self._groups.run()
        return result

    def _at(self, step: int) -> dict[str, Any]:
        """What the run had after a step: its own metrics say it, those of newer attempts before those of older ones."""
        found = reported(self._run.metrics, step, self._order.metric)
        return {
            "rung": self._steps.index(step),
            "bracket": self._bracket,
            "step": step,
            "tokens": int(found["train/tokens"]),
            "value": float(found[self._order.metric]),
        }

    def _give_back(self) -> None:
        if self._places.exists():
            nodes.give_back(json.loads(self._places.read_text()))


def reported(metrics: Path, step: int, metric: str, within: float = _SEEN_WITHIN) -> dict[str, Any]:
    """What a run has measured after a step, once the metric can be read; the newest attempt's values before others'.

    Raises LaunchError where it cannot be read within so many seconds.
    """
    end = time.monotonic() + within
    while True:
        found: dict[str, Any] = {}
        for row in newest_rows(metrics):
            if row.get("step") == step:
                found |= row
        if metric in found:
            return found
        if time.monotonic() > end:
            raise LaunchError(f"{metric} after step {step} was not in {metrics} within {within:g} s")
        time.sleep(_LOOK_EVERY)


class _Ears(Console):
    """Writes what a run says to its log, and hears what its workers tell."""

    def __init__(self, log: Any, work: _Work) -> None:  # noqa: ANN401 - a text file
        super().__init__(log)
        self._work = work

    def show(self, event: Event) -> None:
        """Hear it, and write it down."""
        self._work.heard(event)
        super().show(event)


@contextmanager
def _claimed(run: RunDirectory) -> Iterator[None]:
    """The run, held; that of a killed driver as soon as its processes are gone. Raises LaunchError."""
    end = time.monotonic() + _HELD_FOR
    while True:
        holding = claim(run)
        try:
            holding.__enter__()
            break
        except LaunchError:
            if time.monotonic() > end:
                raise
            time.sleep(_LOOK_EVERY)
    try:
        yield
    finally:
        holding.__exit__(None, None, None)
