"""Activation checkpointing of a model's layers: `full` keeps a layer's input, `selective` also its costly outputs.

Costly are attention and matrix products. Every second product is recomputed nevertheless: the policy of torchtitan,
`SelectiveAC` in torchtitan/distributed/activation_checkpoint.py at commit b5bcd76.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention.varlen  # registers the operator of variable-length attention
from torch import nn
from torch._higher_order_ops import flex_attention
from torch._higher_order_ops.wrap import inductor_compiled_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing

_aten = torch.ops.aten
_PRODUCTS = frozenset({_aten.mm.default, _aten.addmm.default})  # a linear layer without and with bias
_ALWAYS_KEPT: frozenset[Any] = frozenset(
    {
        _aten._scaled_dot_product_flash_attention.default,  # noqa: SLF001
        _aten._scaled_dot_product_flash_attention_for_cpu.default,  # noqa: SLF001
        _aten._scaled_dot_product_efficient_attention.default,  # noqa: SLF001
        _aten._scaled_dot_product_cudnn_attention.default,  # noqa: SLF001
        torch.ops.torch_attn._varlen_attn.default,  # noqa: SLF001
        flex_attention,
        inductor_compiled_code,  # flex_attention, once compiled
        _aten.bmm.default,  # of eager attention
        _aten.convolution.default,
    }
)
_FLASH_PACKAGES = frozenset({"flash_attn", "flash_attn_3"})  # namespaces of their operators


def enable_activation_checkpointing(model: nn.Module, kind: ActivationCheckpointing) -> None:
    """Make a transformers model recompute its decoder layers in the backward pass, all or in part."""
    if kind == "none":
        return
    arguments: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        arguments["context_fn"] = _create_contexts
    model.activation_checkpointing_enable(arguments)  # type: ignore[operator]
    # For reentrant checkpoints alone: beside adapters it would add a gradient of the first layer's input.
    model.disable_input_require_grads()  # type: ignore[operator]


def _create_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return the contexts of a layer's forward pass and of its recomputation; a layer counts its own products."""
    forward, recomputation = create_selective_checkpoint_contexts(_create_policy())  # type: ignore[no-untyped-call]
    if torch.compiler.is_compiling():
        return forward, recomputation
    return _CostlyOperators(forward), _CostlyOperators(recomputation)


def _create_policy() -> Callable[..., CheckpointPolicy]:
    """Return the policy of one layer's forward pass, which is asked about costly operators alone.

    Products with other rows than the layer's tokens, as in the norms of DoRA, are of weights, and as large.
    """
    count, tokens = 0, 0

    def decide(context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:  # noqa: ANN401
        nonlocal count, tokens
        if not _is_costly(operator):
            return CheckpointPolicy.PREFER_RECOMPUTE
        if operator not in _PRODUCTS:
            return CheckpointPolicy.MUST_SAVE
        rows = len(context.op_output)
        tokens = tokens or rows
        if rows != tokens:
            return CheckpointPolicy.PREFER_RECOMPUTE
        count += 1
        return CheckpointPolicy.MUST_SAVE if count % 2 else CheckpointPolicy.PREFER_RECOMPUTE

    return decide


def _is_costly(operator: Any) -> bool:  # noqa: ANN401
    return operator in _PRODUCTS or operator in _ALWAYS_KEPT or operator.namespace in _FLASH_PACKAGES


class _CostlyOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that hands only the costly operators to one of torch's selective checkpointing.

    Torch's own would count every operator and expect the recomputation to call the same ones. Under ZeRO 3 a layer also
    gathers its weights, unless they are there already.
    """

    supports_higher_order_operators = True

    def __init__(self, inner: TorchDispatchMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inner = inner

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: compiled code is one operator, as in torch's own modes."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Compute an operator, or take its kept output."""
        if _is_costly(func):
            return self._inner.__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))
