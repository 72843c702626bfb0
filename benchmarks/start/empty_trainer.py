"""The empty run: Ray on this machine, a TorchTrainer whose workers import what training needs and agree once.

    python empty_trainer.py WORKERS FILE

Writes to FILE the time at which all workers have got there: what a person waits for with no toolkit at all.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def worker(told: Mapping[str, Any]) -> None:
    """Import torch, transformers with the model's own code, and DeepSpeed; then one all-reduce."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401 - imported for its time
    import torch
    import torch.distributed as dist
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForCausalLM  # noqa: F401

    dist.all_reduce(torch.ones(1))
    if dist.get_rank() == 0:
        Path(told["file"]).write_text(str(time.time()))


def main() -> None:
    """Start Ray as `ltt train` does, and run."""
    workers, file = int(sys.argv[1]), Path(sys.argv[2])
    ray.init(
        address="local",
        num_cpus=len(os.sched_getaffinity(0)),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    TorchTrainer(
        worker,
        train_loop_config={"file": str(file)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(name="empty", storage_path=str(file.parent)),
    ).fit()


if __name__ == "__main__":
    main()
