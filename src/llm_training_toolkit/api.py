"""Python API: plan, prepare, train and tune from a script or notebook, read runs, load models.

    import llm_training_toolkit as ltt

    plan = ltt.plan("run.yaml", ["train.steps=100"])
    result = ltt.train("run.yaml", ["train.steps=100"])
    losses = ltt.open_run(result.run).metrics()["train/loss"]

A configuration is the path of a YAML file, a mapping with the same keys, or a `Config`. Errors are `ToolkitError`, with
each reason in `problems`. Heavy libraries are imported by the functions that need them.

`train` and `tune` run the commands `ltt train` and `ltt tune` in a process of their own. Signal handlers, redirected
output, Ray and the memory of the model stay there, so that a notebook can call them again and again.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from llm_training_toolkit.config import Config, parse_config, parse_config_json
from llm_training_toolkit.config import load_config as load_config_file
from llm_training_toolkit.config.search import SearchConfig
from llm_training_toolkit.errors import ConfigError, Problem, ToolkitError  # noqa: F401 - ltt.Problem
from llm_training_toolkit.launch.child import ProgressCallback, run_command
from llm_training_toolkit.launch.request import TrainResult
from llm_training_toolkit.runs.directory import check_run
from llm_training_toolkit.runs.history import read_history
from llm_training_toolkit.runs.status import RunStatus, read_run_status
from llm_training_toolkit.runs.storage.open import open_path

if TYPE_CHECKING:
    import pyarrow

    from llm_training_toolkit.checkpoint import Manifest
    from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
    from llm_training_toolkit.data.preview import SequencePreview
    from llm_training_toolkit.evaluation.records import EvalRecord
    from llm_training_toolkit.generation.generator import TextGenerator
    from llm_training_toolkit.plan import ClusterEstimate, Plan

ConfigSource = str | Path | Mapping[str, Any] | Config
SearchSource = str | Path | Mapping[str, Any] | SearchConfig
_WHERE = "the mapping"  # in errors, for the file that a mapping lacks


def load_config(config: ConfigSource, overrides: Sequence[str] = ()) -> Config:
    """Load a configuration, changed by `key=value` overrides. Raises ConfigError with every problem."""
    _check_word_list("overrides", overrides)
    if isinstance(config, Config) and not overrides:
        return config
    if isinstance(config, str | Path):
        return load_config_file(Path(config), overrides)
    return parse_config(_to_plain_data(config), _WHERE, overrides)


def plan(config: ConfigSource, overrides: Sequence[str] = (), *, cluster: str | Path | None = None) -> Plan:
    """Plan a run on this machine, or on the cluster of a file. Its problems are in `Plan.problems`.

    Raises PlanError only if nothing can be planned.
    """
    from llm_training_toolkit.commands.plan import plan_run

    return plan_run(load_config(config, overrides), None if cluster is None else Path(cluster))[0]


def estimate(config: ConfigSource, cluster: str | Path, overrides: Sequence[str] = ()) -> ClusterEstimate:
    """Estimate time and cost of a run on the cluster of a file."""
    from llm_training_toolkit.commands.plan import plan_run

    estimated = plan_run(load_config(config, overrides), Path(cluster))[1]
    assert estimated is not None, "a cluster was given"
    return estimated


def prepare(config: ConfigSource, overrides: Sequence[str] = (), *, progress: ProgressCallback = print) -> DatasetInfo:
    """Prepare the data of a run in its cache and return its description; `progress` gets each line of the console."""
    from llm_training_toolkit.commands.prepare import prepare_dataset
    from llm_training_toolkit.monitoring.console import Console

    lines = _LineStream(progress)
    console = Console(cast("IO[str]", lines))
    try:
        return prepare_dataset(load_config(config, overrides), console)
    finally:
        console.close()
        lines.close()


def load_batch(config: ConfigSource, step: int = 1, overrides: Sequence[str] = ()) -> list[SequencePreview]:
    """Return the sequences of a step, counted from 1, as text with their loss mask; prepare the data if needed."""
    from llm_training_toolkit.commands.show_batch import load_batch_sequences
    from llm_training_toolkit.monitoring.console import Console

    console = Console(io.StringIO())
    try:
        return load_batch_sequences(load_config(config, overrides), step, console)
    finally:
        console.close()


def train(
    config: ConfigSource,
    overrides: Sequence[str] = (),
    *,
    accept: Sequence[str] = (),
    extend: bool = False,
    progress: ProgressCallback = print,
) -> TrainResult:
    """Train a run in a process of its own; the same call resumes it. `accept` and `extend` as for `ltt train`.

    KeyboardInterrupt stops the run with a checkpoint before it is raised here; a second one stops at once. Raises the
    ToolkitError of the command.
    """
    _check_word_list("accept", accept)
    load_config(config, overrides)  # errors of a mapping or override, before a process starts
    options = [word for key in accept for word in ("--accept", key)] + (["--extend"] if extend else [])
    with _config_file(config) as path:
        done = run_command("train", [str(path), *overrides, *options], progress)
    return TrainResult(**{name: done[name] for name in ("run", "step", "status", "checkpoint")})


@dataclass(frozen=True)
class SearchResult:
    """State of a search when `tune` returns."""

    search: str
    """Directory of the search, with `best.yaml` and `report.html`."""
    best: Mapping[str, Any] | None
    """Trial, configuration and value of the best trial; None if no trial has a value."""
    trials: Sequence[Mapping[str, Any]]
    """All trials, the best first."""
    tokens: int
    """Tokens of all trials."""


def tune(search: SearchSource, overrides: Sequence[str] = (), *, progress: ProgressCallback = print) -> SearchResult:
    """Search hyperparameters in a process of its own; the same call resumes. Interrupts and errors as for `train`.

    A mapping needs a `name`, and its `base` is relative to the working directory.
    """
    _check_word_list("overrides", overrides)
    with _search_file(search) as path:
        done = run_command("tune", [str(path), *overrides], progress)
    return SearchResult(**{name: done[name] for name in ("search", "best", "trials", "tokens")})


@dataclass(frozen=True)
class Run:
    """A run on disk or in an object store. Each call reads its files as they are now."""

    place: str
    """Path or URI of the run's directory."""

    @property
    def state(self) -> RunStatus:
        """State, step, loss, newest checkpoint and error."""
        with open_path(self.place) as run:
            return read_run_status(run)

    @property
    def config(self) -> Config:
        """Configuration as it was resolved."""
        with open_path(self.place) as run:
            path = check_run(run).resolved_config_path
            return parse_config_json(path.read_text(encoding="utf-8"), str(path))

    def metrics(self) -> pyarrow.Table:
        """Return all metrics, one row a step and one column a metric; of steps done again the last time counts."""
        import pyarrow as pa

        with open_path(self.place) as run:
            history = read_history(run.metrics_path)
        integers = {"step", "attempt"}
        types = {name: pa.int64() if name in integers else pa.float64() for name in history.columns}
        return pa.table({name: pa.array([row.get(name) for row in history.rows], types[name]) for name in types})

    def checkpoints(self) -> tuple[Manifest, ...]:
        """Return the manifests of the complete checkpoints, oldest first."""
        from llm_training_toolkit.checkpoint import list_complete_checkpoints, read_manifest

        with open_path(self.place) as run:
            return tuple(read_manifest(directory) for directory in list_complete_checkpoints(run.checkpoints_dir))

    def dataset_info(self) -> DatasetInfo:
        """Return the description of the prepared data. Raises CheckpointError if nothing was trained yet."""
        from llm_training_toolkit.checkpoint.run import Run as TrainedRun

        with open_path(self.place) as run:
            return TrainedRun.read(run).dataset_info

    def evaluations(self) -> tuple[EvalRecord, ...]:
        """Return the results of evaluation tasks, by task and step."""
        from llm_training_toolkit.evaluation.records import read_eval_records

        with open_path(self.place) as run:
            return tuple(read_eval_records(run))

    def write_report(self, output: str | Path) -> Path:
        """Write the HTML page of `ltt report`."""
        from llm_training_toolkit.commands.report import write_report

        return write_report([self.place], Path(output))


def open_run(run: str | Path) -> Run:
    """Open a run at a path or URI. Raises CheckpointError if there is none."""
    place = str(run)
    with open_path(place) as opened:
        check_run(opened)
    return Run(place)


def load_model(model: str | Path, *, step: int | None = None, device: str = "auto") -> TextGenerator:
    """Load a model that writes text: a run, or an exported directory. `step` chooses a checkpoint of a run."""
    from llm_training_toolkit.generation.load import open_model

    with open_path(str(model), export=step is None) as opened:
        return open_model(opened, step=step, device=device)[0]


@contextmanager
def _config_file(config: ConfigSource) -> Iterator[Path]:
    """Yield the file of a configuration; one that has none is written as JSON, which is YAML."""
    if isinstance(config, str | Path):
        yield Path(config)
        return
    with _temporary_file("run.yaml", _to_plain_data(config)) as path:
        yield path


@contextmanager
def _search_file(search: SearchSource) -> Iterator[Path]:
    if isinstance(search, str | Path):
        yield Path(search)
        return
    data = dict(_to_plain_data(search))
    if not isinstance(data.get("name"), str):
        raise ConfigError("search: name is missing; a search without a file needs one, which names its directory")
    base = data.get("base")
    if not isinstance(base, str):
        raise ConfigError("search: base is missing; give the path of a run's file")
    with _temporary_file("search.yaml", data | {"base": str(Path(base).absolute())}) as path:
        yield path


@contextmanager
def _temporary_file(name: str, data: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a file for this user alone: addresses of documents may carry a signature.

    A ToolkitError names the mapping in its place, because the file is deleted.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_text(json.dumps(data, indent=1), encoding="utf-8")
        try:
            yield path
        except ToolkitError as error:
            raise _name_mapping(error, path) from None


def _name_mapping(error: ToolkitError, path: Path) -> ToolkitError:
    """Return the error with the mapping in place of its file, and without line numbers, which the mapping lacks."""
    pattern = re.compile(rf"{re.escape(str(path))}(?::\d+)?")
    problems = [replace(problem, what=pattern.sub(_WHERE, problem.what)) for problem in error.problems]
    return type(error).from_problems(pattern.sub(_WHERE, str(error)), problems)


def _check_word_list(name: str, words: object) -> None:
    """Raise ConfigError for a text in place of a list, which would count as a list of its letters."""
    if isinstance(words, str):
        raise ConfigError(f"{name} = {words!r}: expected a list; write [{words!r}]")


def _to_plain_data(config: Mapping[str, Any] | Config | SearchConfig) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if not isinstance(config, Config | SearchConfig):
        raise ConfigError(f"configuration = {config!r}: expected a path, a mapping or a configuration object")
    return config.model_dump(mode="json", exclude_unset=True)


class _LineStream(io.TextIOBase):
    """Text stream that passes each complete line to a function."""

    def __init__(self, progress: Callable[[str], object]) -> None:
        self._progress, self._pending = progress, ""

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, text: str) -> int:
        """Pass the lines that are complete now."""
        *lines, self._pending = (self._pending + text).split("\n")
        for line in lines:
            self._progress(line)
        return len(text)

    def close(self) -> None:
        """Pass the rest."""
        if self._pending and not self.closed:
            self._progress(self._pending)
        super().close()
