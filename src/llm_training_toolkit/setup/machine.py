"""Checks before `import ray`: local or cluster, and capacity of this machine.

Ray reads RAY_AUTH_MODE once, when its core library loads. If it is set later, the driver and its servers disagree, and
`ray.init` waits in vain for its own server.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from llm_training_toolkit import families
from llm_training_toolkit.config import Config
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.plan.auto import GPU_ATTENTION
from llm_training_toolkit.plan.compilation import COMPILE_KEY

LINEAR_ATTENTION = "linear_attention"
_ATTENTION_PACKAGES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "flash_attention_2": {"flash-attn": ("flash_attn", "kernels")},
    "flash_attention_3": {"flash-attn-3": ("flash_attn_interface", "kernels")},
    LINEAR_ATTENTION: {"flash-linear-attention": ("fla",), "causal-conv1d": ("causal_conv1d",)},
}
"""Packages of each implementation of attention that torch does not bring, each with the modules that will do."""
RAY_HEAD_TIMEOUT_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"


def is_local() -> bool:
    """Return whether Ray starts on this machine alone: RAY_ADDRESS is not set."""
    return "RAY_ADDRESS" not in os.environ


def check_machine(config: Config) -> None:
    """Raise PlanError if this machine has too few cores for the workers. A cluster is checked later."""
    if is_local():
        check_cpu_count(config)


def check_cpu_count(config: Config) -> None:
    """Raise PlanError if this machine has fewer cores than `cluster.min_workers` need."""
    cores = len(os.sched_getaffinity(0))
    if config.cluster.min_workers * config.cluster.cpus_per_worker > cores:
        raise PlanError(format_cpu_shortage(config, f"this machine has {cores} cores"))


def check_quantization(config: Config) -> None:
    """Raise PlanError if the run trains on this machine and it cannot hold 4-bit weights."""
    lora = config.model.lora
    if lora is not None and lora.quantize is not None and (config.cluster.workers == 0 or is_local()):
        import torch

        missing = find_quantization_problem(gpu=torch.cuda.is_available())
        if missing:
            raise PlanError(f"model.lora.quantize = {lora.quantize}: {missing}")


def find_quantization_problem(*, gpu: bool) -> str | None:
    """Return the missing requirement of 4-bit weights and its remedy; None if they work here."""
    if not gpu:
        return "4-bit weights need a GPU, and there is none here: remove it (LoRA works without), or train elsewhere"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "4-bit weights need bitsandbytes, which is not installed: pip install 'llm-training-toolkit[qlora]'"
    return None


def check_attention(config: Config) -> None:
    """Raise PlanError if the run trains on this machine, and it cannot compute the model's attention."""
    kinds = [kind for kind in list_attention_kinds(config) if kind in GPU_ATTENTION | {LINEAR_ATTENTION}]
    if not kinds or not (config.cluster.workers == 0 or is_local()):
        return
    import torch

    for kind in kinds:
        problem = find_attention_problem(kind, gpu=torch.cuda.is_available() and config.cluster.gpus_per_worker != 0)
        if problem:
            raise PlanError(f"model.attn_implementation = {kind}: {problem}")


def check_compilation(config: Config) -> None:
    """Raise PlanError if the run trains on this machine with compiled layers, and it cannot compile."""
    if config.model.compile is not True or not (config.cluster.workers == 0 or is_local()):
        return
    import torch

    missing = find_compiler_problem(gpu=torch.cuda.is_available() and config.cluster.gpus_per_worker != 0)
    if missing:
        raise PlanError(f"{COMPILE_KEY} = true: {missing}")


def find_compiler_problem(*, gpu: bool) -> str | None:
    """Return what this machine lacks for torch.compile and its remedy; None if nothing is missing.

    Triton compiles a launcher in C for each machine, torch on CPU its kernels in C++; both need Python's headers.
    """
    if gpu and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton on GPUs, which is not installed: it comes with torch's builds for CUDA"
    variable, names = ("CC", ("gcc", "clang", "cc")) if gpu else ("CXX", ("g++", "clang++", "c++"))
    compilers = [os.environ[variable]] if variable in os.environ else names
    if not any(shutil.which(name) for name in compilers):
        return f"torch.compile needs a compiler, and there is no {' or '.join(compilers)}: install g++, or set false"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "torch.compile needs Python's headers (Python.h): install python3-dev, or set false"
    return None


def list_attention_kinds(config: Config) -> tuple[str, ...]:
    """Return `model.attn_implementation`, and `linear_attention` for a hybrid model."""
    hybrid = families.read_model_dims(families.resolve_hf_config(config)).linear_attention is not None
    return (config.model.attn_implementation, *((LINEAR_ATTENTION,) if hybrid else ()))


def find_attention_problem(kind: str, *, gpu: bool) -> str | None:
    """Return the missing requirement of an implementation of attention and its remedy; None if it works here.

    transformers takes flash attention from its package, or builds for this GPU from the hub by the package `kernels`.
    """
    if kind in GPU_ATTENTION and not gpu:
        return "it needs a GPU, and there is none here: use auto, varlen, sdpa or eager"
    packages = _ATTENTION_PACKAGES.get(kind, {}) if gpu else {}
    missing = [
        package for package, modules in packages.items() if not any(importlib.util.find_spec(name) for name in modules)
    ]
    if not missing:
        return None
    remedy = (
        "pip install 'llm-training-toolkit[hybrid]'" if kind == LINEAR_ATTENTION else "or use auto, which needs none"
    )
    return f"it needs {' and '.join(missing)} on GPUs, which is not installed: install it, {remedy}"


def format_cpu_shortage(config: Config, found: str) -> str:
    """Format the error of a run that asks for more CPUs than there are."""
    workers, cpus = config.cluster.min_workers, config.cluster.cpus_per_worker
    least = "at least " if config.cluster.max_workers > workers else ""
    return (
        f"cluster.workers = {least}{workers} with {cpus} CPU each need {workers * cpus} CPUs, {found}: "
        "lower cluster.workers or cluster.cpus_per_worker (workers change the speed, not the result), "
        "or set RAY_ADDRESS to a larger cluster"
    )
