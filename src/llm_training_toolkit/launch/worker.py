"""What one rank does: build the parts, resume, train, and on rank 0 export and sample at the end.

The same for a Ray Train worker, a torchrun rank and a lone process; they differ in the RunContext.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llm_training_toolkit.checkpoint import Checkpoint, newest
from llm_training_toolkit.config import Config
from llm_training_toolkit.config.identity import fingerprint
from llm_training_toolkit.context import RunContext
from llm_training_toolkit.data.feed import Feed
from llm_training_toolkit.engine import Engine, partitioned, prepare_process, whole_parameter
from llm_training_toolkit.errors import CheckpointError, PlanError
from llm_training_toolkit.launch.finish import finish
from llm_training_toolkit.launch.output import redirect
from llm_training_toolkit.launch.place import Place
from llm_training_toolkit.launch.preparation import facts_of
from llm_training_toolkit.launch.sizing import after_out_of_memory, is_out_of_memory, load_of, with_micro_batch
from llm_training_toolkit.metrics import Metrics
from llm_training_toolkit.models import LossModule, build_model, check_size, check_weights, grow_vocabulary, initialize
from llm_training_toolkit.plan import Plan, make_plan, require
from llm_training_toolkit.runs import (
    begin_attempt,
    end_attempt,
    environment,
    fail_attempt,
    mark_out_of_memory,
    run_of,
    write_atomically,
)
from llm_training_toolkit.saving import CheckpointSaver, Lineage, Progress, newest_sound, restore
from llm_training_toolkit.train import Parts, train


def work(place: Place, context: RunContext) -> dict[str, Any]:
    """Take part in the run until it finishes or stops; `{"status", "step"}` comes back on every rank.

    Raises SmallerMicroBatch when memory ran out and the next attempt will take less.
    """
    asked = place.config.train.micro_batch
    place = replace(place, config=with_micro_batch(place, context))
    attempt = _begin(place, context, asked)
    try:
        status, step = _train(place, context, attempt, asked)
    except Exception as error:
        # A disk that is full must not hide the error that says so.
        with suppress(OSError, ValueError):
            fail_attempt(place.run, attempt, f"rank {context.rank}: {type(error).__name__}: {error}")
        raise
    if context.is_first:
        end_attempt(place.run, attempt, status, step=step)
    return {"status": status, "step": step}


def _train(place: Place, context: RunContext, attempt: int, asked: int | str) -> tuple[str, int]:
    parts, progress, hf_config = _build(place, context, attempt)
    try:
        status, progress = train(parts, progress)
    except Exception as error:
        if is_out_of_memory(error):
            mark_out_of_memory(place.run, attempt)
            raise after_out_of_memory(place.config, context.world_size, adaptable=asked == "auto") from error
        raise
    if status == "finished" and place.config.export.at_end and context.is_first:
        finish(place.run, place.config, place.receipt, hf_config=hf_config, metrics=parts.metrics, context=context)
    parts.metrics.close()
    return status, progress.step


def _begin(place: Place, context: RunContext, asked: int | str) -> int:
    """Agree on the attempt's number, send the output of libraries to its log, get the process ready."""
    config = place.config
    facts = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "workers": context.world_size,
        "micro_batch": config.train.micro_batch,
        "asked": asked,
        "load": load_of(config, context),
    }
    attempt = context.broadcast(begin_attempt(place.run, facts) if context.is_first else 0)
    redirect(place.run.logs(attempt) / f"rank_{context.rank}.log")
    torch.set_num_threads(config.cluster.cpus_per_worker)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True)
    return attempt


def _build(place: Place, context: RunContext, attempt: int) -> tuple[Parts, Progress, Mapping[str, Any]]:
    run, config = place.run, place.config
    checkpoint = newest_sound(run, context)
    done = _progress(checkpoint)
    facts = facts_of(place.receipt, done.step, done.sequences)
    plan = require(make_plan(config, facts, replicas=context.world_size))
    if context.is_first:
        write_atomically(run.plan, json.dumps(plan.to_json(), indent=1))  # with the micro-batch that is taken
    _check_device(config, context)
    prepare_process(context.device.type)
    engine, hf_config = _engine(config, plan, context, checkpoint)
    _load(engine, config, checkpoint, context)
    lineage = Lineage(
        attempt=attempt,
        parent=checkpoint.directory.name if checkpoint else None,
        zero=plan.zero,
        threads=torch.get_num_threads(),
        config_fingerprint=fingerprint(config),
        data_fingerprint=place.receipt.fingerprint,
        versions=environment()["versions"],
        extra={"hf_config": hf_config, "micro_batch": plan.micro_batch},
    )
    _warn_of_other_bits(checkpoint, lineage, context)
    saver = CheckpointSaver(
        run,
        context,
        engine,
        lineage,
        every_steps=plan.save_every_steps,
        every_seconds=plan.save_every_seconds,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
    )
    metrics = Metrics(run, attempt, done.step, context)
    metrics.text(done.step, "configuration", f"```json\n{run.resolved.read_text()}\n```")
    origin = (done.step, done.sequences)
    feed = Feed(place.receipt, global_batch=plan.global_batch, epochs=config.train.epochs, origin=origin)
    return Parts(plan, plan.schedule(), config.run.seed, context, engine, feed, saver, metrics), done, hf_config


def _progress(checkpoint: Checkpoint | None) -> Progress:
    """Where a run goes on."""
    if checkpoint is None:
        return Progress()
    manifest = checkpoint.manifest
    return Progress(manifest.step, manifest.tokens, manifest.sequences)


def _check_device(config: Config, context: RunContext) -> None:
    """Refuse an attention that this device does not have; flex_attention on CPU would abort the process."""
    if context.device.type == "cpu" and config.model.attention in {"flash_attention_2", "flex_attention"}:
        raise PlanError(f"model.attention = {config.model.attention} needs a GPU: use sdpa or eager here")


def _engine(
    config: Config, plan: Plan, context: RunContext, checkpoint: Checkpoint | None
) -> tuple[Engine, Mapping[str, Any]]:
    """The model under DeepSpeed. On a resume the saved weights are not read again: the checkpoint holds everything."""
    loads = config.model.path is not None or config.model.init_from is not None
    if config.model.path is not None and checkpoint is None:
        check_weights(config.model.path, plan.hf_config["model_type"])
    with partitioned(plan.deepspeed):
        model = build_model(
            checkpoint.manifest.extra["hf_config"] if checkpoint and loads else plan.hf_config,
            precision=plan.precision,
            attention=config.model.attention,
            path=None if checkpoint else config.model.path,
            activation_checkpointing=config.model.activation_checkpointing,
        )
        if checkpoint is None and config.model.grow_vocabulary is not None:
            grow_vocabulary(model, config.model.grow_vocabulary, whole_parameter)
    check_size(model, plan.parameters, config.model.name)
    if checkpoint is None and not loads:
        initialize(model, config.run.seed, whole_parameter)
    hf_config: Mapping[str, Any] = model.config.to_dict()  # type: ignore[union-attr, operator]
    return Engine(LossModule(model, config.model.loss_chunk), config.optim, plan.deepspeed, context.device), hf_config


def _load(engine: Engine, config: Config, checkpoint: Checkpoint | None, context: RunContext) -> None:
    """Bring the engine to where the run goes on: its own checkpoint, or the weights of another run."""
    if checkpoint is not None:
        restore(engine, checkpoint)
        context.report({"kind": "note", "message": f"resuming from {checkpoint.directory.name}"})
    elif config.model.init_from is not None:
        source = newest(run_of(Path(config.model.init_from).expanduser()).checkpoints)
        if source is None:
            raise CheckpointError(f"model.init_from = {config.model.init_from}: that run has no complete checkpoint")
        restore(engine, Checkpoint(source), optimizer=False)


def _warn_of_other_bits(checkpoint: Checkpoint | None, lineage: Lineage, context: RunContext) -> None:
    """Say when the continuation cannot be bit for bit: rounding depends on ranks, threads and micro-batch."""
    if checkpoint is None or not context.is_first:
        return
    manifest = checkpoint.manifest
    before = (manifest.world_size, manifest.threads, manifest.extra["micro_batch"])
    now = (context.world_size, lineage.threads, lineage.extra["micro_batch"])
    if before != now:
        said = "went on {} workers with {} threads each in micro-batches of {}".format(*before)
        here = "goes on {} with {} in micro-batches of {}".format(*now)
        message = f"the run {said} and now {here}: the same sequences, losses equal up to rounding"
        context.report({"kind": "note", "message": message})
