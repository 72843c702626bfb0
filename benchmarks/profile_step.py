"""Where the time of a toolkit step goes: parts of forward, backward and update, ZeRO stages in turns in one process.

Processor time, which others on the machine disturb less than the clock; one process, one thread, packed rows.
Page faults are counted, too: fresh memory costs as much as arithmetic. `--json FILE` keeps medians.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WARM_UP = 2
LENGTH = 256


class PartTimer:
    """Seconds of named parts of the step under way; a part within another one counts in both."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Time every call of a function or method."""
        given = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.process_time()
            try:
                return given(*arguments, **options)
            finally:
                self.seconds[part] += time.process_time() - began

        setattr(owner, name, timed)


def build(size: str, precision: str, stage: int, parts: PartTimer) -> Any:
    """An engine whose parts are timed."""
    import torch

    from common import StepRequest, model
    from llm_training_toolkit.config.schema import OptimConfig
    from llm_training_toolkit.engine import Engine, zero3_init
    from llm_training_toolkit.models import LossModule

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": stage if stage >= 2 else 0,
            "overlap_comm": False,
            "reduce_bucket_size": 100_000_000,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "steps_per_print": 2**31 - 1,
    }
    if stage <= 1:
        config["gradient_clipping"] = 0.0  # the engine clips
    elif precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    with zero3_init(config):
        module = LossModule(model(StepRequest("qwen3", size, precision, 0, 1), dtype), "auto")
    engine = Engine(module, OptimConfig(lr=1e-4), config, torch.device("cpu"), zero_stage=stage)
    parts.watch(engine, "_run_forward", "forward")
    parts.watch(engine.deepspeed, "backward", "backward")
    parts.watch(engine.optimizer, "step", "step: AdamW")
    replica = engine._master_weights  # noqa: SLF001 - its parts are what is asked for
    if replica is not None:
        parts.watch(replica, "reduce_gradients", "backward: reduction")
        parts.watch(replica, "compute_grad_norm", "step: norm")
        parts.watch(replica, "sync_low_precision", "step: refresh")
    else:
        parts.watch(engine.deepspeed, "allreduce_gradients", "backward: reduction")
    parts.watch(engine, "optim_step", "step")
    return engine


def micro_batch(size: str) -> Any:
    """Random rows of two documents each."""
    import torch

    from common import SIZES
    from llm_training_toolkit.data.collate import MicroBatch
    from llm_training_toolkit.models.attention import compute_cu_seqlens
    from loop import rows

    ids = rows(SIZES[size][1])
    positions = torch.arange(LENGTH).repeat(len(ids), 1)
    positions[:, 100:] -= 100
    labels = torch.roll(ids, -1, 1)
    labels[:, -1] = -100
    return MicroBatch(ids, positions, labels, *compute_cu_seqlens(positions))


def one_step(engine: Any, size: str, micro_batches: int, parts: PartTimer) -> dict[str, float]:
    """Seconds of the parts of a step, the whole of it, and its page faults."""
    batches = [micro_batch(size) for _ in range(micro_batches)]
    tokens = sum(int((batch.labels >= 0).sum()) for batch in batches)
    parts.seconds.clear()
    faults, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
    engine.forward_backward(batches, tokens)
    engine.optim_step(1e-4)
    whole = time.process_time() - began
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {**parts.seconds, "whole": whole, "faults": float(faults)}


def profile(arguments: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Medians by stage."""
    import torch.distributed as dist

    from llm_training_toolkit.engine import prepare_deepspeed

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    prepare_deepspeed("cpu")
    import transformers.models.qwen3.modeling_qwen3 as qwen3

    from llm_training_toolkit.models import loss

    parts = PartTimer()
    parts.watch(qwen3, "create_causal_mask", "forward: mask")
    parts.watch(loss, "compute_token_loss_sum", "forward: loss")
    engines = {stage: build(arguments.size, arguments.precision, stage, parts) for stage in arguments.zero}
    found: dict[int, list[dict[str, float]]] = {stage: [] for stage in engines}
    for _ in range(WARM_UP + arguments.steps):
        for stage, engine in engines.items():
            found[stage].append(one_step(engine, arguments.size, arguments.micro_batches, parts))
    return {stage: medians(steps[WARM_UP:]) for stage, steps in found.items()}


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """Of every part."""
    return {part: statistics.median(step.get(part, 0.0) for step in steps) for part in sorted(steps[0])}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=["4.2M", "99.5M"], default="99.5M")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ |= {"LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    sys.path += [str(HERE / "step"), str(HERE / "checkpoint")]
    import torch

    torch.set_num_threads(1)
    found = profile(arguments)
    for stage, of_parts in found.items():
        print(f"\nZeRO {stage}, {arguments.size}, {arguments.precision}, {arguments.micro_batches} micro-batch(es):")
        for part, value in of_parts.items():
            print(f"  {part:24} {value:10,.0f}" if part == "faults" else f"  {part:24} {1e3 * value:10,.1f} ms")
    if arguments.json:
        asked = {name: str(value) for name, value in vars(arguments).items() if name != "json"}
        arguments.json.write_text(json.dumps({**asked, "medians": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
