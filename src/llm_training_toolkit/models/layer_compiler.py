"""Compilation of decoder layers by torch.compile: all layers of a kind share one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_SHAPES = 2  # a step's micro-batches, and a smaller last one; further shapes are rare, and run as they are
# Graphs of one function before torch gives up, 8 by default: two shapes, with and without a mask, for layers with and
# without a sliding window, and the first one beside adapters, whose input needs no gradient.
_GRAPHS = 32


def get_decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of a transformers model."""
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    return list(decoder.h if hasattr(decoder, "h") else decoder.layers)


def _configure_torch() -> None:
    """Set the options of torch.compile in this process; loading it takes a second."""
    from torch._dynamo import config as dynamo  # noqa: PLC0415
    from torch._inductor import config as inductor  # noqa: PLC0415

    dynamo.recompile_limit = _GRAPHS
    # Hooks of routers count in the forward pass alone, not once more in its recomputation.
    dynamo.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    # Otherwise kernels are chosen by measured time, and another one may round differently.
    inductor.deterministic = torch.are_deterministic_algorithms_enabled()


class LayerCompiler:
    """Compiled forward passes of a model's decoder layers, in training alone.

    Modules and parameters keep their names. Activation checkpointing is inside of what is compiled: torch then repeats
    operators within the graph of the backward pass. Passes without gradients and of rare shapes run as they are,
    because each would compile graphs of its own.
    """

    def __init__(self, layers: list[nn.Module], backend: str) -> None:
        _configure_torch()
        self._is_active = False
        self._shapes: list[torch.Size] = []
        for layer in layers:
            compiled = torch.compile(layer.forward, backend=backend, fullgraph=True, dynamic=False)
            layer.forward = self._choose_forward(layer.forward, compiled)

    def _choose_forward(self, eager: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401 - whatever transformers passes
            return (compiled if self._is_active else eager)(*arguments, **options)

        return forward

    def begin_forward(self, input_ids: Tensor, *, training: bool) -> bool:
        """Return whether the layers compute tokens (B, T) by compiled code, and make them do so."""
        self._is_active = training and torch.is_grad_enabled() and self._knows_shape(input_ids.shape)
        return self._is_active

    def _knows_shape(self, shape: torch.Size) -> bool:
        if shape not in self._shapes and len(self._shapes) < _SHAPES:
            self._shapes.append(shape)
        return shape in self._shapes

    def stop(self) -> None:
        """Compute as the layers are, until `begin_forward`."""
        self._is_active = False


def mark_dynamic_bounds(cu_seqlens: Tensor) -> None:
    """Let one graph take any number of documents; their bounds (documents + 1,) have at least two elements."""
    from torch._dynamo import mark_dynamic  # noqa: PLC0415 - is loaded where something is compiled

    mark_dynamic(cu_seqlens, 0)


def is_compile_error(error: BaseException) -> bool:
    """Return whether torch.compile failed."""
    from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415 - is loaded where something is compiled

    return isinstance(error, TorchDynamoException)
