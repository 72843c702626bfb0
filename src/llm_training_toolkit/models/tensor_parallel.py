"""Models whose matrices are cut over the ranks of a replica, as transformers' plan for their class says.

    column-parallel   rows of the weight, and of the bias: heads of attention, width of the feed-forward layer
    row-parallel      columns of the weight; the ranks' outputs are summed, then the bias is added

Embedding, output layer and norms stay whole on every rank. A rank holds no more than one whole matrix at a time, also
while weights are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_training_toolkit.distributed.tensor_group import TensorGroup
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.models.build import build_model
from llm_training_toolkit.models.check_weights import read_hf_config
from llm_training_toolkit.models.weight_stream import WeightStream
from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing

_Style = Literal["colwise", "rowwise", "replicated_with_grad_allreduce"]
_Loader = Callable[[str, nn.Parameter], Tensor]


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

    def take_from(self, whole: Tensor) -> Tensor:
        """Return a copy of the slice of a whole parameter, so that the rest can be freed."""
        return whole.chunk(self.parts, self.dim)[self.index].clone(memory_format=torch.contiguous_format)


class TensorParallelModel:
    """Slices of a model's parameters on this rank."""

    def __init__(self, model: nn.Module, group: TensorGroup, load: _Loader) -> None:
        """Replace the parameters of a model, which may be on the meta device, by this rank's slices.

        `load` returns a whole parameter's values on the rank's device by its name; it is called in the same order on
        every rank.
        """
        self.group = group
        self._slices: dict[int, ParameterSlice] = {}
        dims: dict[int, Literal[0, 1]] = {}
        for module, style in _iter_planned_modules(model):
            if style != "replicated_with_grad_allreduce":
                assert isinstance(module, nn.Linear)
                dims[id(module.weight)] = 0 if style == "colwise" else 1
                if style == "colwise" and module.bias is not None:
                    dims[id(module.bias)] = 0
        self._replace_parameters(model, dims, load)
        for module, style in _iter_planned_modules(model):
            if style == "rowwise":
                module.__class__ = RowParallelLinear
                module.tensor_group = group  # type: ignore[assignment] # of the new class
            elif style == "replicated_with_grad_allreduce":
                for parameter in module.parameters():
                    parameter.register_hook(_build_gradient_hook(group))  # type: ignore[no-untyped-call]
        for block in _find_blocks(model):
            block.register_forward_pre_hook(_build_input_hook(group), with_kwargs=True)

    def _replace_parameters(self, model: nn.Module, dims: Mapping[int, Literal[0, 1]], load: _Loader) -> None:
        """Load every parameter and keep this rank's slice of those in `dims`; tied ones stay tied."""
        replaced: dict[int, nn.Parameter] = {}
        for name, before in list(model.named_parameters()):
            values = load(name, before)
            part = (
                None if id(before) not in dims else ParameterSlice(dims[id(before)], self.group.index, self.group.size)
            )
            after = nn.Parameter(values if part is None else part.take_from(values))
            if part is not None:
                self._slices[id(after)] = part
                after.ds_optim_param = True  # type: ignore[attr-defined] # DeepSpeed's mark: not to be broadcast
            replaced[id(before)] = after
        for module in model.modules():
            for name, before in module.named_parameters(recurse=False, remove_duplicate=False):
                module.register_parameter(name, replaced[id(before)])

    def get_slice(self, parameter: nn.Parameter) -> ParameterSlice | None:
        """Return the slice that a parameter is of, or None if it is whole on every rank."""
        return self._slices.get(id(parameter))

    def get_whole_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Return the shape of a parameter in the whole model."""
        part = self.get_slice(parameter)
        return tuple(parameter.shape) if part is None else part.compute_whole_shape(parameter.shape)

    @contextmanager
    def whole_parameter(self, parameter: nn.Parameter) -> Iterator[None]:
        """Let a parameter be whole inside the block, to be written; this rank keeps its slice of what was written."""
        part = self.get_slice(parameter)
        if part is None:
            yield
            return
        parameter.data = parameter.new_empty(self.get_whole_shape(parameter))
        yield
        parameter.data = part.take_from(parameter.data)

    def count_parameters(self, model: nn.Module) -> int:
        """Return the number of weights of the whole model."""
        return sum(math.prod(self.get_whole_shape(parameter)) for parameter in model.parameters())

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


class RowParallelLinear(nn.Linear):
    """Linear layer with a slice of the columns; its input is a slice, and its output the sum over the ranks."""

    tensor_group: TensorGroup

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the output (..., out) of this rank's input (..., in / ranks). Collective."""
        output = self.tensor_group.sum_outputs(F.linear(hidden, self.weight))
        return output if self.bias is None else output + self.bias


def build_tensor_parallel_model(
    hf_config: Mapping[str, Any],
    group: TensorGroup,
    device: torch.device,
    *,
    precision: str,
    attention: str,
    stream: WeightStream | None = None,
    activation_checkpointing: ActivationCheckpointing = "none",
) -> tuple[nn.Module, TensorParallelModel]:
    """Build a model with this rank's slices, of the weights of `stream` or to be written. Collective with a stream.

    Raises CheckpointError on every rank if one of them cannot load the weights or they do not fit.
    """
    if stream is not None:
        hf_config = read_hf_config(str(stream.directory), hf_config["model_type"]).to_dict()
    model = build_model(
        hf_config,
        precision=precision,
        attention=attention,
        activation_checkpointing=activation_checkpointing,
        device=torch.device("meta"),
    )
    if stream is None:
        return model, TensorParallelModel(model, group, lambda _, meta: torch.empty_like(meta, device=device))
    where = f"model.path = {stream.directory}"
    with stream.raise_together(lambda error: CheckpointError(f"{where}: the weights cannot be loaded: {error}")):
        entries = stream.get_state_dict()

        def load(name: str, meta: nn.Parameter) -> Tensor:
            found = entries[name].get_shape() if name in entries else "absent"
            if found != list(meta.shape):
                raise CheckpointError(f"{where}: the weights do not fit the model: {name} is {found}")
            return stream.load_tensor(name).to(meta.dtype)

        return model, TensorParallelModel(model, group, load)


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
