"""What one rank does: build the parts, resume, train, and on rank 0 export and sample at the end.

The same for a Ray Train worker, a torchrun rank and a lone process; they differ in the RunContext.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from llm_training_toolkit.checkpoint import Checkpoint, Rule
from llm_training_toolkit.checkpoint.manager import CheckpointSaver, Lineage
from llm_training_toolkit.checkpoint.restore import newest_sound
from llm_training_toolkit.checkpoint.state import Progress
from llm_training_toolkit.config import Config
from llm_training_toolkit.config.run_identity import fingerprint
from llm_training_toolkit.data.dataloader import Feed
from llm_training_toolkit.data.prepare.epochs import facts_of, newest_receipt
from llm_training_toolkit.data.sample_log import Ledger
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.heartbeat import UNLIMITED
from llm_training_toolkit.evaluation.in_training import Midway
from llm_training_toolkit.export.export_run import Trained
from llm_training_toolkit.models.memory import is_out_of_memory
from llm_training_toolkit.monitoring.logs import redirect
from llm_training_toolkit.monitoring.metrics import Metrics
from llm_training_toolkit.plan import Plan, make_plan, require
from llm_training_toolkit.runs.attempts import end_attempt, fail_attempt, mark_out_of_memory, note_in_attempt
from llm_training_toolkit.runs.directory import environment, write_atomically
from llm_training_toolkit.runs.goodput import Account, Carried, carried
from llm_training_toolkit.runs.storage import storage_of
from llm_training_toolkit.train.components import Parts
from llm_training_toolkit.train.loop import train
from llm_training_toolkit.worker.build import Built, build
from llm_training_toolkit.worker.devices import Seat, take_seats
from llm_training_toolkit.worker.finish import finish
from llm_training_toolkit.worker.micro_batch import after_out_of_memory, fit_into_memory, load_of
from llm_training_toolkit.worker.precision import resolve_precision
from llm_training_toolkit.worker.spec import Place


def work(place: Place, context: RunContext) -> dict[str, Any]:
    """Take part in the run until it finishes or stops; `{"status", "step"}` comes back on every rank.

    Raises SmallerMicroBatch when memory ran out and the next attempt will take less.
    """
    seats = take_seats(place, context)
    asked, precision_note = resolve_precision(place, context)
    place, memory_notes = fit_into_memory(asked, context)
    attempt, account = _begin(place, context, asked.config, seats)
    try:
        parts = _build(place, context, attempt, account, (*precision_note, *memory_notes))
        status, step = _train(parts, place, asked.config)
    except Exception as error:  # the edge of a rank: whatever ends it is written down, and goes on
        # A disk that is full must not hide the error that says so.
        with suppress(OSError, ValueError):
            storage_of(place.run.path).look(place.run.attempts)
            fail_attempt(place.run, attempt, f"rank {context.rank}: {type(error).__name__}: {error}")
        raise
    if context.is_first:
        end_attempt(place.run, attempt, status, step=step)
    context.pulse.finish()
    return {"status": status, "step": step}


def _train(parts: Parts, place: Place, asked: Config) -> tuple[str, int]:
    context = parts.context
    try:
        status, progress = train(parts)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            mark_out_of_memory(place.run, parts.attempt)
            raise after_out_of_memory(asked, place.config, context.world_size) from error
        raise
    if status == "finished" and place.config.export.at_end and context.is_first:
        context.pulse.mark("exporting", UNLIMITED)
        parts.account.enter("checkpoint")
        finish(Trained(place.run, place.config, place.receipt), metrics=parts.metrics, context=context)
    parts.metrics.write(progress.step, parts.account.values())
    parts.metrics.close()
    return status, progress.step


def _begin(place: Place, context: RunContext, asked: Config, seats: Sequence[Seat]) -> tuple[int, Account]:
    """Agree on the attempt's number, send the output of libraries to its log, get the process ready."""
    config = place.config
    so_far = carried(place.run, place.began) if context.is_first else Carried({}, 0)
    processes = context.gather(os.getpid())
    facts = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "processes": processes,
        "seats": [seat.to_json() for seat in seats],
        "workers": context.world_size,
        "micro_batch": config.train.micro_batch,
        "asked": asked.train.micro_batch,
        "zero": config.engine.zero,
        "load": load_of(asked, context),
        "began": place.began,
        "group_began": place.group_began,
        "reached": so_far.reached,
    }
    attempt = context.broadcast(storage_of(place.run.path).begin_attempt(facts) if context.is_first else 0)
    redirect(place.run.logs(attempt) / f"rank_{context.rank}.log")
    torch.set_num_threads(config.cluster.cpus_per_worker)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)
    return attempt, so_far.open(place.began)


def _build(place: Place, context: RunContext, attempt: int, account: Account, resolved: Sequence[str]) -> Parts:
    run, config = place.run, place.config
    context.pulse.mark("looking for a checkpoint")
    checkpoint = newest_sound(run, context)
    done = _progress(checkpoint)
    if context.is_first:
        note_in_attempt(run, attempt, resumed=checkpoint.directory.name if checkpoint else None)
    facts = facts_of(place.receipt, done.step, done.sequences)
    plan = require(make_plan(config, facts, replicas=context.world_size)).with_notes(resolved)
    if context.is_first:
        write_atomically(run.plan, json.dumps(plan.to_json(), indent=1))  # with what `auto` has become
    context.pulse.mark("building the model and loading its state")
    built = build(place, plan, context, checkpoint)
    context.pulse.mark("opening the data")
    lineage = Lineage(
        attempt=attempt,
        parent=checkpoint.directory.name if checkpoint else None,
        zero=plan.zero,
        threads=torch.get_num_threads(),
        config_fingerprint=fingerprint(config),
        data_fingerprint=place.receipt.fingerprint,
        versions=environment()["versions"],
        extra=_extra(built, plan),
    )
    _warn_of_other_bits(checkpoint, lineage, context)
    saver = CheckpointSaver(
        run,
        context,
        built.engine,
        lineage,
        every_steps=plan.save_every_steps,
        every_seconds=plan.save_every_seconds,
        rule=Rule(config.checkpoint.keep, config.checkpoint.keep_every, config.checkpoint.keep_best),
    )
    metrics = Metrics(run, attempt, done.step, context)
    metrics.text(done.step, "configuration", f"```json\n{run.resolved.read_text()}\n```")
    origin = (done.step, done.sequences)
    feed = Feed(
        place.receipt,
        global_batch=plan.global_batch,
        epochs=config.train.epochs,
        origin=origin,
        newest=partial(newest_receipt, run),
        ledger=Ledger(run.ledger, attempt, context.rank) if config.failures.ledger else None,
    )
    return Parts(
        plan,
        plan.schedule(),
        config.run.seed,
        context,
        built.engine,
        feed,
        saver,
        metrics,
        attempt=attempt,
        account=account,
        origin=done,
        midway=Midway(Trained(run, config, place.receipt), metrics=metrics, context=context),
        on_spike=config.failures.on_spike,
    )


def _extra(built: Built, plan: Plan) -> dict[str, Any]:
    """What a manifest says of the model beside its weights."""
    extra = {"hf_config": built.hf_config, "micro_batch": plan.micro_batch}
    return extra if built.base is None else extra | {"base": built.base.to_json()}


def _progress(checkpoint: Checkpoint | None) -> Progress:
    """Where a run goes on."""
    if checkpoint is None:
        return Progress()
    manifest = checkpoint.manifest
    return Progress(manifest.step, manifest.tokens, manifest.sequences, manifest.skips, manifest.recent)


def _warn_of_other_bits(checkpoint: Checkpoint | None, lineage: Lineage, context: RunContext) -> None:
    """Say when the continuation cannot be bit for bit: rounding depends on ranks, threads, micro-batch and stage."""
    if checkpoint is None or not context.is_first:
        return
    manifest = checkpoint.manifest
    before = (manifest.world_size, manifest.threads, manifest.extra["micro_batch"], manifest.zero)
    now = (context.world_size, lineage.threads, lineage.extra["micro_batch"], lineage.zero)
    if before != now:
        said = "went on {} workers with {} threads each in micro-batches of {} under ZeRO {}".format(*before)
        here = "goes on {} with {} in micro-batches of {} under ZeRO {}".format(*now)
        message = f"the run {said} and now {here}: the same sequences, losses equal up to rounding"
        context.report({"kind": "note", "message": message})
