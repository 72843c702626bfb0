"""What must be settled before `import ray`: its environment, and whether this machine is large enough.

Ray reads RAY_AUTH_MODE once, when its core library loads: set later, the driver and the servers it
starts disagree, and `ray.init` waits in vain for its own server.
"""

from __future__ import annotations

import importlib.util
import os

from llm_training_toolkit.config import Config
from llm_training_toolkit.errors import PlanError


def is_local() -> bool:
    """Whether Ray is to be started on this machine alone, because no cluster is named."""
    return "RAY_ADDRESS" not in os.environ


def check_machine(config: Config) -> None:
    """Refuse, before anything starts, more workers than this machine has cores; a cluster is asked later."""
    if is_local():
        check_cpu_count(config)


def check_cpu_count(config: Config) -> None:
    """Raise PlanError where this machine has fewer cores than the fewest workers take."""
    cores = len(os.sched_getaffinity(0))
    if config.cluster.min_workers * config.cluster.cpus_per_worker > cores:
        raise PlanError(format_cpu_shortage(config, f"this machine has {cores} cores"))


def check_quantization(config: Config) -> None:
    """Refuse, before anything starts, 4-bit weights where this machine trains and cannot hold them."""
    lora = config.model.lora
    if lora is not None and lora.quantize is not None and (config.cluster.workers == 0 or is_local()):
        import torch

        missing = find_quantization_problem(gpu=torch.cuda.is_available())
        if missing:
            raise PlanError(f"model.lora.quantize = {lora.quantize}: {missing}")


def find_quantization_problem(*, gpu: bool) -> str:
    """What is missing here for 4-bit weights, and what to do; empty where nothing is."""
    if not gpu:
        return "4-bit weights need a GPU, and there is none here: remove it (LoRA works without), or train elsewhere"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "4-bit weights need bitsandbytes, which is not installed: pip install 'llm-training-toolkit[qlora]'"
    return ""


def format_cpu_shortage(config: Config, found: str) -> str:
    """The message for a run that asks for more CPUs than there are."""
    workers, cpus = config.cluster.min_workers, config.cluster.cpus_per_worker
    least = "at least " if config.cluster.max_workers > workers else ""
    return (
        f"cluster.workers = {least}{workers} with {cpus} CPU each need {workers * cpus} CPUs, {found}: "
        "lower cluster.workers or cluster.cpus_per_worker (workers change the speed, not the result), "
        "or set RAY_ADDRESS to a larger cluster"
    )
