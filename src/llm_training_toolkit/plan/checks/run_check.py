"""Problems of a configuration, found before any hardware is allocated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.uri import is_uri
from llm_training_toolkit.families import Family, HfValues, ModelSize, is_hub_id
from llm_training_toolkit.families.family import ISOLATED_MODEL_TYPES
from llm_training_toolkit.plan.auto import GPU_ATTENTION, OFFLOAD_STAGES
from llm_training_toolkit.plan.checks.data_check import find_data_problems, find_tokenizer_problems
from llm_training_toolkit.plan.checks.lora_check import find_lora_problems
from llm_training_toolkit.plan.checks.saved_weights_check import find_saved_weights_problems
from llm_training_toolkit.plan.compilation import find_compile_problem
from llm_training_toolkit.plan.deepspeed import find_deepspeed_problems
from llm_training_toolkit.plan.problem import Problem, format_plural

_MOST_MEMORY_GB = 1e6  # a petabyte on one device: larger estimates are typos


def find_problems(config: Config, size: ModelSize, hf: HfValues, ranks: int) -> tuple[Problem, ...]:
    """Return every reason in the configuration itself that keeps the run from starting."""
    found = (
        *_find_object_store_problems(config),
        *find_tokenizer_problems(config),
        *find_data_problems(config, size, hf),
        *_find_batch_problems(config, ranks),
        *_find_isolation_problems(size.family),
        *_find_router_problems(config, hf),
        *_find_attention_problems(config, size.family),
        *_find_compile_problems(config, hf),
        *_find_weights_problems(config),
        *find_saved_weights_problems(config),
        *_find_revision_problems(config),
        *find_lora_problems(config, size, hf),
        *_find_offload_problems(config),
        *_find_evaluation_problems(config, size.family),
    )
    return (*found, *find_deepspeed_problems(config.engine.deepspeed))


def _find_isolation_problems(family: Family) -> Iterator[Problem]:
    """Find a class that is not known to keep packed documents apart: sequences are always packed."""
    if family.model_type not in ISOLATED_MODEL_TYPES:
        what = f"documents packed into one sequence could see each other in {family.architecture}"
        fix = "Use a family whose isolation is tested (docs/objective.md)"
        yield Problem("packing-not-isolated", "model.name", what, fix)


def _find_router_problems(config: Config, hf: HfValues) -> Iterator[Problem]:
    """Find a balance loss that would do nothing."""
    balance, where = config.train.router_balance, "train.router_balance"
    if balance is None:
        return
    if not hf.get("num_experts"):
        what = f"a balance loss of {balance:g} needs experts, and {config.model.name} has none"
        yield Problem("router-balance-without-experts", where, what, "Remove it")
    elif config.model.lora is not None:
        what = f"a balance loss of {balance:g} cannot train the routers, which are frozen beside adapters"
        yield Problem("router-balance-with-adapters", where, what, "Remove it, or train the whole model")


def _find_attention_problems(config: Config, family: Family) -> Iterator[Problem]:
    """Find what the implementation of attention cannot do, as far as the configuration shows."""
    kind, where = config.model.attn_implementation, "model.attn_implementation"
    on_gpu = config.cluster.gpus_per_worker == 1
    if config.train.precision == "fp32" and (
        kind in {"flash_attention_2", "flash_attention_3"} or (on_gpu and kind == "varlen")
    ):
        yield Problem(
            "attention-without-fp32", where, f"{kind} has no fp32 on GPUs", "Use sdpa, or train.precision bf16"
        )
    if config.cluster.gpus_per_worker == 0 and kind in GPU_ATTENTION:
        yield Problem(
            "attention-needs-gpu",
            where,
            f"{kind} needs a GPU, and cluster.gpus_per_worker is 0",
            "Use auto, varlen, sdpa or eager",
        )
    if kind == "flex_attention" and not family.flex_attention:
        yield Problem(
            "no-flex-attention",
            where,
            f"{family.name} has no flex_attention in transformers",
            "Use auto, varlen, sdpa or eager",
        )


def _find_compile_problems(config: Config, hf: HfValues) -> Iterator[Problem]:
    """Find reasons against the compilation that `model.compile: true` demands."""
    if config.model.compile is True and (problem := find_compile_problem(config, hf)) is not None:
        yield problem


def _find_weights_problems(config: Config) -> Iterator[Problem]:
    """Find a weights directory without loadable weights."""
    if config.model.path is None or not (directory := Path(config.model.path).expanduser()).is_dir():
        return
    if not (directory / "config.json").is_file() and (directory / "adapter_config.json").is_file():
        fix = "Merge them (ltt export RUN --merge) and give the result, or start from their run with model.init_from"
        yield Problem("adapters-without-model", "model.path", f"{config.model.path} holds adapters, and no model", fix)
    elif not (directory / "config.json").is_file():
        what = f"{config.model.path} holds no model (no config.json)"
        yield Problem("no-model-config", "model.path", what, "Give the directory that holds it")
    elif not any(directory.glob("*.safetensors")):
        what = f"{config.model.path} has no weights in safetensors, and pickled ones are not opened"
        yield Problem(
            "no-safetensors",
            "model.path",
            what,
            "Save them anew with transformers, save_pretrained, where you trust them",
        )


def _find_revision_problems(config: Config) -> Iterator[Problem]:
    """Find a revision of a directory, which has none."""
    for where, section in (("model", config.model), ("tokenizer", config.tokenizer)):
        path, revision = section.path, section.revision
        if revision is not None and path is not None and Path(path).expanduser().is_dir():
            what = f"{revision} names a revision of a repository on the hub, and {where}.path = {path} is a directory"
            fix = f"Remove it, or give a hub id (organisation/name) as {where}.path"
            yield Problem("revision-of-directory", f"{where}.revision", what, fix)


def _find_offload_problems(config: Config) -> Iterator[Problem]:
    """Yield a problem if the ZeRO stage cannot keep in host memory what `engine.offload` names."""
    offload, stage, lora = config.engine.offload, config.engine.zero_stage, config.model.lora
    if offload == "optimizer_and_weights" and lora is not None and lora.quantize is not None:
        return  # possible at no stage, and a problem of its own
    stages = OFFLOAD_STAGES[offload]
    if stage != "auto" and stage not in stages:
        yield Problem(
            "offload-stage",
            "engine.offload",
            f"{offload} is not possible at ZeRO {stage}",
            f"Set engine.zero_stage to {' or '.join(map(str, stages))}, or to auto",
        )


def _find_evaluation_problems(config: Config, family: Family) -> Iterator[Problem]:
    """Find tasks that cannot run, as far as the configuration shows."""
    for index, task_config in enumerate(config.eval.tasks):
        where = f"eval.tasks[{index}]"
        if task_config.task == "infill" and not family.special_tokens.has_fim:
            what = f"{family.name} has no tokens for fill-in-the-middle"
            yield Problem(
                "task-without-fim-tokens", where, what, "Remove the task, or use a family that has: qwen2.5, starcoder2"
            )
        if task_config.task == "infill" and task_config.format == "chat":
            yield Problem(
                "infill-of-conversations",
                f"{where}.format",
                "a conversation has no middle to fill in",
                "Use code or text",
            )
        has_conversations = any(source.format == "chat" for source in (*config.data.sources, *config.data.eval.sources))
        if task_config.task == "tool_calls" and task_config.data is None and not has_conversations:
            yield Problem(
                "tool-calls-without-conversations",
                f"{where}.data",
                "no source is of format chat, so no conversation is held out",
                "Name conversations with tools",
            )
    if config.eval.tasks and not config.export.at_end:
        what = "tasks are carried out on the exported model, and export.at_end is false"
        yield Problem(
            "tasks-without-export",
            "eval.tasks",
            what,
            "Set export.at_end to true, or evaluate later: ltt export, ltt evaluate",
        )


def _find_object_store_problems(config: Config) -> Iterator[Problem]:
    """Find settings that do not work for a run in an object store."""
    model = config.model
    if model.init_from is not None and is_uri(model.init_from):
        what = f"{model.init_from} is an address: another run's weights are read from a directory"
        yield Problem(
            "init-from-uri", "model.init_from", what, "Export it to a path (ltt export RUN --out) and give model.path"
        )
    if not is_uri(config.run.dir):
        return
    if not config.run.dir.startswith("s3://"):
        what = f"{config.run.dir}: of object stores, runs can lie in S3 and what speaks its protocol (s3://)"
        yield Problem("unsupported-store", "run.dir", what, "Use s3://bucket/path, or a path that every node sees")
    if model.lora is not None and model.path is None:
        what = "without model.path the weights that adapters stand beside would be written into an object store"
        yield Problem(
            "adapter-base-in-store", "model.path", what, "Give their directory or hub id, or a run.dir that is a path"
        )


def find_memory_problems(memory_gb: Mapping[str, float]) -> tuple[Problem, ...]:
    """Return a problem if a device would need more memory than a whole data center has."""
    needed = sum(memory_gb.values())
    if needed <= _MOST_MEMORY_GB:
        return ()
    largest = max(memory_gb, key=lambda part: memory_gb[part])
    where = "model.config_overrides" if largest in {"weights", "gradients", "optimizer"} else "data.sequence_length"
    what = f"about {needed:.3g} GB a device, most of it {largest} ({memory_gb[largest]:.3g} GB): this can never fit"
    return (
        Problem(
            "impossible-memory",
            where,
            what,
            "Check the number of zeros in model.config_overrides, data.sequence_length, train.micro_batch_size",
        ),
    )


def _find_batch_problems(config: Config, ranks: int) -> Iterator[Problem]:
    batch = config.train.global_batch_size
    most = batch * config.engine.ranks_per_replica
    if ranks > most:
        sequences, workers = format_plural(batch, "sequence"), format_plural(most, "worker")
        what = f"{ranks:,} workers share {sequences}, so {ranks - most:,} would have none"
        yield Problem(
            "more-workers-than-sequences",
            "cluster.workers",
            what,
            f"Use at most {workers}, or a larger train.global_batch_size",
        )


def is_directory_or_hub_id(path: str) -> bool:
    """Return whether weights are on this machine or may be on the hub: an id has at most one slash."""
    return Path(path).expanduser().is_dir() or is_hub_id(path)
