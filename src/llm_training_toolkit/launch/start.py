"""Starting a run: read, check, claim, prepare, choose where it runs. What `ltt train` calls."""

from __future__ import annotations

import json
import shutil
from typing import Any

from llm_training_toolkit.checkpoint import newest
from llm_training_toolkit.config import Config, load, to_json
from llm_training_toolkit.console import Console
from llm_training_toolkit.data.receipt import Receipt
from llm_training_toolkit.goodput import in_words
from llm_training_toolkit.launch.accounting import note_end
from llm_training_toolkit.launch.ahead import preparing_ahead
from llm_training_toolkit.launch.environment import check_machine, check_quantization, is_local, prepare_environment
from llm_training_toolkit.launch.opening import held, joined, place_of
from llm_training_toolkit.launch.origin import refuse_unfit_weights
from llm_training_toolkit.launch.outcome import Outcome, Request
from llm_training_toolkit.launch.place import is_first_rank, ranks_started
from llm_training_toolkit.launch.precision import precision_notes, resolve_precision_here
from llm_training_toolkit.launch.preparation import facts_of, preparation_of, prepare_epochs, receipt_lines
from llm_training_toolkit.launch.standing import (
    Standing,
    refuse_changed_documents,
    refuse_changed_run,
    refuse_other_weights,
    standing_of,
)
from llm_training_toolkit.overview import goodput
from llm_training_toolkit.plan import Plan, lines, make_plan, mixture_lines, require
from llm_training_toolkit.runs import RunDirectory, environment, write_atomically
from llm_training_toolkit.storage import reached, storage_of


def start(request: Request, console: Console) -> Outcome:
    """Start, resume or leave alone the run that the request names. Raises ToolkitError."""
    config = load(request.config, request.overrides)
    replicas = ranks_started() if config.cluster.workers == 0 else None
    require(make_plan(config, replicas=replicas))  # before the directory of an impossible run is made
    if config.cluster.workers == 0 and not is_first_rank():
        with joined(place_of(config), console.say) as run:
            return _take_part(run, config, console)
    with held(place_of(config), console.say) as run:
        standing = standing_of(run)
        config, resolved = resolve_precision_here(standing.kept(config))
        resolved = resolved or precision_notes(run, config)
        plan = require(make_plan(config, standing.facts(config), replicas)).with_notes(resolved)
        refuse_changed_run(standing, config, request.accept, extend=request.extend)
        refuse_other_weights(standing, plan)
        if standing.is_finished(plan):
            return _leave_alone(run, config, standing, console)
        for line in lines(plan):
            console.say(line)
        check_quantization(config)
        refuse_unfit_weights(config, plan, standing)
        if config.cluster.workers != 0:
            check_machine(config)
            check_nodes_of(run, config, console)
        receipt = _prepare(config, standing, request, console)
        facts = facts_of(receipt, standing.step, standing.sequences)
        plan = require(make_plan(config, facts, replicas)).with_notes(resolved)
        shutil.copyfile(request.config, run.config)
        write_down(run, config, plan, receipt)
        for line in mixture_lines(plan):
            console.say(line)
        with preparing_ahead(run, config, facts, console):
            result = train(run, config, console)
        note_end(run)
        console.say(in_words(goodput(run)))
        return _outcome(run, result)


def check_nodes_of(run: RunDirectory, config: Config, console: Console) -> None:
    """Refuse nodes of a cluster that could not work on the run."""
    if is_local():
        return
    prepare_environment()
    from llm_training_toolkit.launch.preflight import check_nodes

    check_nodes(run, config, console)


def _take_part(run: RunDirectory, config: Config, console: Console) -> Outcome:
    """A torchrun rank other than the first: it waits for the first one, which alone prepares and writes."""
    standing = standing_of(run)
    plan = make_plan(config, standing.facts(config), ranks_started())
    if standing.is_finished(plan):
        return _outcome(run, {"status": "finished", "step": standing.step})
    return _outcome(run, train(run, config, console))


def _prepare(config: Config, standing: Standing, request: Request, console: Console) -> Receipt:
    """The run's data: as it was prepared, if that lasts to the run's end, otherwise prepared now."""
    receipt = standing.prepared(config, request.accept)
    if receipt is None:
        work = preparation_of(config, console)
        refuse_changed_documents(standing, config, work, request.accept)
        receipt = prepare_epochs(work, config, standing.step, standing.sequences, until=standing.step + 1).receipt
    for row in receipt_lines(receipt):
        console.say(row)
    return receipt


def write_down(run: RunDirectory, config: Config, plan: Plan, receipt: Receipt) -> None:
    """Write everything the workers read, once nothing stands against the start any more."""
    write_atomically(run.resolved, to_json(config))
    write_atomically(run.plan, json.dumps(plan.to_json(), indent=1))
    write_atomically(run.environment, json.dumps(environment(), indent=1))
    write_atomically(run.receipt, receipt.to_json())


def train(run: RunDirectory, config: Config, console: Console) -> dict[str, Any]:
    """Train a run that is written down, with Ray or without: `{"status", "step"}`."""
    with reached():
        storage_of(run.path).send()  # ranks on other machines read it
    if config.cluster.workers == 0:
        from llm_training_toolkit.launch.inline import run_inline

        return run_inline(run, config, console)
    prepare_environment()
    from llm_training_toolkit.launch.ray_train import run_on_ray

    return run_on_ray(run, config, console)


def _outcome(run: RunDirectory, result: dict[str, Any]) -> Outcome:
    directory, storage = newest(run.checkpoints), storage_of(run.path)
    checkpoint = storage.address(directory) if directory else None
    return Outcome(run=storage.address(run.path), step=result["step"], status=result["status"], checkpoint=checkpoint)


def _leave_alone(run: RunDirectory, config: Config, standing: Standing, console: Console) -> Outcome:
    """A finished run stays as it is; only an export that is missing, or of an earlier end, is made up for."""
    console.say(f"run {run.name} is finished: {standing.step:,} steps, in {storage_of(run.path).address(run.path)}")
    if config.export.at_end:
        from llm_training_toolkit.launch.finish import finish_again, is_finished

        if not is_finished(run, config):
            finish_again(run, config, console.show)
    return _outcome(run, {"status": "finished", "step": standing.step})
