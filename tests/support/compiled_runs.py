"""Task of the pool's ranks that works on a run with compiled layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llm_training_toolkit.models import LossModule
from rank_tasks import train_run


def work_on_compiled(run: str, changes: Mapping[str, Any], stop_after: int | None = None) -> dict[str, Any]:
    """Take part in a run whose layers are compiled without generated code, which is bit for bit; and its graphs."""
    from torch._dynamo.utils import counters

    counters.clear()
    compile_layers: Any = LossModule.compile_layers
    usual, compile_layers.__defaults__ = compile_layers.__defaults__, ("aot_eager",)
    try:
        result = train_run(run, changes, stop_after)
    finally:
        compile_layers.__defaults__ = usual
        torch._dynamo.reset()
    return {**result, "graphs": counters["stats"]["unique_graphs"] + sum(counters["graph_break"].values())}
