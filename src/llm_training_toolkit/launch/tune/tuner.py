"""A search: read, check, claim, prepare, let Ray Tune drive the trials, write what was found. What `ltt tune` calls.

    search file -> space -> check of every corner -> ledger -> Tuner: Source (next trial), Gate (rungs), TrialDriver

All that a search knows lies in its ledger; each start makes a new Tuner and tells it what is left to do, so nothing of
Ray's own has to survive.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llm_training_toolkit.config import Config, to_json
from llm_training_toolkit.config.run_identity import flatten
from llm_training_toolkit.config.schema import Tag
from llm_training_toolkit.config.search import Search, changed, load_search
from llm_training_toolkit.config.uri import is_address
from llm_training_toolkit.data.prepare.epochs import prepare_epochs, receipt_lines
from llm_training_toolkit.errors import ConfigError, DataError, LaunchError
from llm_training_toolkit.launch.backend import check_nodes_of, preparation_of, prepare_environment
from llm_training_toolkit.launch.request import EXIT_CODES, Status
from llm_training_toolkit.launch.signals import on_stop_signal
from llm_training_toolkit.launch.tune.progress import Screen
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.monitoring.logs import redirect
from llm_training_toolkit.runs.directory import claim, write_atomically
from llm_training_toolkit.search.budget import State
from llm_training_toolkit.search.event_log import Ledger, SearchDirectory, Trial
from llm_training_toolkit.search.results import best, summary
from llm_training_toolkit.search.sampler import Suggestions
from llm_training_toolkit.search.space import Trials, check, corners, shown
from llm_training_toolkit.setup.machine import check_machine, check_quantization

_TUNE = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: trials stop with a checkpoint
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the ledger and the trials' own files have it all
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # nothing of Tune's is ever read again
    "TUNE_FORCE_TRIAL_CLEANUP_S": "150",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_DRIVER_SHARE = {"node:__internal_head__": 0.0001}
"""What a trial's driver takes: no CPU, for the cluster is its workers'; Tune refuses to take nothing at all."""
_LOST = "Ray was lost while the search worked; the same command goes on"


@dataclass(frozen=True)
class Asked:
    """A search as it was asked for."""

    search: Search
    whole: Config
    """The base as it stands in its file: the winner is trained like that."""
    base: Config
    """What trials are made from."""
    directory: SearchDirectory
    trials: Trials


def read_search(path: Path, overrides: list[str]) -> Asked:
    """The search in a file, and where it lies. Raises ConfigError."""
    search, whole, base = load_search(path, overrides)
    if is_address(base.run.dir):
        raise ConfigError(f"run.dir = {base.run.dir}: a search lies on a path that every node sees; name one")
    runs = Path(base.run.dir).expanduser().absolute()
    directory = SearchDirectory(runs / (search.name or path.stem))
    cache = str(runs / ".cache") if base.data.cache == "auto" else str(Path(base.data.cache).expanduser().absolute())
    return Asked(search, whole, base, directory, Trials(search, base, str(directory.trials), cache))


def tune(asked: Asked, console: Console) -> tuple[Status, dict[str, Any]]:
    """Carry a search out, or go on with it: how it ended, and what it has found. Raises ToolkitError."""
    search, directory = asked.search, asked.directory
    for words in check(asked.trials):
        console.say(f"left out: {words}")
    _check_winners(asked)
    check_machine(asked.base)
    check_quantization(asked.base)
    with claim(directory.driver):
        ledger = Ledger(directory.ledger)
        if ledger.trials:
            _refuse_changed(asked)
        _write_asked(asked)
        ledger.start()
        directory.stopping.unlink(missing_ok=True)
        done = len(ledger.trials) - len(ledger.unfinished)
        if done:
            console.say(
                f"search {directory.path.name} goes on: {done} trials have ended, {len(ledger.unfinished)} had begun"
            )
        status = _carry_out(asked, ledger, console)
        if best(ledger, search.mode) is not None:
            from llm_training_toolkit.search.outputs import write_outputs

            write_outputs(asked.search, asked.whole, ledger, directory)
        return status, summary(search, ledger, directory)


def _check_winners(asked: Asked) -> None:
    """Whether `best.yaml` could be written for every corner: better known before the trials. Raises ConfigError."""
    for point in corners(asked.search):
        if not asked.trials.problem(point):
            changed(asked.whole, point, f"best.yaml (the base without set) with {shown(point)}")


def _carry_out(asked: Asked, ledger: Ledger, console: Console) -> Status:
    if State(asked.search, ledger).over:
        console.say(f"search {asked.directory.path.name} is finished, in {asked.directory.path}")
        return "finished"
    prepare_environment()  # before anything imports Ray
    for name, value in _TUNE.items():
        os.environ[name] = value
    redirect(asked.directory.driver.path / "logs" / "driver.log")
    import ray

    from llm_training_toolkit.launch.ray.cluster import cluster, watching

    with cluster(console):
        concurrent = _concurrent(asked, console)  # before data is prepared for trials that fit nowhere
        _prepare(asked, console)
        suggestions = _suggestions(asked, ledger)
        screen = Screen(asked.search, ledger, console)

        def leave(said: str, code: int) -> NoReturn:
            screen.close()
            console.say(said)
            console.close()
            os._exit(code)

        def lost(why: str) -> None:
            leave(f"error: {_LOST} ({why})", LaunchError.exit_code)

        try:
            with watching(ray.get_runtime_context().gcs_address, console.say, lost):
                return _drive(asked, ledger, suggestions, concurrent=concurrent, screen=screen, console=console)
        except KeyboardInterrupt:
            leave("stopped at once: the same command goes on with the trials that had begun", EXIT_CODES["stopped"])
        finally:
            screen.close()


def _prepare(asked: Asked, console: Console) -> None:
    """Prepare the data of all trials for which it is the same, once the nodes were looked at.

    Raises DataError where nothing is held out of so few documents, as the metric would never be reported.
    """
    some = asked.trials.config(_any_point(asked))
    check_nodes_of(asked.directory.driver, some, console)
    receipt = prepare_epochs(preparation_of(some, console), some, until=1).receipt
    for row in receipt_lines(receipt):
        console.say(row)
    if asked.search.metric.startswith("eval/") and not receipt.eval_sequences:
        raise DataError(
            f"metric = {asked.search.metric}: no document is held out, so it is never reported; give a larger "
            "data.eval.fraction, or data.eval.sources, in the base or under set"
        )


def _drive(
    asked: Asked,
    ledger: Ledger,
    suggestions: Suggestions,
    *,
    concurrent: int,
    screen: Callable[[], None],
    console: Console,
) -> Status:
    import ray.exceptions
    from ray import tune as ray_tune

    from llm_training_toolkit.launch.tune.callbacks import Gate, Source, Watcher
    from llm_training_toolkit.launch.tune.trainable import TrialDriver

    state = State(asked.search, ledger)

    def stop() -> None:
        console.say("stopping: trials end after their step, with a checkpoint (Ctrl-C again: at once, without)")
        state.stopping = True
        asked.directory.stopping.touch()

    tuner = ray_tune.Tuner(
        ray_tune.with_resources(TrialDriver, ray_tune.PlacementGroupFactory([_DRIVER_SHARE])),
        tune_config=ray_tune.TuneConfig(
            search_alg=Source(state, suggestions, lambda trial: _order(asked, trial)),
            scheduler=Gate(state),
            num_samples=-1,  # the source says when there are no more
            max_concurrent_trials=concurrent,
            trial_dirname_creator=lambda trial: f"{Path(trial.config['run']).name}_{trial.trial_id}",
        ),
        run_config=ray_tune.RunConfig(
            name="tune",
            storage_path=str(asked.directory.driver.path),
            checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),  # the trials' runs keep their own
            failure_config=ray_tune.FailureConfig(max_failures=asked.search.retries),
            callbacks=[Watcher(state, screen)],
            verbose=0,
        ),
    )
    try:
        with on_stop_signal(stop):
            tuner.fit()
    except ray.exceptions.RayError as error:
        raise LaunchError(f"{_LOST} ({error})") from error
    except ray_tune.TuneError as error:
        raise LaunchError(ledger.broken or f"Ray Tune has failed; the same command goes on ({error})") from error
    if ledger.broken:
        raise LaunchError(ledger.broken)
    if state.hopeless:
        raise LaunchError(
            "trial after trial has failed before its first rung, so no other is begun; the same command tries again. "
            f"The newest error: {state.hopeless}"
        )
    return "stopped" if state.stopping else "finished"


def _order(asked: Asked, trial: Trial) -> dict[str, Any]:
    """A trial as the order that its driver gets."""
    from llm_training_toolkit.launch.tune.trainable import Order

    return Order(
        number=trial.number,
        config=to_json(asked.trials.config(trial.parameters, trial.name)),
        run=str(asked.directory.trial(trial.number).path),
        metric=asked.search.metric,
        scheduler=asked.search.scheduler.model_dump_json(),
        here=str(Path.cwd()),
        stopping=str(asked.directory.stopping),
    ).to_tune()


def _suggestions(asked: Asked, ledger: Ledger) -> Suggestions:
    learner = None
    if asked.search.searcher.name == "optuna":
        from llm_training_toolkit.search.optuna_sampler import learnt

        learner = learnt
    return Suggestions(asked.trials, ledger, learner)


def _any_point(asked: Asked) -> dict[str, Any]:
    """A point that can be trained: its data is prepared before the first trial, for all where it is the same."""
    return dict(next(point for point in corners(asked.search) if not asked.trials.problem(point)))


def _concurrent(asked: Asked, console: Console) -> int:
    """Trials at a time: what was asked for, as far as the cluster has room. Raises LaunchError where none ever fits."""
    import ray

    from llm_training_toolkit.launch.ray.autoscaler import Autoscaler
    from llm_training_toolkit.launch.ray.capacity import Waiting
    from llm_training_toolkit.launch.ray.nodes import living_nodes
    from llm_training_toolkit.launch.ray.resources import runs_at_once, wanted_of

    wanted = wanted_of(asked.base, ray.cluster_resources().get("GPU", 0.0), console)
    Waiting(asked.base, wanted, Autoscaler(wanted), console).refuse_never()
    room = max(1, runs_at_once([node.total for node in living_nodes()], wanted))  # 1: nodes are yet to be added
    want = asked.search.concurrent
    if want is not None and want > room:
        console.say(f"note: concurrent = {want}, but the cluster has room for {room} trials at a time")
    taken = min(want or room, room)
    console.say(f"{taken} trials at a time, workers each: {wanted.fewest}")
    return taken


def _identity(asked: Asked) -> dict[str, Any]:
    """What must not change while a search goes on."""
    fields = {key: value for key, (tag, value) in flatten(asked.base).items() if tag is not Tag.FREE}
    own = asked.search.model_dump(mode="json", include={"metric", "mode", "scheduler", "searcher"})
    space = {key: values.model_dump(mode="json", exclude_none=True) for key, values in asked.search.search.items()}
    found: dict[str, Any] = json.loads(json.dumps({**own, "search": space, "base": fields}))
    return found


def _write_asked(asked: Asked) -> None:
    write_atomically(asked.directory.asked, json.dumps(_identity(asked), indent=1))


def _refuse_changed(asked: Asked) -> None:
    """Refuse to go on with another search. Raises ConfigError with every difference."""
    before, now = _flat(json.loads(asked.directory.asked.read_text())), _flat(_identity(asked))
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


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in identity.items():
        found |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return found
