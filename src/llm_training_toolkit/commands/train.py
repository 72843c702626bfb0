"""Starting a run: read, check, claim, prepare, choose where it runs. What `ltt train` calls."""

from __future__ import annotations

import shutil
from typing import Any

from llm_training_toolkit.checkpoint import newest
from llm_training_toolkit.config import Config, load
from llm_training_toolkit.data.prepare.dataset_info import Receipt
from llm_training_toolkit.data.prepare.epochs import facts_of, prepare_epochs, receipt_lines
from llm_training_toolkit.launch.backend import check_nodes_of, preparation_of, train
from llm_training_toolkit.launch.request import Outcome, Request
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.plan import lines, make_plan, mixture_lines, require
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.goodput import in_words, note_end
from llm_training_toolkit.runs.status import goodput
from llm_training_toolkit.runs.storage import storage_of
from llm_training_toolkit.runs.storage.open import held, joined, place_of
from llm_training_toolkit.setup.background_prep import preparing_ahead
from llm_training_toolkit.setup.machine import check_machine, check_quantization
from llm_training_toolkit.setup.resume import (
    Standing,
    refuse_changed_documents,
    refuse_changed_run,
    refuse_other_weights,
    standing_of,
)
from llm_training_toolkit.setup.run_files import write_down
from llm_training_toolkit.setup.weights import refuse_unfit_weights
from llm_training_toolkit.worker.precision import precision_notes, resolve_precision_here
from llm_training_toolkit.worker.spec import is_first_rank, ranks_started


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


def _outcome(run: RunDirectory, result: dict[str, Any]) -> Outcome:
    directory, storage = newest(run.checkpoints), storage_of(run.path)
    checkpoint = storage.address(directory) if directory else None
    return Outcome(run=storage.address(run.path), step=result["step"], status=result["status"], checkpoint=checkpoint)


def _leave_alone(run: RunDirectory, config: Config, standing: Standing, console: Console) -> Outcome:
    """A finished run stays as it is; only an export that is missing, or of an earlier end, is made up for."""
    console.say(f"run {run.name} is finished: {standing.step:,} steps, in {storage_of(run.path).address(run.path)}")
    if config.export.at_end:
        from llm_training_toolkit.worker.finish import finish_again, is_finished

        if not is_finished(run, config):
            finish_again(run, config, console.show)
    return _outcome(run, {"status": "finished", "step": standing.step})
