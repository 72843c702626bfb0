"""Operators after which a GPU's host would wait, counted on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS_VALUES = {
    "aten::_local_scalar_dense",  # .item(), float(tensor), if tensor
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::equal",
}
_INDEXES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class SynchronizationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count of operators whose result, or its shape, depends on values that the host must read."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        by_mask = name in _INDEXES and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += name in _READS_VALUES or by_mask
        return func(*args, **(kwargs or {}))
