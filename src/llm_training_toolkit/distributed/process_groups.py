"""Process groups of some ranks, each made once in a process: gloo keeps threads for a group as long as it lives."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# torch's 10 minutes for NCCL would end a run whose other ranks wait for the data of one; hangs are detected elsewhere.
_TIMEOUT = timedelta(hours=1)
_made: dict[tuple[int, ...], tuple[Any, Any]] = {}
"""Group of all ranks that it was made beside, and the group, by the ranks."""


def form_process_group(ranks: Sequence[int]) -> Any:  # noqa: ANN401 - torch's group
    """Return torch's group of these ranks, which this process is one of. Collective among them.

    Ranks call it equally often: torch names a group by its ranks and the number of groups there are. Destroyed and made
    again, a group would find the keys of the one before.
    """
    beside, group = _made.get(tuple(ranks), (None, None))
    if beside is not dist.group.WORLD:
        # Synchronized among its members only: otherwise all ranks would wait for every group in turn.
        group = dist.new_group(list(ranks), timeout=_TIMEOUT, use_local_synchronization=True)
        _made[tuple(ranks)] = (dist.group.WORLD, group)
    return group
