"""The model of a run under DeepSpeed: whatever its weights start from, and with adapters beside it where it has them.

random weights, model.path, model.init_from or the run's own checkpoint
  -> model -> loss -> adapters -> engine -> what was saved
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from llm_training_toolkit.checkpoint import Base, Checkpoint, base_of, newest, refuse_other_base
from llm_training_toolkit.checkpoint.restore import restore
from llm_training_toolkit.config import Config, from_json
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.engine import Engine, partitioned, prepare_process, whole_parameter
from llm_training_toolkit.errors import CheckpointError, PlanError
from llm_training_toolkit.models import LossModule, build_model, check_size, check_weights, grow_vocabulary, initialize
from llm_training_toolkit.models.build import DTYPES
from llm_training_toolkit.plan import Plan
from llm_training_toolkit.runs.directory import RunDirectory, run_of
from llm_training_toolkit.setup.machine import what_four_bits_lack
from llm_training_toolkit.worker.base_weights import base_path
from llm_training_toolkit.worker.hub_download import weights_here
from llm_training_toolkit.worker.spec import Place


@dataclass(frozen=True)
class Built:
    """A model ready to be trained."""

    engine: Engine
    hf_config: Mapping[str, Any]
    """The Hugging Face configuration of the model, for its exports."""
    base: Base | None
    """The weights that adapters stand beside; None where the model itself is trained."""


def build(place: Place, plan: Plan, context: RunContext, checkpoint: Checkpoint | None) -> Built:
    """The run's model at `checkpoint`, or at its beginning. Collective. Raises PlanError and CheckpointError."""
    _check_device(place.config, context)
    prepare_process(context.device.type)
    path = base_path(place, plan, context) if plan.adapter else place.config.model.path if checkpoint is None else None
    origin = checkpoint or _other_run(place.config, plan, context)
    directory = weights_here(path, place, context) if path is not None else None
    engine, hf_config = _engine(place.config, plan, context, directory, origin)
    # A hub id stays one: what is written down must be found on other machines, too.
    if path is not None:
        hf_config = {**hf_config, "_name_or_path": path}
    base = replace(base_of(directory, context), path=path) if plan.adapter and directory and path else None
    _load(engine, checkpoint, origin, base, context)
    return Built(engine, hf_config, base)


def _check_device(config: Config, context: RunContext) -> None:
    """Refuse what this device does not have; flex_attention on CPU would abort the process."""
    gpu = context.device.type != "cpu"
    if not gpu and config.model.attention in {"flash_attention_2", "flex_attention"}:
        raise PlanError(f"model.attention = {config.model.attention} needs a GPU: use sdpa or eager here")
    if config.model.lora is not None and config.model.lora.quantize is not None:
        missing = what_four_bits_lack(gpu=gpu)
        if missing:
            raise PlanError(f"model.lora.quantize = {config.model.lora.quantize}: {missing}")


def _engine(
    config: Config, plan: Plan, context: RunContext, path: str | None, origin: Checkpoint | None
) -> tuple[Engine, Mapping[str, Any]]:
    """The model under DeepSpeed, with the weights at `path` if there is one, else those of `origin` later."""
    model_section = config.model
    loads = model_section.path is not None or model_section.init_from is not None
    quantize = plan.adapter is not None and plan.adapter.quantize is not None
    if path is not None:
        check_weights(path, plan.hf_config["model_type"])
    with partitioned(plan.deepspeed):
        model = build_model(
            _as_trained(origin, plan) if origin and loads else plan.hf_config,
            precision=plan.precision,
            attention=model_section.attention,
            path=path,
            activation_checkpointing=model_section.activation_checkpointing,
            four_bits_on=context.device if quantize else None,
        )
        if path is not None and model_section.grow_vocabulary is not None:
            grow_vocabulary(model, model_section.grow_vocabulary, whole_parameter)
        check_size(model, plan.parameters, model_section.name)
        if origin is None and path is None:
            initialize(model, config.run.seed, whole_parameter)
        hf_config = model.config.to_dict()  # type: ignore[union-attr, operator]
        hf_config.pop("quantization_config", None)  # of these ranks, not of the weights
        module = LossModule(model, model_section.loss_chunk)
        _add_adapters(module, model, config, plan)
    return Engine(module, config.optim, plan.deepspeed, context.device), hf_config


def _add_adapters(module: LossModule, model: nn.Module, config: Config, plan: Plan) -> None:
    if plan.adapter is None:
        return
    from llm_training_toolkit.models.lora import add_adapters  # peft takes over a second to import

    dtype = DTYPES[plan.precision]
    add_adapters(model, plan.adapter, seed=config.run.seed, dtype=dtype, draws=module.draws)


def _load(
    engine: Engine, checkpoint: Checkpoint | None, origin: Checkpoint | None, base: Base | None, context: RunContext
) -> None:
    """Bring the engine to where the run goes on: its own checkpoint, or the weights of another run."""
    if checkpoint is not None:
        if base is not None:
            refuse_other_base(Base.from_json(checkpoint.manifest.extra["base"]), base)
        restore(engine, checkpoint, pulse=context.pulse)
        context.report({"kind": "note", "message": f"resuming from {checkpoint.directory.name}"})
    elif origin is not None:
        _load_of_another_run(engine, origin, context)


def _as_trained(origin: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The configuration that a checkpoint's weights were trained with: the plan has the size's, and published weights
    may differ from it in what no parameter shows, such as their rotary positions.
    """
    values = dict(origin.manifest.extra["hf_config"])
    if (values.get("rope_parameters") or {}).get("rope_type") == "default":  # others may scale by this number
        key = "max_position_embeddings"
        values[key] = max(values[key], plan.hf_config[key])
    return values


def _other_run(config: Config, plan: Plan, context: RunContext) -> Checkpoint | None:
    """The checkpoint of another run whose weights this one begins with, where its model is trained whole."""
    if config.model.init_from is None or plan.adapter is not None:
        return None
    return _newest_of(config.model.init_from, context)


def _load_of_another_run(engine: Engine, origin: Checkpoint, context: RunContext) -> None:
    try:
        restore(engine, origin, optimizer=False, pulse=context.pulse)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"model.init_from: {origin.directory} has gone while it was read: that run still trains, and has deleted "
            "an old checkpoint. Start again, or let it end first"
        ) from error


def _newest_of(init_from: str, context: RunContext) -> Checkpoint:
    """The newest checkpoint of another run that trained its model whole: rank 0's, as that run may be going on."""
    run = run_of(Path(init_from).expanduser())
    if _trained_adapters(run):
        raise CheckpointError(
            f"model.init_from = {init_from}: that run trained adapters. Train adapters here, too (model.lora), or "
            f"merge them, `ltt export {init_from} --merge`, and give the result as model.path"
        )
    source = context.broadcast(newest(run.checkpoints) if context.is_first else None)
    if source is None:
        raise CheckpointError(f"model.init_from = {init_from}: that run has no complete checkpoint")
    return Checkpoint(source)


def _trained_adapters(run: RunDirectory) -> bool:
    return from_json(run.resolved.read_text(), where=str(run.resolved)).model.lora is not None
