"""Starting a run: read, check, claim, prepare, choose where it runs. What `ltt train` calls."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from llm_training_toolkit.checkpoint import newest
from llm_training_toolkit.config import Config, from_json, load, to_json
from llm_training_toolkit.config.identity import refuse_changed_identity
from llm_training_toolkit.console import Console
from llm_training_toolkit.data.receipt import Receipt
from llm_training_toolkit.errors import ConfigError
from llm_training_toolkit.launch.environment import check_machine, prepare_environment
from llm_training_toolkit.launch.outcome import Outcome, Request
from llm_training_toolkit.launch.place import is_first_rank, ranks_started
from llm_training_toolkit.launch.preparation import prepare_run, receipt_lines
from llm_training_toolkit.plan import DataFacts, Plan, lines, make_plan, require
from llm_training_toolkit.runs import RunDirectory, checkpoint_place, claim, environment, write_atomically

DOCUMENTS = "documents"
"""What --accept takes besides field names: the documents themselves are other ones than before."""


def start(request: Request, console: Console) -> Outcome:
    """Start, resume or leave alone the run that the request names. Raises ToolkitError."""
    config = load(request.config, request.overrides)
    run = RunDirectory(Path(config.run.dir).expanduser().absolute() / config.run.name)
    replicas = ranks_started() if config.cluster.workers == 0 else None
    plan = require(make_plan(config, _known_facts(run), replicas))
    if config.cluster.workers == 0 and not is_first_rank():
        return _outcome(run, _train(run, config, console))
    with claim(run):
        _reconcile(run, config, request)
        if plan.steps is not None and (step := _newest_step(run)) is not None and step >= plan.steps:
            return _leave_alone(run, config, plan, console)
        for line in lines(plan):
            console.say(line)
        _prepare(run, config, request, console, replicas)
        return _outcome(run, _train(run, config, console))


def _known_facts(run: RunDirectory) -> DataFacts | None:
    """What an earlier start found out about the data."""
    return DataFacts(Receipt.from_json(run.receipt.read_text()).sequences) if run.receipt.is_file() else None


def _newest_step(run: RunDirectory) -> int | None:
    directory = newest(run.checkpoints)
    place = checkpoint_place(directory) if directory else None
    return place[0] if place else None


def _reconcile(run: RunDirectory, config: Config, request: Request) -> None:
    """Refuse to go on with another identity than the run has; before its first checkpoint it has none."""
    if run.resolved.is_file() and newest(run.checkpoints) is not None:
        before = from_json(run.resolved.read_text(), where=str(run.resolved))
        accept = [key for key in request.accept if key != DOCUMENTS]
        refuse_changed_identity(before, config, accept=accept, extend=request.extend)


def _refuse_changed_documents(run: RunDirectory, config: Config, receipt: Receipt, request: Request) -> None:
    """Refuse to go on with other documents than the run began with, unless they, or what names them, are accepted."""
    if not run.receipt.is_file() or newest(run.checkpoints) is None:
        return
    before = Receipt.from_json(run.receipt.read_text())
    asked = any(key.split(".")[0] in {"data", "tokenizer", "run"} for key in request.accept)
    if before.fingerprint == receipt.fingerprint or asked:
        return
    if config.tokenizer.train is not None and before.tokenizer_path != receipt.tokenizer_path:
        raise ConfigError(
            "the documents have changed since the run began, and a tokenizer trained on them now would be another than "
            "the weights know: bring the documents back, or take another run.name"
        )
    if DOCUMENTS not in request.accept:
        raise ConfigError(
            "the documents have changed since the run began (paths, sizes or times of modification differ), so the "
            f"order of the data would be another: bring them back, take another run.name, or --accept {DOCUMENTS}"
        )


def _prepare(run: RunDirectory, config: Config, request: Request, console: Console, replicas: int | None) -> None:
    """Prepare the data, then write down everything the workers read."""
    if config.cluster.workers > 0:
        check_machine(config)
    receipt = prepare_run(config, console.stage).receipt
    _refuse_changed_documents(run, config, receipt, request)
    plan = require(make_plan(config, DataFacts(receipt.sequences), replicas))
    shutil.copyfile(request.config, run.config)
    write_atomically(run.resolved, to_json(config))
    write_atomically(run.plan, json.dumps(plan.to_json(), indent=1))
    write_atomically(run.environment, json.dumps(environment(), indent=1))
    write_atomically(run.receipt, receipt.to_json())  # last: ranks that wait for it find the rest
    for row in receipt_lines(receipt):
        console.say(row)


def _train(run: RunDirectory, config: Config, console: Console) -> dict[str, Any]:
    if config.cluster.workers == 0:
        from llm_training_toolkit.launch.inline import run_inline

        return run_inline(run, config, console)
    prepare_environment()
    from llm_training_toolkit.launch.ray_train import run_on_ray

    return run_on_ray(run, config, console)


def _outcome(run: RunDirectory, result: dict[str, Any]) -> Outcome:
    directory = newest(run.checkpoints)
    checkpoint = str(directory) if directory else None
    return Outcome(run=str(run.path), step=result["step"], status=result["status"], checkpoint=checkpoint)


def _leave_alone(run: RunDirectory, config: Config, plan: Plan, console: Console) -> Outcome:
    """A finished run stays as it is; only an export that was cut short is made up for."""
    console.say(f"run {run.name} is finished: {plan.steps:,} steps, in {run.path}")
    if config.export.at_end and not run.export.exists():
        from llm_training_toolkit.launch.finish import finish_again

        finish_again(run, config, console.show)
    step = _newest_step(run)
    assert step is not None
    return _outcome(run, {"status": "finished", "step": step})
