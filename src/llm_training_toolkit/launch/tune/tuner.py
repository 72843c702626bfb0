"""Search behind `ltt tune`: read, check, lock, prepare the data, run the trials with Ray Tune, write the outputs.

    search file -> space -> check of its boundary points -> EventLog
      -> Tuner: EventLogSearcher (next trial), RungScheduler (rungs), TrialTrainable (run)

The event log holds the whole state of a search. Each start builds a new Tuner from it and needs no state of Ray's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llm_training_toolkit.config import Config, dump_config_json
from llm_training_toolkit.config.run_identity import flatten_config
from llm_training_toolkit.config.schema import FieldTag
from llm_training_toolkit.config.search import SearchConfig, load_search, replace_config_values
from llm_training_toolkit.config.uri import is_uri
from llm_training_toolkit.data.prepare.epochs import format_dataset_info, prepare_epochs
from llm_training_toolkit.errors import ConfigError, DataError, LaunchError
from llm_training_toolkit.launch.backend import check_cluster_nodes, create_dataset_builder, prepare_environment
from llm_training_toolkit.launch.request import EXIT_CODES, TrainResultStatus
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
from llm_training_toolkit.setup.machine import check_attention, check_machine, check_quantization

_TUNE_ENV = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is handled here: trials stop with a checkpoint
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the event log and the trials' runs hold all of it
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # Tune's snapshots are never read
    "TUNE_FORCE_TRIAL_CLEANUP_S": "150",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_TRIAL_ACTOR_RESOURCES = {"node:__internal_head__": 0.0001}  # the CPUs are for workers; Tune refuses an empty request
_RAY_LOST_MESSAGE = "Ray was lost while the search worked; the same command goes on"


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
    search, whole, base = load_search(path, overrides)
    if is_uri(base.run.dir):
        raise ConfigError(f"run.dir = {base.run.dir}: a search lies on a path that every node sees; name one")
    runs = Path(base.run.dir).expanduser().absolute()
    directory = SearchDirectory(runs / (search.name or path.stem))
    cache = str(runs / ".cache") if base.data.cache == "auto" else str(Path(base.data.cache).expanduser().absolute())
    return SearchSpec(
        search, whole, base, directory, TrialConfigBuilder(search, base, str(directory.trials_dir), cache)
    )


def run_search(asked: SearchSpec, console: Console) -> tuple[TrainResultStatus, dict[str, Any]]:
    """Run or resume a search. Return its status and summary. Raises ToolkitError."""
    search, directory = asked.search, asked.directory
    for words in check_search_space(asked.trials):
        console.print_line(f"left out: {words}")
    _check_best_configs(asked)
    check_machine(asked.trial_config)
    check_quantization(asked.trial_config)
    check_attention(asked.trial_config)
    with lock_run_directory(directory.driver_run):
        event_log = EventLog(directory.event_log_path)
        if event_log.trials:
            _check_unchanged(asked)
        _write_search_identity(asked)
        event_log.record_start()
        directory.stop_marker_path.unlink(missing_ok=True)
        done = len(event_log.trials) - len(event_log.unfinished_trials)
        if done:
            console.print_line(
                f"search {directory.path.name} goes on: {done} trials have ended, "
                f"{len(event_log.unfinished_trials)} had begun"
            )
        status = _run_trials(asked, event_log, console)
        if find_best_trial(event_log, search.mode) is not None:
            from llm_training_toolkit.search.outputs import write_outputs

            write_outputs(asked.search, asked.base_config, event_log, directory)
        return status, build_summary(search, event_log, directory)


def _check_best_configs(asked: SearchSpec) -> None:
    """Check before the trials that `best.yaml` can be written for every boundary point. Raises ConfigError."""
    for point in boundary_points(asked.search):
        if not asked.trials.find_problem(point):
            replace_config_values(
                asked.base_config, point, f"best.yaml (the base without overrides) with {format_point(point)}"
            )


def _run_trials(asked: SearchSpec, event_log: EventLog, console: Console) -> TrainResultStatus:
    if SearchBudget(asked.search, event_log).is_search_finished:
        console.print_line(f"search {asked.directory.path.name} is finished, in {asked.directory.path}")
        return "finished"
    prepare_environment()  # before the first import of Ray
    for name, value in _TUNE_ENV.items():
        os.environ[name] = value
    redirect_output(asked.directory.driver_run.driver_log_path)
    import ray

    from llm_training_toolkit.launch.ray.cluster import connect_to_cluster, watch_head

    with connect_to_cluster(console):
        concurrent = _compute_max_concurrent(asked, console)  # first: preparing data is in vain if no trial fits
        _prepare_shared_data(asked, console)
        suggestions = _build_trial_sampler(asked, event_log)
        screen = SearchProgressDisplay(asked.search, event_log, console)

        def exit_with_message(said: str, code: int) -> NoReturn:
            screen.close()
            console.print_line(said)
            console.close()
            os._exit(code)

        def exit_on_ray_loss(why: str) -> None:
            exit_with_message(f"error: {_RAY_LOST_MESSAGE} ({why})", LaunchError.exit_code)

        try:
            with watch_head(ray.get_runtime_context().gcs_address, console.print_line, exit_on_ray_loss):
                return _run_tuner(asked, event_log, suggestions, concurrent=concurrent, screen=screen, console=console)
        except KeyboardInterrupt:
            exit_with_message(
                "stopped at once: the same command goes on with the trials that had begun", EXIT_CODES["stopped"]
            )
        finally:
            screen.close()


def _prepare_shared_data(asked: SearchSpec, console: Console) -> None:
    """Check the nodes, then prepare the data, once for all trials with the same data settings.

    Raises DataError if too few documents leave the held-out set empty: the metric would never be reported.
    """
    some = asked.trials.build_config(_find_trainable_point(asked))
    check_cluster_nodes(asked.directory.driver_run, some, console)
    dataset_info = prepare_epochs(create_dataset_builder(some, console), some, until=1).dataset_info
    for row in format_dataset_info(dataset_info):
        console.print_line(row)
    if asked.search.metric.startswith("eval/") and not dataset_info.eval_sequences:
        raise DataError(
            f"metric = {asked.search.metric}: no document is held out, so it is never reported; give a larger "
            "data.eval.fraction, or data.eval.sources, in the base or under overrides"
        )


def _run_tuner(
    asked: SearchSpec,
    event_log: EventLog,
    suggestions: TrialSampler,
    *,
    concurrent: int,
    screen: Callable[[], None],
    console: Console,
) -> TrainResultStatus:
    import ray.exceptions
    from ray import tune as ray_tune

    from llm_training_toolkit.launch.tune.callbacks import EventLogCallback, EventLogSearcher, RungScheduler
    from llm_training_toolkit.launch.tune.trainable import TrialTrainable

    state = SearchBudget(asked.search, event_log)

    def request_stop() -> None:
        console.print_line("stopping: trials end after their step, with a checkpoint (Ctrl-C again: at once, without)")
        state.stop_requested = True
        asked.directory.stop_marker_path.touch()

    tuner = ray_tune.Tuner(
        ray_tune.with_resources(TrialTrainable, ray_tune.PlacementGroupFactory([_TRIAL_ACTOR_RESOURCES])),
        tune_config=ray_tune.TuneConfig(
            search_alg=EventLogSearcher(state, suggestions, lambda trial: _build_trial_spec(asked, trial)),
            scheduler=RungScheduler(state),
            num_samples=-1,  # `EventLogSearcher` ends the search
            max_concurrent_trials=concurrent,
            trial_dirname_creator=lambda trial: f"{Path(trial.config['run']).name}_{trial.trial_id}",
        ),
        run_config=ray_tune.RunConfig(
            name="tune",
            storage_path=str(asked.directory.driver_run.path),
            checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),  # the runs write their own
            failure_config=ray_tune.FailureConfig(max_failures=asked.search.max_failures),
            callbacks=[EventLogCallback(state, screen)],
            verbose=0,
        ),
    )
    try:
        with on_stop_signal(request_stop):
            tuner.fit()
    except ray.exceptions.RayError as error:
        raise LaunchError(f"{_RAY_LOST_MESSAGE} ({error})") from error
    except ray_tune.TuneError as error:
        raise LaunchError(
            event_log.write_error or f"Ray Tune has failed; the same command goes on ({error})"
        ) from error
    if event_log.write_error:
        raise LaunchError(event_log.write_error)
    if state.repeated_error:
        raise LaunchError(
            "trial after trial has failed before its first rung, so no other is begun; the same command tries again. "
            f"The newest error: {state.repeated_error}"
        )
    return "stopped" if state.stop_requested else "finished"


def _build_trial_spec(asked: SearchSpec, trial: TrialRecord) -> dict[str, Any]:
    """Return the `TrialSpec` of a trial as plain data."""
    from llm_training_toolkit.launch.tune.trainable import TrialSpec

    return TrialSpec(
        number=trial.number,
        config=dump_config_json(asked.trials.build_config(trial.parameters, trial.name)),
        run=str(asked.directory.get_trial_run(trial.number).path),
        metric=asked.search.metric,
        scheduler=asked.search.scheduler.model_dump_json(),
        here=str(Path.cwd()),
        stopping=str(asked.directory.stop_marker_path),
    ).to_tune_config()


def _build_trial_sampler(asked: SearchSpec, event_log: EventLog) -> TrialSampler:
    learner = None
    if asked.search.searcher.name == "optuna":
        from llm_training_toolkit.search.optuna_sampler import propose_optuna_point

        learner = propose_optuna_point
    return TrialSampler(asked.trials, event_log, learner)


def _find_trainable_point(asked: SearchSpec) -> dict[str, Any]:
    """Return a boundary point that can be trained; the shared data is prepared with it."""
    return dict(next(point for point in boundary_points(asked.search) if not asked.trials.find_problem(point)))


def _compute_max_concurrent(asked: SearchSpec, console: Console) -> int:
    """Return the number of concurrent trials that the cluster has room for. Raises LaunchError if none ever fits."""
    import ray

    from llm_training_toolkit.launch.ray.autoscaler import AutoscalerClient
    from llm_training_toolkit.launch.ray.capacity import CapacityWaiter
    from llm_training_toolkit.launch.ray.nodes import alive_nodes
    from llm_training_toolkit.launch.ray.resources import build_resource_request, count_concurrent_runs

    wanted = build_resource_request(asked.trial_config, ray.cluster_resources().get("GPU", 0.0), console)
    CapacityWaiter(asked.trial_config, wanted, AutoscalerClient(wanted), console).check_feasibility()
    room = max(1, count_concurrent_runs([node.total for node in alive_nodes()], wanted))  # 1: nodes may be added later
    want = asked.search.max_concurrent_trials
    if want is not None and want > room:
        console.print_line(
            f"note: max_concurrent_trials = {want}, but the cluster has room for {room} trials at a time"
        )
    taken = min(want or room, room)
    console.print_line(f"{taken} trials at a time, workers each: {wanted.fewest}")
    return taken


def _build_search_identity(asked: SearchSpec) -> dict[str, Any]:
    """Return the settings that must stay the same when a search is resumed."""
    fields = {
        key: value for key, (tag, value) in flatten_config(asked.trial_config).items() if tag is not FieldTag.FREE
    }
    own = asked.search.model_dump(mode="json", include={"metric", "mode", "scheduler", "searcher"})
    space = {key: values.model_dump(mode="json", exclude_none=True) for key, values in asked.search.search.items()}
    found: dict[str, Any] = json.loads(json.dumps({**own, "search": space, "base": fields}))
    return found


def _write_search_identity(asked: SearchSpec) -> None:
    write_atomically(asked.directory.identity_path, json.dumps(_build_search_identity(asked), indent=1))


def _check_unchanged(asked: SearchSpec) -> None:
    """Check that a resumed search is unchanged. Raises ConfigError with every difference."""
    before, now = (
        _flatten_identity(json.loads(asked.directory.identity_path.read_text())),
        _flatten_identity(_build_search_identity(asked)),
    )
    lines = [
        f"  {key}: {json.dumps(before.get(key))} -> {json.dumps(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if lines:
        raise ConfigError(
            f"the search in {asked.directory.path} has begun with another space or base; change it back, or give this "
            "one another name:\n" + "\n".join(lines)
        )


def _flatten_identity(identity: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in identity.items():
        found |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return found
