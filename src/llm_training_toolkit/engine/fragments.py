"""Location of each rank's fragments of parameters and optimizer state under DeepSpeed, ZeRO 2 and 3.

Only this module reads DeepSpeed's internal attributes, as the pinned version has them; tests/ranks/test_fragments.py
reads them all. `Engine` passes the fragments on to checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_training_toolkit.distributed.column_slice import ColumnSlice

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's states, one value per weight each


@dataclass(frozen=True)
class Fragment:
    """Consecutive range of one flattened parameter on this rank."""

    name: str
    """Parameter's name in the Hugging Face model, or its slice's in a checkpoint."""
    start: int
    """First index in the flattened parameter, or in its flattened slice."""
    count: int
    """Number of weights."""
    flat: Tensor
    """The fp32 tensor that the optimizer updates, and the key of its state."""
    offset: int
    """First index in `flat`."""
    columns: ColumnSlice | None = None
    """Slice of the columns that `start` counts in; None if it counts in the whole parameter."""

    def _narrow_to_fragment(self, tensor: Tensor) -> Tensor:
        return tensor.detach().view(-1).narrow(0, self.offset, self.count)

    def get_weights(self) -> Tensor:
        """Return the fp32 weights (count,), a view."""
        return self._narrow_to_fragment(self.flat)

    def get_tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return weights and moments by name, each (count,) fp32: views to copy from and into."""
        state = optimizer.state[self.flat]
        return {"weights": self.get_weights()} | {key: self._narrow_to_fragment(state[key]) for key in MOMENTS}


def locate_fragments(wrapped: Any, names: Mapping[int, str], stage: int, rank: int) -> Iterator[Fragment]:  # noqa: ANN401
    """Yield every fragment of a trainable parameter on this rank.

    `wrapped` is DeepSpeed's optimizer; `names` maps `id(parameter)` to the parameter's name.
    """
    if stage == 3:
        yield from _locate_zero3_fragments(wrapped, names, rank)
    else:
        yield from _locate_zero2_fragments(wrapped, names)


def _locate_zero2_fragments(wrapped: Any, names: Mapping[int, str]) -> Iterator[Fragment]:  # noqa: ANN401
    for group in wrapped.bit16_groups:
        for parameter in group:
            mapping = parameter._hp_mapping  # noqa: SLF001 - None where no piece lies on this rank
            if mapping is None:
                continue
            piece, master_address = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = wrapped.single_partition_of_fp32_groups[mapping.param_group_index]
            yield Fragment(names[id(parameter)], piece.start, piece.numel, flat, master_address.start)


def _locate_zero3_fragments(wrapped: Any, names: Mapping[int, str], rank: int) -> Iterator[Fragment]:  # noqa: ANN401
    for groups in wrapped.fp16_groups:
        for parameter in groups:
            group, offset, _ = wrapped.grad_position[wrapped.get_param_id(parameter)]
            start = rank * parameter.ds_tensor.numel()  # pieces are padded to equal size
            count = min(parameter.ds_tensor.numel(), parameter.ds_numel - start)
            if count > 0:
                flat = wrapped.fp32_partitioned_groups_flat[group]
                yield Fragment(names[id(parameter)], start, count, flat, offset)


def sync_low_precision_weights(wrapped: Any, stage: int) -> None:  # noqa: ANN401
    """Update the forward pass's weights after fp32 weights were written. Collective."""
    if stage == 3:
        _sync_zero3_weights(wrapped)
    else:
        wrapped.update_lp_params()


def _sync_zero3_weights(wrapped: Any) -> None:  # noqa: ANN401
    persistent: list[nn.Parameter] = wrapped.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)  # type: ignore[attr-defined]
    for group in range(len(wrapped.fp16_partitioned_groups_flat)):
        wrapped._reassign_or_swap_out_partitioned_parameters(group)  # noqa: SLF001
    # Copies within nodes (zero_hpz_partition_size) would be gathered with the weights from before a resume: DeepSpeed
    # 0.19.8 drops them only after an update of its own.
    wrapped.invalidate_secondary_tensor()
    if persistent:
        persistent[0].all_gather(persistent)  # type: ignore[attr-defined]
