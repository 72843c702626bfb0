"""Checkpoint manager of a rank: its lineage, and a note if a resume changes rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llm_training_toolkit.checkpoint import CheckpointReader, RetentionPolicy
from llm_training_toolkit.checkpoint.hub_commit import HUB_KEY
from llm_training_toolkit.checkpoint.manager import CheckpointLineage, CheckpointManager
from llm_training_toolkit.config.run_identity import fingerprint
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import NoteEvent
from llm_training_toolkit.monitoring.metrics import Metrics
from llm_training_toolkit.plan import Plan
from llm_training_toolkit.plan.problem import format_plural
from llm_training_toolkit.runs.directory import collect_environment
from llm_training_toolkit.worker.build import BuiltModel
from llm_training_toolkit.worker.spec import WorkerSpec


def build_checkpoint_manager(
    spec: WorkerSpec,
    context: RunContext,
    plan: Plan,
    built: BuiltModel,
    checkpoint: CheckpointReader | None,
    *,
    attempt: int,
    run_id: str,
    metrics: Metrics,
) -> CheckpointManager:
    """Return the manager; its checkpoints name `checkpoint`, from which this attempt resumes, as their parent."""
    lineage = CheckpointLineage(
        attempt=attempt,
        parent=checkpoint.directory.name if checkpoint else None,
        zero=plan.zero,
        threads=torch.get_num_threads(),
        config_fingerprint=fingerprint(spec.config),
        data_fingerprint=spec.dataset_info.fingerprint,
        versions=collect_environment()["versions"],
        extra=_build_manifest_extra(built, plan),
        run_id=run_id,
    )
    _warn_of_rounding_changes(checkpoint, lineage, context)
    policy = spec.config.checkpoint
    return CheckpointManager(
        spec.directory,
        context,
        built.engine,
        lineage,
        every_steps=plan.save_every_steps,
        every_seconds=plan.save_every_seconds,
        rule=RetentionPolicy(policy.keep_latest, policy.keep_every, policy.keep_best),
        sync_metrics=metrics.sync,
    )


def _build_manifest_extra(built: BuiltModel, plan: Plan) -> dict[str, Any]:
    """Return the facts about the model that a manifest holds beside its weights."""
    extra = {
        "hf_config": built.hf_config,
        "micro_batch": plan.micro_batch,
        "compile": plan.compile,
        "sequence_parallel": plan.sequence_parallel,
        "tensor_parallel": plan.tensor_parallel,
    }
    optional = {"base": built.base, HUB_KEY: built.hub}
    return extra | {key: value.to_json() for key, value in optional.items() if value is not None}


def _warn_of_rounding_changes(
    checkpoint: CheckpointReader | None, lineage: CheckpointLineage, context: RunContext
) -> None:
    """Report that losses will differ by rounding, which depends on ranks, threads, micro-batch and ZeRO stage."""
    if checkpoint is None or not context.is_rank_zero:
        return
    manifest = checkpoint.manifest
    before = _format_computation(manifest.world_size, manifest.threads, manifest.zero, manifest.extra)
    now = _format_computation(context.world_size, lineage.threads, lineage.zero, lineage.extra)
    if before != now:
        message = f"the run ran on {before} and now runs on {now}: the same sequences, losses equal up to rounding"
        context.report(NoteEvent(message))


def _format_computation(workers: int, threads: int, zero: int, extra: Mapping[str, Any]) -> str:
    """Format how steps are computed; `extra` are the facts beside a checkpoint's weights."""
    shared, cut = extra.get("sequence_parallel", 1), extra.get("tensor_parallel", 1)
    layers = (
        ", compiled" if extra.get("compile", False) else "",
        f", {shared} to a row" if shared > 1 else "",
        f", {cut} to a matrix" if cut > 1 else "",
    )
    ranks = f"{format_plural(workers, 'worker')} with {format_plural(threads, 'thread')} each"
    return f"{ranks} in micro-batches of {extra['micro_batch']} under ZeRO {zero}{''.join(layers)}"
