"""Ranks on their devices: where an engine's tensors lie, and whether a sum over ranks is right and how fast.

One rank a GPU, at most two; the process group is the toolkit's own, NCCL on GPUs and gloo on CPU.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from llm_training_toolkit.config import Config, parse_config
from llm_training_toolkit.data.collate import MicroBatch
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.engine import Engine, prepare_deepspeed
from llm_training_toolkit.launch.torchrun import open_process_group
from llm_training_toolkit.models import LossModule, build_model
from llm_training_toolkit.models.attention import compute_cu_seqlens
from llm_training_toolkit.plan import check_plan, make_plan
from llm_training_toolkit.worker.spec import get_torchrun_world_size
from smoke.task import Values, run

_BYTES = {"cuda": 256 * 2**20, "cpu": 2**20}
_REPEATS = 10
_TOKENS = 64


def ranks(arguments: Values) -> Values:
    """Build the engine of `config` on this rank, take a step, sum a tensor over all ranks."""
    config = parse_config(arguments["config"], "gpu smoke")
    with open_process_group(config.cluster.gpus_per_worker) as device:
        world_size = get_torchrun_world_size()
        context = RunContext(dist.get_rank(), world_size, device)
        prepare_deepspeed(device.type)
        binding = context.all_gather_object(_binding(config, context))
        sums = {str(dtype): _sum(context, dtype) for dtype in (torch.float32, torch.bfloat16)}
        return {
            "backend": dist.get_backend(),
            "world_size": world_size,
            "binding": binding,
            "sums": sums,
            "expected_sum": world_size * (world_size + 1) / 2,
            "bus_gb_per_second": _bus_speed(context) if world_size > 1 else None,
        }


def _binding(config: Config, context: RunContext) -> Values:
    """Which device this rank was given, which one torch takes unasked, and where everything of the engine lies."""
    plan = check_plan(make_plan(config, ranks=context.world_size))
    model = build_model(plan.hf_config, precision=plan.precision, attention="sdpa")
    module = LossModule(model, config.model.loss_chunk_size)
    engine = Engine(module, config.optim, plan.deepspeed, context.device, zero_stage=plan.zero)
    ids = torch.arange(_TOKENS)[None] % 100
    positions = torch.arange(_TOKENS)[None]
    batch = MicroBatch(ids, positions, ids, *compute_cu_seqlens(positions))
    engine.forward_backward([batch], _TOKENS * context.world_size)
    engine.optim_step(1e-3)
    tensors = [parameter.data for parameter in module.parameters()]
    for piece in engine.local_fragments():
        tensors += [piece.flat, *engine.optimizer.state[piece.flat].values()]
    found = {
        "rank": context.rank,
        "device": str(context.device),
        "tensors_on": sorted({str(tensor.device) for tensor in tensors}),
        "current_device": None,
        "uuid": None,
    }
    if context.device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(context.device)
        found |= {"current_device": torch.cuda.current_device(), "uuid": str(getattr(properties, "uuid", ""))}
    engine.close()
    return found


def _sum(context: RunContext, dtype: torch.dtype) -> list[float]:
    """Smallest and largest element of the sum over ranks of a tensor full of rank + 1."""
    values = torch.full((1000,), context.rank + 1, dtype=dtype, device=context.device)
    dist.all_reduce(values)
    return [float(values.min()), float(values.max())]


def _bus_speed(context: RunContext) -> float:
    """GB/s over the slowest link of a ring: each rank sends and takes 2 (n - 1) / n of the tensor."""
    values = torch.zeros(_BYTES[context.device.type] // 4, device=context.device)
    dist.all_reduce(values)
    context.barrier()
    _wait(context)
    began = time.perf_counter()
    for _ in range(_REPEATS):
        dist.all_reduce(values)
    _wait(context)
    seconds = (time.perf_counter() - began) / _REPEATS
    return 2 * (context.world_size - 1) / context.world_size * values.nbytes / seconds / 1e9


def _wait(context: RunContext) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)


if __name__ == "__main__":
    run(ranks)
