"""Bytes of one step on real ranks: what collectives send, and the tensors that live at once."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from llm_training_toolkit.data.dataloader import DataLoader
from memory_dry_run import LiveBytes
from rank_tasks import build_engine, build_plan, build_worker_spec

# Times that a ring sends (n - 1) / n of the largest tensor. Other collectives of tensors are errors here.
_RING = {
    "allreduce_": 2,
    "reduce_scatter_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "allgather_": 1,
    "_allgather_base_": 1,
    "allgather_into_tensor_coalesced_": 1,
    "alltoall_base_": 1,
}
_ONE_NUMBER = 8  # bytes: such as the norm of the gradients


class StepBytes(LiveBytes):  # type: ignore[no-untyped-call]
    """Bytes that live at once beside those before, and those that collectives give to a ring, without (n - 1) / n.

    What gloo allocates within a collective is left out: it emulates a reduce-scatter by copies, which NCCL does not.
    """

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        self.standing = 0
        """Bytes of every tensor's storage in this process before."""
        self.sent = 0
        self.sent_in_groups = 0
        """By collectives of fewer than all ranks."""
        seen = set()
        for each in gc.get_objects():
            if issubclass(type(each), Tensor) and each.device.type == "cpu":
                storage = each.untyped_storage()
                if storage._cdata not in seen:
                    seen.add(storage._cdata)
                    self.standing += storage.nbytes()
                    self.ignore(each)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "c10d":
            if _is_within_collective():
                return func(*args, **(kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)
        tensors = [each for each in pytree.tree_leaves(args) if isinstance(each, Tensor)]
        size = max((each.numel() * each.element_size() for each in tensors), default=0)
        if size > _ONE_NUMBER:
            sent = size * _RING[func._schema.name.split("::")[1]]
            if _count_ranks(args) < dist.get_world_size():
                self.sent_in_groups += sent
            else:
                self.sent += sent
        return func(*args, **(kwargs or {}))


def _count_ranks(args: Any) -> int:
    """Return the ranks of a collective's process group."""
    groups = [each for each in pytree.tree_leaves(args) if isinstance(each, torch.ScriptObject)]
    return min(dist.ProcessGroup.unbox(each).size() for each in groups if "ProcessGroup" in str(each._type()))


def _is_within_collective() -> bool:
    """Return whether a collective waits for its end, which is where gloo copies the results."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals["__name__"] in {"torch._compile", "torch._dynamo.eval_frame"}:
        frame = frame.f_back
    return frame.f_globals["__name__"] == "torch.distributed.distributed_c10d" and frame.f_code.co_name != "wrapper"


def count_step_bytes(run: str, changes: Mapping[str, Any], passes: int) -> tuple[int, int, int]:
    """Bytes that this rank sends to all ranks in a step of some micro-batches, and within groups of ranks.

    The third are those that live at its peak for the engine.
    """
    spec = build_worker_spec(run, changes)
    before = StepBytes().standing
    engine = build_engine(spec, build_plan(spec))
    dataloader = DataLoader(spec.dataset_info, global_batch=spec.config.train.global_batch_size, epochs=None)
    rows = spec.config.train.micro_batch_size
    assert isinstance(rows, int)
    batches = dataloader.get_micro_batches(0, range(passes * rows), rows, passes)
    for _ in range(2 if engine.stage == 3 else 1):  # DeepSpeed's first step records the order of modules
        engine.forward_backward(batches, 100)
        engine.optim_step(1e-3)
    with StepBytes() as counted:
        engine.forward_backward(batches, 100)
        engine.optim_step(1e-3)
    engine.close()
    return counted.sent, counted.sent_in_groups, counted.standing - before + counted.peak
