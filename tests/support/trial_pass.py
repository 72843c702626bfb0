"""Attempts of a run as on a GPU whose memory holds micro-batches of a few rows: the loop on real tensors of the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.worker import main
from llm_training_toolkit.worker.micro_batch import SmallerMicroBatch, resolve_memory_settings
from rank_tasks import build_context, build_worker_spec

_BYTES = 80_000_000_000


def train_with_room_for(rows: int, error: Exception, run: str, changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Train until an attempt ends otherwise than out of memory, which `error` says for more rows than `rows`.

    Of each attempt: rows of a micro-batch, the training passes that began (rows, whether all of them are one document),
    and how it ended.
    """
    on_gpu = RunContext(0, 1, torch.device("cuda"))
    found: list[dict[str, Any]] = []
    with (
        mock.patch("torch.cuda.mem_get_info", return_value=(_BYTES, _BYTES)),
        mock.patch("torch.cuda.get_device_properties", return_value=SimpleNamespace(total_memory=_BYTES)),
    ):
        while not found or found[-1]["ended"] == SmallerMicroBatch.__name__:
            found.append(_run_attempt(rows, error, run, changes, on_gpu))
    return found


def _run_attempt(
    rows: int, error: Exception, run: str, changes: Mapping[str, Any], on_gpu: RunContext
) -> dict[str, Any]:
    requested = build_worker_spec(run, changes)
    spec, _ = resolve_memory_settings(requested, on_gpu)
    attempt, tracker = main._begin_attempt(spec, on_gpu, requested.config, [])
    built = main._build_components(spec, build_context(), attempt, tracker, (), run_id="")
    passes: list[tuple[int, bool]] = []

    def allocate(module: nn.Module, given: tuple[Any, ...]) -> None:
        ids, positions = given[:2]
        if not module.training:  # the held-out loss comes first
            return
        passes.append((len(ids), bool((positions[:, -1] == ids.shape[1] - 1).all())))
        if len(ids) > rows:
            raise error

    built.engine.deepspeed.module.register_forward_pre_hook(allocate)
    try:
        ended, step = main._train_and_export(replace(built, context=on_gpu), spec, requested.config)
    except Exception as raised:  # noqa: BLE001 - its name is a result
        ended, step = type(raised).__name__, 0
    built.engine.close()
    built.metrics.close()
    return {"rows": spec.config.train.micro_batch_size, "passes": passes, "ended": ended, "step": step}
