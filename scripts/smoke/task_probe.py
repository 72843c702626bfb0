"""What machine this is: GPUs, versions, free memory, and how fast it multiplies matrices in bf16."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from llm_training_toolkit.runs.directory import collect_environment
from llm_training_toolkit.setup.machine import find_compiler_problem
from smoke.task import Values, run

_SIDE = {"cuda": 8192, "cpu": 512}
_REPEATS = {"cuda": 20, "cpu": 4}


def probe(arguments: Values) -> Values:
    """Facts of the machine; `device` says whether a GPU is wanted. Nothing of a GPU is touched where there is none."""
    found = torch.cuda.is_available()
    facts: Values = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "cuda_build": torch.version.cuda,
        "gpu_count": torch.cuda.device_count() if found else 0,
        "gpu": None,
        "packages": {
            **{
                name: found_version
                for name, found_version in collect_environment()["versions"].items()
                if name != "torch"
            },
            "ray": _version("ray"),
            "flash_attn": _version("flash_attn"),
        },
    }
    facts["cannot_compile"] = find_compiler_problem(gpu=arguments["device"] == "cuda")
    if arguments["device"] == "cuda" and found:
        facts |= _gpu()
    if arguments["device"] == "cpu" or found:
        facts["matmul_flops"] = matmul_flops(torch.device(arguments["device"]))
    return facts


def _version(module: str) -> str | None:
    """Version of a module that can be imported; None where it cannot."""
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return version(module.replace("_", "-"))
    except PackageNotFoundError:
        return "unknown"


def _gpu() -> Values:
    properties: Any = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return {
        "gpu": properties.name,
        "capability": [properties.major, properties.minor],
        "memory_gb": total / 1e9,
        "free_gb": free / 1e9,
        "driver": _driver(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),  # type: ignore[no-untyped-call]
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def _driver() -> str:
    """The driver's version, as nvidia-smi says it."""
    if shutil.which("nvidia-smi") is None:
        return "unknown: no nvidia-smi here"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else "unknown: nvidia-smi says nothing"


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of a square bf16 matrix product of random numbers: the best of some rounds."""
    side, repeats = _SIDE[device.type], _REPEATS[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        _wait(device)
        began = time.perf_counter()
        for _ in range(repeats):
            left @ right
        _wait(device)
        best = min(best, (time.perf_counter() - began) / repeats)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    run(probe)
