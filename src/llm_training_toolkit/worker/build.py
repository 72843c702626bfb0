"""Builds the model of a run under DeepSpeed, with its initial weights and its adapters if it has any.

random weights, model.path, model.init_from or the run's own checkpoint
  -> model -> loss -> adapters -> engine -> restored state
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from llm_training_toolkit.checkpoint import (
    BaseWeights,
    CheckpointReader,
    check_base_matches,
    find_latest_checkpoint,
    read_base_weights,
)
from llm_training_toolkit.checkpoint.hub_commit import HubCommit, get_revision
from llm_training_toolkit.checkpoint.restore import restore_engine
from llm_training_toolkit.config import Config, parse_config_json
from llm_training_toolkit.data.prepare.dataset_info import get_cache_directory
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import NoteEvent
from llm_training_toolkit.distributed.node_group import NodeGroup, form_node_group
from llm_training_toolkit.distributed.sequence_group import form_sequence_group
from llm_training_toolkit.distributed.tensor_group import form_tensor_group
from llm_training_toolkit.engine import Engine, gathered_parameter, prepare_deepspeed, zero3_init
from llm_training_toolkit.errors import CheckpointError, PlanError
from llm_training_toolkit.models import (
    LossModule,
    build_model,
    check_parameter_count,
    count_parameters,
    initialize_weights,
    resize_embeddings,
)
from llm_training_toolkit.models.build import DTYPES
from llm_training_toolkit.models.tensor_parallel import TensorParallelModel, build_tensor_parallel_model
from llm_training_toolkit.models.weight_stream import WeightStream, check_weights_by_readers
from llm_training_toolkit.plan import Plan
from llm_training_toolkit.runs.directory import RunDirectory, check_run
from llm_training_toolkit.setup.machine import find_attention_problem, find_quantization_problem, list_attention_kinds
from llm_training_toolkit.worker.attention import resolve_attention
from llm_training_toolkit.worker.base_weights import ensure_base_weights
from llm_training_toolkit.worker.hub_download import ensure_local_weights
from llm_training_toolkit.worker.spec import WorkerSpec


@dataclass(frozen=True)
class BuiltModel:
    """Model ready for training."""

    engine: Engine
    hf_config: Mapping[str, Any]
    """Hugging Face configuration of the model, for its exports."""
    base: BaseWeights | None
    """Base weights of the adapters, or None if the model itself is trained."""
    hub: HubCommit | None
    """Commit of the weights that training began with, or None if they are not from the hub."""


def build_run_model(
    spec: WorkerSpec,
    plan: Plan,
    context: RunContext,
    checkpoint: CheckpointReader | None,
    hub: HubCommit | None = None,
) -> BuiltModel:
    """Build the run's model at `checkpoint` or its initial state. Collective. Raises PlanError and CheckpointError.

    `hub` is the commit that an earlier attempt has found; it is used even if the branch has moved since.
    """
    spec, _ = resolve_attention(spec, context)
    _check_device(spec.config, context)
    prepare_deepspeed(context.device.type)
    path = (
        ensure_base_weights(spec, plan, context)
        if plan.adapter
        else spec.config.model.path
        if checkpoint is None
        else None
    )
    origin = checkpoint or _find_initial_checkpoint(spec.config, plan, context)
    revision = hub.commit if hub else get_revision(spec.config.model)
    directory = ensure_local_weights(path, spec, context, revision) if path is not None else None
    if path is not None and directory is not None and not Path(path).expanduser().is_dir():
        hub = HubCommit(path, get_revision(spec.config.model), Path(directory).name)
    with form_node_group(context, f"{spec.machine}/{spec.node}") as node:
        engine, hf_config = _build_engine(spec.config, plan, context, node, path=directory, origin=origin)
    # Record the hub id, not the local directory, which other machines do not have.
    if path is not None:
        hf_config = {**hf_config, "_name_or_path": path}
    base = None
    if plan.adapter and directory and path:
        base = replace(read_base_weights(directory, context, get_cache_directory(spec.config)), path=path)
    _load_state(engine, checkpoint, origin, base, context)
    return BuiltModel(engine, hf_config, base, hub)


def _check_device(config: Config, context: RunContext) -> None:
    """Raise PlanError for features that this device lacks; flex_attention on CPU would abort the process."""
    gpu = context.device.type != "cpu"
    if gpu and config.model.attn_implementation == "varlen" and config.train.precision == "fp32":
        raise PlanError("model.attn_implementation = varlen: it has no fp32 on GPUs: use sdpa, or train.precision bf16")
    for kind in list_attention_kinds(config):
        problem = find_attention_problem(kind, gpu=gpu)
        if problem:
            raise PlanError(f"model.attn_implementation = {kind}: {problem}")
    if config.model.lora is not None and config.model.lora.quantize is not None:
        missing = find_quantization_problem(gpu=gpu)
        if missing:
            raise PlanError(f"model.lora.quantize = {config.model.lora.quantize}: {missing}")


def _build_engine(
    config: Config,
    plan: Plan,
    context: RunContext,
    node: NodeGroup,
    *,
    path: str | None,
    origin: CheckpointReader | None,
) -> tuple[Engine, Mapping[str, Any]]:
    """Build the model under DeepSpeed with the weights at `path`, if given; those of `origin` are loaded later."""
    model_section = config.model
    loads = model_section.path is not None or model_section.init_from is not None
    if path is not None:
        check_weights_by_readers(path, plan.hf_config["model_type"], context, node)
    # Under ZeRO-3 transformers reads on rank 0 and partitions on the way.
    streamed = WeightStream(path, context, node) if path is not None and plan.zero < 3 else nullcontext()
    with zero3_init(plan.deepspeed), streamed as stream:
        hf_config = _get_trained_hf_config(origin, plan) if origin and loads else plan.hf_config
        model, cut = _build_model(config, plan, context, hf_config, path=path, stream=stream)
        whole = gathered_parameter if cut is None else cut.whole_parameter
        if path is not None and model_section.resize_vocab_to is not None:
            resize_embeddings(model, model_section.resize_vocab_to, whole)
        found = count_parameters(model) if cut is None else cut.count_parameters(model)
        check_parameter_count(found, plan.parameters, model_section.name)
        if origin is None and path is None:
            initialize_weights(model, config.run.seed, whole)
        hf_config = model.config.to_dict()  # type: ignore[union-attr, operator]
        hf_config.pop("quantization_config", None)  # of these ranks, not of the weights
        group = form_sequence_group(context, config.engine.sequence_parallel)
        module = LossModule(model, model_section.loss_chunk_size, config.train.router_balance, group, cut)
        _add_adapters(module, model, config, plan)
        if plan.compile:
            module.compile_layers()
    engine = Engine(
        module, config.optim, plan.deepspeed, context.device, zero_stage=plan.zero, offload=config.engine.offload
    )
    return engine, hf_config


def _build_model(
    config: Config,
    plan: Plan,
    context: RunContext,
    hf_config: Mapping[str, Any],
    *,
    path: str | None,
    stream: WeightStream | None,
) -> tuple[nn.Module, TensorParallelModel | None]:
    """Build the model with the weights at `path`, if given, and cut it over the ranks of a replica if they share it."""
    group = form_tensor_group(context, config.engine.tensor_parallel)
    if group is not None:
        return build_tensor_parallel_model(
            hf_config,
            group,
            context.device,
            precision=plan.precision,
            attention=config.model.attn_implementation,
            stream=stream,
            activation_checkpointing=plan.activation_checkpointing,
        )
    model = build_model(
        hf_config,
        precision=plan.precision,
        attention=config.model.attn_implementation,
        path=path,
        stream=stream,
        activation_checkpointing=plan.activation_checkpointing,
        four_bits=plan.adapter is not None and plan.adapter.quantize is not None,
        device=context.device if plan.zero < 3 else None,
    )
    return model, None


def _add_adapters(module: LossModule, model: nn.Module, config: Config, plan: Plan) -> None:
    if plan.adapter is None:
        return
    from llm_training_toolkit.models.lora import add_adapters  # peft takes over a second to import

    dtype = DTYPES[plan.precision]
    add_adapters(model, plan.adapter, seed=config.run.seed, dtype=dtype, draws=module.batch_position)


def _load_state(
    engine: Engine,
    checkpoint: CheckpointReader | None,
    origin: CheckpointReader | None,
    base: BaseWeights | None,
    context: RunContext,
) -> None:
    """Restore the run's own checkpoint, or load the weights of another run."""
    if checkpoint is not None:
        if base is not None:
            check_base_matches(BaseWeights.from_json(checkpoint.manifest.extra["base"]), base)
        restore_engine(engine, checkpoint, heartbeat=context.heartbeat)
        context.report(NoteEvent(f"resuming from {checkpoint.directory.name}"))
    elif origin is not None:
        _load_initial_weights(engine, origin, context)


def _get_trained_hf_config(origin: CheckpointReader, plan: Plan) -> dict[str, Any]:
    """Return the configuration that a checkpoint's weights were trained with.

    The plan has the default configuration of the size. Published weights may differ from it in values that no parameter
    shows, such as rotary positions.
    """
    values = dict(origin.manifest.extra["hf_config"])
    if (values.get("rope_parameters") or {}).get("rope_type") == "default":  # other types may scale by this number
        key = "max_position_embeddings"
        values[key] = max(values[key], plan.hf_config[key])
    return values


def _find_initial_checkpoint(config: Config, plan: Plan, context: RunContext) -> CheckpointReader | None:
    """Return the checkpoint of model.init_from, unless adapters are trained."""
    if config.model.init_from is None or plan.adapter is not None:
        return None
    return _find_source_checkpoint(config.model.init_from, context)


def _load_initial_weights(engine: Engine, origin: CheckpointReader, context: RunContext) -> None:
    try:
        restore_engine(engine, origin, optimizer=False, heartbeat=context.heartbeat)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"model.init_from: {origin.directory} has gone while it was read: that run still trains, and has deleted "
            "an old checkpoint. Start again, or let it end first"
        ) from error


def _find_source_checkpoint(init_from: str, context: RunContext) -> CheckpointReader:
    """Return the newest checkpoint of another run without adapters, as rank 0 sees it: that run may still train."""
    run = check_run(RunDirectory(Path(init_from).expanduser()))
    if _has_trained_adapters(run):
        raise CheckpointError(
            f"model.init_from = {init_from}: that run trained adapters. Train adapters here, too (model.lora), or "
            f"merge them, `ltt export {init_from} --merge`, and give the result as model.path"
        )
    source = context.broadcast_object(find_latest_checkpoint(run.checkpoints_dir) if context.is_rank_zero else None)
    if source is None:
        raise CheckpointError(f"model.init_from = {init_from}: that run has no complete checkpoint")
    return CheckpointReader(source, run.storage)


def _has_trained_adapters(run: RunDirectory) -> bool:
    return (
        parse_config_json(run.resolved_config_path.read_text(), where=str(run.resolved_config_path)).model.lora
        is not None
    )
