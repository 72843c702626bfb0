"""Search behind `ltt tune`: read, check, lock, prepare the data, run the trials with Ray Tune, write the outputs.

    search file -> space -> check of its boundary points -> EventLog
      -> Tuner: EventLogSearcher (next trial), RungScheduler (rungs), TrialTrainable (run)

The event log holds the whole state of a search. Each start builds a new Tuner from it and needs no state of Ray's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llm_training_toolkit.config import Config, dump_config_json
from llm_training_toolkit.config.load import redact_config
from llm_training_toolkit.config.run_identity import flatten_config
from llm_training_toolkit.config.search import SearchConfig, load_search, replace_config_values
from llm_training_toolkit.config.section import FieldTag
from llm_training_toolkit.config.uri import is_uri
from llm_training_toolkit.data.prepare.epochs import format_dataset_info, prepare_epochs
from llm_training_toolkit.errors import ConfigError, DataError, LaunchError
from llm_training_toolkit.launch.backend import check_cluster_nodes, create_dataset_builder, prepare_environment
from llm_training_toolkit.launch.request import EXIT_CODES, TrainResultStatus, build_failure_json
from llm_training_toolkit.launch.signals import on_stop_signal
from llm_training_toolkit.launch.tune.progress import SearchProgressDisplay
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.monitoring.logs import redirect_output
from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.runs.directory import lock_run_directory
from llm_training_toolkit.search.budget import SearchBudget
from llm_training_toolkit.search.event_log import EventLog, SearchDirectory, TrialRecord
from llm_training_toolkit.search.results import build_summary, find_best_trial
from llm_training_toolkit.search.sampler import TrialSampler
from llm_training_toolkit.search.space import TrialConfigBuilder, boundary_points, check_search_space, format_point
from llm_training_toolkit.setup.hub_weights import ask_for_size
from llm_training_toolkit.setup.machine import check_attention, check_compilation, check_machine, check_quantization

if TYPE_CHECKING:
    from ray.tune import Tuner

_TUNE_ENV = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is handled here: trials stop with a checkpoint
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the event log and the trials' runs hold all of it
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # Tune's snapshots are never read
    "TUNE_FORCE_TRIAL_CLEANUP_S": "150",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_TRIAL_ACTOR_SHARE = 0.0001  # of the head's resource: the CPUs are for workers, and Tune refuses an empty request
_RAY_LOST_MESSAGE = "Ray was lost while the search worked; the same command resumes"


@dataclass(frozen=True)
class SearchSpec:
    """Specification of a search, read from its file."""

    search: SearchConfig
    base_config: Config
    """The base as in its file; the winner is trained with it."""
    trial_config: Config
    """The base with `overrides`, from which trials are made."""
    directory: SearchDirectory
    trials: TrialConfigBuilder


def read_search(path: Path, overrides: list[str]) -> SearchSpec:
    """Read a search file and resolve its directory. Raises ConfigError."""
    search, base, config = load_search(path, overrides)
    if is_uri(config.run.dir):
        raise ConfigError(f"run.dir = {config.run.dir}: a search lies on a path that every node sees; name one")
    runs = Path(config.run.dir).expanduser().absolute()
    directory = SearchDirectory(runs / (search.name or path.stem))
    given = config.data.cache
    cache = runs / ".cache" if given == "auto" else Path(given).expanduser().absolute()
    trials = TrialConfigBuilder(search, config, str(directory.trials_dir), str(cache))
    return SearchSpec(search, base, config, directory, trials)


def run_search(spec: SearchSpec, console: Console) -> tuple[TrainResultStatus, dict[str, Any]]:
    """Run or resume a search. Return its status and summary. Raises ToolkitError."""
    search, directory = spec.search, spec.directory
    ask_for_size(spec.trial_config, console.print_line)
    for message in check_search_space(spec.trials):
        console.print_line(f"left out: {message}")
    _check_best_configs(spec)
    check_machine(spec.trial_config)
    check_quantization(spec.trial_config)
    check_attention(spec.trial_config)
    check_compilation(spec.trial_config)
    with lock_run_directory(directory.driver_run):
        event_log = EventLog(directory.event_log_path)
        if event_log.trials:
            _check_unchanged(spec)
        _write_search_identity(spec)
        event_log.record_start()
        directory.stop_marker_path.unlink(missing_ok=True)
        done = len(event_log.trials) - len(event_log.unfinished_trials)
        if done:
            console.print_line(
                f"search {directory.path.name} resumes: {done} trials have ended, "
                f"{len(event_log.unfinished_trials)} had begun"
            )
        status = _run_trials(spec, event_log, console)
        if find_best_trial(event_log, search.mode) is not None:
            from llm_training_toolkit.search.outputs import write_outputs

            write_outputs(spec.search, spec.base_config, event_log, directory)
        return status, build_summary(search, event_log, directory)


def _check_best_configs(spec: SearchSpec) -> None:
    """Check before the trials that `best.yaml` can be written for every boundary point. Raises ConfigError."""
    for point in boundary_points(spec.search):
        if not spec.trials.find_problem(point):
            replace_config_values(
                spec.base_config, point, f"best.yaml (the base without overrides) with {format_point(point)}"
            )


def _run_trials(spec: SearchSpec, event_log: EventLog, console: Console) -> TrainResultStatus:
    if SearchBudget(spec.search, event_log).is_search_finished:
        console.print_line(f"search {spec.directory.path.name} is finished, in {spec.directory.path}")
        return "finished"
    prepare_environment()  # before the first import of Ray
    for name, value in _TUNE_ENV.items():
        os.environ[name] = value
    redirect_output(spec.directory.driver_run.driver_log_path)
    import ray

    from llm_training_toolkit.launch.ray.cluster import (
        connect_to_cluster,
        get_raylet_address,
        watch_head,
        watch_raylet,
    )

    with connect_to_cluster(console):
        concurrent = _compute_max_concurrent(spec, console)  # first: preparing data is in vain if no trial fits
        _prepare_shared_data(spec, console)
        sampler = _build_trial_sampler(spec, event_log)
        display = SearchProgressDisplay(spec.search, event_log, console)

        def exit_immediately(message: str, code: int, result: Mapping[str, Any]) -> NoReturn:
            display.close()
            console.print_line(message)
            console.print_result(result)
            console.close()
            os._exit(code)

        def exit_on_ray_loss(reason: str) -> None:
            error = LaunchError(f"{_RAY_LOST_MESSAGE} ({reason})")
            exit_immediately(f"error: {error}", error.exit_code, build_failure_json(error))

        try:
            with (
                watch_head(ray.get_runtime_context().gcs_address, console.print_line, exit_on_ray_loss),
                watch_raylet(get_raylet_address(), exit_on_ray_loss),
            ):
                return _run_tuner(spec, event_log, sampler, concurrent=concurrent, display=display, console=console)
        except KeyboardInterrupt:
            message = "stopped at once: the same command resumes the trials that had begun"
            exit_immediately(message, EXIT_CODES["stopped"], build_summary(spec.search, event_log, spec.directory))
        finally:
            display.close()


def _prepare_shared_data(spec: SearchSpec, console: Console) -> None:
    """Check the nodes, then prepare the data, once for all trials with the same data settings.

    Raises DataError if too few documents leave the held-out set empty: the metric would never be reported.
    """
    config = spec.trials.build_config(_find_trainable_point(spec))
    check_cluster_nodes(spec.directory.driver_run, config, console)
    builder = create_dataset_builder(config, console)
    # All partitions: every trial would prepare the later ones for itself, at the same time.
    until = 1 if builder.partitions == 1 else None
    dataset_info = prepare_epochs(builder, config, until=until).dataset_info
    for row in format_dataset_info(dataset_info):
        console.print_line(row)
    if spec.search.metric.startswith("eval/") and not dataset_info.eval_sequences:
        raise DataError(
            f"metric = {spec.search.metric}: no document is held out, so it is never reported; give a larger "
            "data.eval.fraction, or data.eval.sources, in the base or under overrides"
        )


def _run_tuner(
    spec: SearchSpec,
    event_log: EventLog,
    sampler: TrialSampler,
    *,
    concurrent: int,
    display: Callable[[], None],
    console: Console,
) -> TrainResultStatus:
    budget = SearchBudget(spec.search, event_log)

    def request_stop() -> None:
        console.print_line("stopping: trials end after their step, with a checkpoint (Ctrl-C again: at once, without)")
        budget.stop_requested = True
        spec.directory.stop_marker_path.touch()

    tuner = _build_tuner(spec, budget, sampler, concurrent, display)
    with on_stop_signal(request_stop):
        _fit_tuner(tuner, event_log)
    if budget.repeated_error:
        raise LaunchError(
            "trial after trial has failed before its first rung, so no other is begun; the same command tries again. "
            f"The newest error: {budget.repeated_error}"
        )
    return "stopped" if budget.stop_requested else "finished"


def _build_tuner(
    spec: SearchSpec, budget: SearchBudget, sampler: TrialSampler, concurrent: int, display: Callable[[], None]
) -> Tuner:
    from ray import tune

    from llm_training_toolkit.launch.ray.private_api import HEAD_RESOURCE
    from llm_training_toolkit.launch.tune.callbacks import EventLogCallback, EventLogSearcher, RungScheduler
    from llm_training_toolkit.launch.tune.trainable import TrialTrainable

    return tune.Tuner(
        tune.with_resources(TrialTrainable, tune.PlacementGroupFactory([{HEAD_RESOURCE: _TRIAL_ACTOR_SHARE}])),
        tune_config=tune.TuneConfig(
            search_alg=EventLogSearcher(budget, sampler, lambda trial: _build_trial_spec(spec, trial)),
            scheduler=RungScheduler(budget),
            num_samples=-1,  # `EventLogSearcher` ends the search
            max_concurrent_trials=concurrent,
            trial_dirname_creator=lambda trial: f"{Path(trial.config['run']).name}_{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(spec.directory.driver_run.path),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # the runs write their own
            failure_config=tune.FailureConfig(max_failures=spec.search.max_failures),
            callbacks=[EventLogCallback(budget, display)],
            verbose=0,
        ),
    )


def _fit_tuner(tuner: Tuner, event_log: EventLog) -> None:
    """Run the trials. Raises LaunchError if Ray or Tune fails, or the event log cannot be written."""
    import ray.exceptions
    from ray.tune import TuneError

    try:
        tuner.fit()
    except ray.exceptions.RayError as error:
        raise LaunchError(f"{_RAY_LOST_MESSAGE} ({error})") from error
    except TuneError as error:
        raise LaunchError(
            event_log.write_error or f"Ray Tune has failed; the same command resumes ({error})"
        ) from error
    if event_log.write_error:
        raise LaunchError(event_log.write_error)


def _build_trial_spec(spec: SearchSpec, trial: TrialRecord) -> dict[str, Any]:
    """Return the `TrialSpec` of a trial as plain data."""
    from llm_training_toolkit.launch.tune.trainable import TrialSpec

    return TrialSpec(
        number=trial.number,
        config=dump_config_json(spec.trials.build_config(trial.parameters, trial.name)),
        run=str(spec.directory.get_trial_run(trial.number).path),
        metric=spec.search.metric,
        scheduler=spec.search.scheduler.model_dump_json(),
        working_directory=str(Path.cwd()),
        stop_marker=str(spec.directory.stop_marker_path),
    ).to_tune_config()


def _build_trial_sampler(spec: SearchSpec, event_log: EventLog) -> TrialSampler:
    propose_point = None
    if spec.search.searcher.name == "optuna":
        from llm_training_toolkit.search.optuna_sampler import propose_optuna_point

        propose_point = propose_optuna_point
    return TrialSampler(spec.trials, event_log, propose_point)


def _find_trainable_point(spec: SearchSpec) -> dict[str, Any]:
    """Return a boundary point that can be trained; the shared data is prepared with it."""
    return dict(next(point for point in boundary_points(spec.search) if not spec.trials.find_problem(point)))


def _compute_max_concurrent(spec: SearchSpec, console: Console) -> int:
    """Return the number of concurrent trials that the cluster has room for. Raises LaunchError if none ever fits."""
    import ray

    from llm_training_toolkit.launch.ray.capacity import AutoscalerClient, CapacityWaiter
    from llm_training_toolkit.launch.ray.nodes import alive_nodes
    from llm_training_toolkit.launch.ray.resources import build_resource_request, count_concurrent_runs

    request = build_resource_request(spec.trial_config, ray.cluster_resources().get("GPU", 0.0), console)
    CapacityWaiter(spec.trial_config, request, AutoscalerClient(request), console).check_feasibility()
    fitting = count_concurrent_runs([node.total for node in alive_nodes()], request)
    fitting = max(1, fitting)  # nodes may be added later
    limit = spec.search.max_concurrent_trials
    if limit is not None and limit > fitting:
        console.print_line(
            f"note: max_concurrent_trials = {limit}, but the cluster has room for {fitting} trials at a time"
        )
    concurrent = min(limit or fitting, fitting)
    console.print_line(f"{concurrent} trials at a time, workers each: {request.min_workers}")
    return concurrent


def _build_search_identity(spec: SearchSpec) -> dict[str, Any]:
    """Return the settings that must stay the same when a search is resumed."""
    fields = {
        key: value
        for key, (tag, value) in flatten_config(redact_config(spec.trial_config)).items()
        if tag is not FieldTag.FREE
    }
    own = spec.search.model_dump(mode="json", include={"metric", "mode", "scheduler", "searcher"})
    space = {key: values.model_dump(mode="json", exclude_none=True) for key, values in spec.search.search.items()}
    found: dict[str, Any] = json.loads(json.dumps({**own, "search": space, "base": fields}))
    return found


def _write_search_identity(spec: SearchSpec) -> None:
    write_atomically(spec.directory.identity_path, json.dumps(_build_search_identity(spec), indent=1))


def _check_unchanged(spec: SearchSpec) -> None:
    """Check that a resumed search is unchanged. Raises ConfigError with every difference."""
    previous_identity, now = (
        _flatten_identity(json.loads(spec.directory.identity_path.read_text())),
        _flatten_identity(_build_search_identity(spec)),
    )
    lines = [
        f"  {key}: {json.dumps(previous_identity.get(key))} -> {json.dumps(now.get(key))}"
        for key in sorted(previous_identity.keys() | now.keys())
        if previous_identity.get(key) != now.get(key)
    ]
    if lines:
        raise ConfigError(
            f"the search in {spec.directory.path} has begun with another space or base; change it back, or give this "
            "one another name:\n" + "\n".join(lines)
        )


def _flatten_identity(identity: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in identity.items():
        found |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return found
