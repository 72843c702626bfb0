"""Tasks of the pool's ranks that load pretrained weights as workers do below ZeRO 3."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from transformers import core_model_loading

from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.node_group import form_node_group
from llm_training_toolkit.errors import ToolkitError
from llm_training_toolkit.models import build_model
from llm_training_toolkit.models.weight_stream import WeightStream, check_weights_by_readers

HfConfig = Mapping[str, Any]


def context() -> RunContext:
    """This rank's place in the pool."""
    return RunContext(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def streamed_model(hf_config: HfConfig, directory: str, precision: str, ranks: RunContext, node: str) -> Any:
    """The model of the weights in a directory, for a rank on that node."""
    with form_node_group(ranks, node) as group, WeightStream(directory, ranks, group) as stream:
        return build_model(hf_config, precision=precision, attention="sdpa", path=directory, stream=stream)


def find_differences(streamed: Any, loaded: Any) -> list[str]:
    """Names of parameters and buffers that differ in a bit, in dtype or in being trained; of ties and settings, too."""
    ours, theirs = (
        dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        for model in (streamed, loaded)
    )
    different = [
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours
        or name not in theirs
        or ours[name].dtype != theirs[name].dtype
        or ours[name].requires_grad != theirs[name].requires_grad
        or not torch.equal(ours[name], theirs[name])
    ]
    ties = [model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in (streamed, loaded)]
    same_settings = streamed.config.to_dict() == loaded.config.to_dict()
    return different + ["ties"] * (ties[0] != ties[1]) + ["config"] * (not same_settings)


def differences(hf_config: HfConfig, directory: str, precision: str, nodes: Sequence[str]) -> list[str]:
    """Differences between a streamed model and the one that transformers loads from the files on this rank."""
    streamed = streamed_model(hf_config, directory, precision, context(), nodes[dist.get_rank()])
    return find_differences(streamed, build_model(hf_config, precision=precision, attention="sdpa", path=directory))


def refusals(hf_config: HfConfig, directories: Sequence[str], nodes: Sequence[str], truncate: str | None = None) -> str:
    """The error of this rank's check or load. Rank 0 cuts its file `truncate` when all headers have been read."""
    ranks, directory = context(), directories[dist.get_rank()]
    try:
        with form_node_group(ranks, nodes[ranks.rank]) as node:
            check_weights_by_readers(directory, str(hf_config["model_type"]), ranks, node)
            with WeightStream(directory, ranks, node) as stream:
                if truncate is not None and ranks.rank == 0:
                    os.truncate(Path(directory, truncate), Path(directory, truncate).stat().st_size // 2)
                build_model(hf_config, precision="fp32", attention="sdpa", path=directory, stream=stream)
    except ToolkitError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def failed_cast(hf_config: HfConfig, directory: str, nodes: Sequence[str], after: int) -> tuple[str, int]:
    """The error of this rank, and its loaded tensors, if the cast of rank 1 fails after so many tensors."""
    ranks, done = context(), 0
    cast = core_model_loading._materialize_copy

    def fail(tensor: Any, *given: Any) -> Any:
        nonlocal done
        if done == after and ranks.rank == 1:
            raise RuntimeError("no memory for the cast")
        loaded = cast(tensor, *given)
        done += 1
        return loaded

    with (
        form_node_group(ranks, nodes[ranks.rank]) as node,
        WeightStream(directory, ranks, node) as stream,
        patch.object(core_model_loading, "_materialize_copy", fail),
    ):
        try:
            build_model(hf_config, precision="bf16", attention="sdpa", path=directory, stream=stream)
        except ToolkitError as error:
            return f"{type(error).__name__}: {error}", done
    return "", done


def memory_and_reads(hf_config: HfConfig, directory: str) -> tuple[int, int]:
    """Bytes that loading in fp32 took of this rank's memory at its peak, and bytes that it read."""
    ranks = context()
    streamed_model(hf_config, directory, "fp32", ranks, "one")  # what the first load of a process imports
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed, and is used again, would not count
    dist.barrier()
    before, read = _read_status("VmRSS"), _count_bytes_read()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    model = streamed_model(hf_config, directory, "fp32", ranks, "one")
    peak, read = _read_status("VmHWM") - before, _count_bytes_read() - read
    del model
    return peak, read


def _read_status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _count_bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])
