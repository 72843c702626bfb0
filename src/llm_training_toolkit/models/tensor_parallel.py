"""Matrices of a model cut over the ranks of a replica, as transformers' plan for its class says.

    column-parallel   rows of the weight, and of the bias: heads of attention, width of the feed-forward layer
    row-parallel      columns of the weight; the ranks' outputs are summed, then the bias is added

Embedding, output layer and norms stay whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_training_toolkit.distributed.tensor_group import TensorGroup

_Style = Literal["colwise", "rowwise", "replicated_with_grad_allreduce"]


@dataclass(frozen=True)
class ParameterSlice:
    """Slice of a parameter: equal parts along one dimension, of which a rank holds one."""

    dim: Literal[0, 1]
    index: int
    """Place of the slice among the parts."""
    parts: int

    def compute_whole_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Return the shape of the whole parameter, given that of a slice."""
        return tuple(size * (self.parts if dim == self.dim else 1) for dim, size in enumerate(shape))


class TensorParallelModel:
    """Slices of a model's parameters on this rank."""

    def __init__(self, model: nn.Module, group: TensorGroup) -> None:
        """Cut the model's matrices in place. It must have its weights already, the same on every rank."""
        self.group = group
        self._slices: dict[int, ParameterSlice] = {}
        for module, style in _iter_planned_modules(model):
            if style == "replicated_with_grad_allreduce":
                for parameter in module.parameters():
                    parameter.register_hook(_build_gradient_hook(group))  # type: ignore[no-untyped-call]
                continue
            assert isinstance(module, nn.Linear)
            self._cut(module.weight, 0 if style == "colwise" else 1)
            if style == "rowwise":
                module.__class__ = RowParallelLinear
                module.tensor_group = group  # type: ignore[assignment] # set on the instance of the new class
            elif module.bias is not None:
                self._cut(module.bias, 0)
        for block in _find_blocks(model):
            block.register_forward_pre_hook(_build_input_hook(group), with_kwargs=True)

    def get_slice(self, parameter: nn.Parameter) -> ParameterSlice | None:
        """Return the slice that a parameter is of, or None if it is whole on every rank."""
        return self._slices.get(id(parameter))

    def get_whole_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Return the shape of a parameter in the whole model."""
        part = self.get_slice(parameter)
        return tuple(parameter.shape) if part is None else part.compute_whole_shape(parameter.shape)

    def count_column_parts(self, parameters: Iterable[nn.Parameter], names: Mapping[int, str]) -> dict[str, int]:
        """Return the number of slices of the parameters whose columns are cut; `names` maps `id(parameter)`."""
        cut = [each for each in parameters if (part := self.get_slice(each)) is not None and part.dim == 1]
        return {names[id(each)]: self.group.size for each in cut}

    def broadcast_slices(self, parameters: Iterable[nn.Parameter]) -> None:
        """Overwrite every slice with that of the first replica, as DeepSpeed does with whole parameters. Collective."""
        for parameter in parameters:
            if self.get_slice(parameter) is not None:
                self.group.data_parallel.broadcast_from_first(parameter.data)

    def gather_whole(self, parameter: nn.Parameter, values: Tensor) -> Tensor:
        """Return values of a whole parameter, given those of this rank's slice or whole ones. Collective."""
        part = self.get_slice(parameter)
        return values if part is None else torch.cat(self.group.all_gather(values), part.dim)

    def is_owner(self, parameter: nn.Parameter) -> bool:
        """Return whether this rank saves a parameter and counts its gradient: each its slices, the first the rest."""
        return self.group.index == 0 or id(parameter) in self._slices

    def _cut(self, parameter: Tensor, dim: Literal[0, 1]) -> None:
        group = self.group
        parameter.data = (
            parameter.detach().chunk(group.size, dim)[group.index].clone(memory_format=torch.contiguous_format)
        )
        parameter.ds_optim_param = True  # type: ignore[attr-defined] # DeepSpeed's mark of weights it must not broadcast
        self._slices[id(parameter)] = ParameterSlice(dim, group.index, group.size)


class RowParallelLinear(nn.Linear):
    """Linear layer with a slice of the columns; its input is a slice, and its output the sum over the ranks."""

    tensor_group: TensorGroup

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the output (..., out) of this rank's input (..., in / ranks). Collective."""
        output = self.tensor_group.sum_outputs(F.linear(hidden, self.weight))
        return output if self.bias is None else output + self.bias


def _iter_planned_modules(model: nn.Module) -> Iterator[tuple[nn.Module, _Style]]:
    """Yield the modules that the plan of their class names, with their style."""
    plan: Mapping[str, _Style] = model.config.base_model_tp_plan  # type: ignore[union-attr, assignment]
    for name, module in model.get_decoder().named_modules():  # type: ignore[operator]
        for pattern, style in plan.items():
            if fnmatchcase(name, pattern):
                yield module, style


def _find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold column-parallel layers: attention and the feed-forward layer of every layer."""
    inner = {id(module) for module, style in _iter_planned_modules(model) if style == "colwise"}
    return [block for block in model.modules() if any(id(child) in inner for child in block.children())]


def _build_input_hook(group: TensorGroup) -> Any:  # noqa: ANN401 - torch's hook
    """Return a hook that sums the gradient of a block's input once, not for each layer that reads it."""

    def sum_input_gradient(
        _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (group.sum_gradients(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": group.sum_gradients(kwargs["hidden_states"])}

    return sum_input_gradient


def _build_gradient_hook(group: TensorGroup) -> Any:  # noqa: ANN401 - torch's hook
    """Return a hook of a whole parameter that is used on slices, such as a norm of each head."""
    return lambda gradient: group.all_reduce(gradient.clone())
