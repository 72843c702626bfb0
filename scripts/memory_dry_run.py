"""Peak memory of a full-size forward and backward pass beside the plan's estimate, without taking that memory.

Runs the toolkit's own model and loss under FakeTensorMode, where tensors have shapes and no values, and counts the
bytes that live at once. Weights are not counted, and each gradient goes as soon as it is made, as from ZeRO 1 on.
Prints a table of every recipe in configs/ and of the sizes in `SIZES`.

    python scripts/memory_dry_run.py
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface

from linear_attention_shapes import replace_kernels
from llm_training_toolkit import families
from llm_training_toolkit.config import Config, load_config, parse_config
from llm_training_toolkit.distributed.sequence_group import SequenceGroup
from llm_training_toolkit.families import AdapterSpec
from llm_training_toolkit.models import LossModule, build_model
from llm_training_toolkit.models.build import DTYPES
from llm_training_toolkit.plan import DeviceWorkload, compute_loss_chunk_size
from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing, AttentionMemory
from llm_training_toolkit.plan.memory.memory_estimate import estimate_pass_bytes

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SIZES: tuple[tuple[str, int, int, ActivationCheckpointing], ...] = (
    ("qwen2.5-1.5b", 4096, 1, "none"),
    ("qwen2.5-1.5b", 4096, 4, "full"),
    ("qwen2.5-7b", 4096, 1, "none"),
    ("qwen2.5-7b", 4096, 4, "selective"),
    ("qwen2.5-7b", 4096, 4, "full"),
    ("qwen2.5-7b", 32768, 1, "full"),
    ("qwen2.5-7b", 131072, 1, "full"),
    ("qwen3-8b", 8192, 2, "full"),
    ("qwen2.5-32b", 4096, 1, "full"),
    ("qwen2.5-32b", 32768, 1, "full"),
    ("qwen2.5-32b", 131072, 1, "full"),
    ("qwen3.5-4b", 4096, 1, "none"),
    ("qwen3.5-9b", 4096, 4, "selective"),
    ("qwen3.5-9b", 4096, 4, "full"),
    ("qwen3-coder-next", 4096, 4, "full"),
    ("qwen3.5-35b-a3b", 4096, 1, "selective"),
)
"""Size, tokens of a sequence, rows and checkpointing, with attention of variable length."""
_VARLEN = "dry_run_varlen"
_DOCUMENTS = 4  # of equal length in every row


@dataclass(frozen=True)
class DryRun:
    """One pass at full size."""

    name: str
    load: DeviceWorkload
    hf_config: dict[str, Any]

    def measure(self) -> int:
        """Return the peak of live bytes beside the weights."""
        return measure_pass_bytes(self.load, self.hf_config)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages made inside that live at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def ignore(self, tensor: Tensor) -> None:
        """Leave out a storage that exists already."""
        self._sizes[tensor.untyped_storage()._cdata] = 0  # noqa: SLF001 - the identity of a storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        pytree.tree_map_only(Tensor, self._count, out)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()  # noqa: SLF001 - the identity of a storage
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


class FakeLiveBytes(LiveBytes):  # type: ignore[no-untyped-call]
    """Live bytes of a pass without values: autograd adds gradients in place, as it does outside of a dispatch mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_autograd_sum(func, args):
            return args[0].add_(args[1])
        return super().__torch_dispatch__(func, types, args, kwargs)


def _is_autograd_sum(func: Any, args: Any) -> bool:
    """Return whether autograd itself adds two gradients of one tensor, not a Python function below it."""
    if func is not torch.ops.aten.add.Tensor or not all(isinstance(each, Tensor) for each in args[:2]):
        return False
    frame = sys._getframe(2)  # noqa: SLF001 - the caller is all that tells
    while frame.f_code.co_name in {"_fn", "inner"} and frame.f_back is not None:  # torch's wrappers of a mode
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward" and args[0].shape == args[1].shape


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Any:  # noqa: ARG001
    """Attend within documents of equal length, over all rows at once; tensors (B, H, T, D)."""
    rows, heads, length, width = query.shape
    flat: Any = [each.transpose(1, 2).reshape(rows * length, -1, width) for each in (query, key, value)]
    group = given.get("sequence_group")
    if group is not None:
        flat = group.gather_tokens(*flat)
    starts = torch.zeros(_DOCUMENTS * rows + 1, dtype=torch.int32)
    longest = length // _DOCUMENTS
    scale, window = given.get("scaling"), (-1, 0)
    out: Any = varlen_attn(
        flat[0], flat[1], flat[2], starts, starts, longest, longest, scale=scale, window_size=window, enable_gqa=True
    )
    if group is not None:
        out = group.scatter_tokens(out)
    return out.reshape(rows, length, heads, width), None


def _return_nothing(*_given: Any, **_named: Any) -> None:
    return None


AttentionInterface.register(_VARLEN, _attend)
AttentionMaskInterface.register(_VARLEN, _return_nothing)


@contextmanager
def _without_values() -> Iterator[None]:
    """Replace what would read values of tensors, or swap them for others."""

    def sum_all(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        from llm_training_toolkit.models import loss

        whole: Tensor = loss._ChunkedLoss.apply(hidden, weight, labels, chunk)  # type: ignore[no-untyped-call] # noqa: SLF001
        return whole

    def one_document(position_ids: Tensor) -> Tensor:
        return torch.zeros_like(position_ids)

    def same_module(module: nn.Module, *_device: Any) -> nn.Module:
        return module

    def receive(parts: Tensor, _group: Any) -> Tensor:
        return torch.empty_like(parts)

    move_adapter = "_move_adapter_to_device_of_base_layer"
    patches = (
        mock.patch("llm_training_toolkit.models.loss.compute_token_loss_sum", sum_all),
        mock.patch("transformers.masking_utils.find_packed_sequence_indices", one_document),
        mock.patch(f"peft.tuners.tuners_utils.BaseTunerLayer.{move_adapter}", _return_nothing),
        mock.patch(f"peft.tuners.lora.layer.ParamWrapper.{move_adapter}", _return_nothing),
        mock.patch("torch.nn.Module.to", same_module),
        mock.patch("llm_training_toolkit.distributed.sequence_group._send", receive),
    )
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield


def measure_pass_bytes(load: DeviceWorkload, hf_config: dict[str, Any]) -> int:
    """Return the peak of live bytes of one forward and backward pass, beside the weights."""
    attention = {"varlen": _VARLEN, "masked": "sdpa", "eager": "eager"}[load.attention]
    with FakeTensorMode(allow_non_fake_inputs=True), _without_values():
        model = build_model(
            hf_config,
            precision=load.precision,
            attention=attention,
            activation_checkpointing=load.checkpointing,
        )
        group = SequenceGroup(0, load.sequence_parallel) if load.sequence_parallel > 1 else None
        module = LossModule(model, load.loss_chunk, sequence_group=group).train()
        if load.adapter is not None:
            _add_adapters(module, model, load.adapter, load.precision)
        rows, length = load.micro_batch, load.sequence_length
        if group is not None:  # all rows as one, and of it a slice
            rows, length = 1, load.micro_batch_tokens
        ids = torch.zeros((rows, length), dtype=torch.int64)
        positions = torch.arange(length).expand(rows, -1).contiguous()
        bounds = torch.zeros(2, dtype=torch.int32)
        live = FakeLiveBytes()
        for each in (*module.parameters(), *module.buffers(), ids, positions, bounds):
            live.ignore(each)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
        documents = _DOCUMENTS * load.micro_batch
        with replace_kernels(model, documents=documents), live:
            module(ids, positions, ids, bounds, load.sequence_length).backward()
    return live.peak


def _add_adapters(module: LossModule, model: nn.Module, adapter: AdapterSpec, precision: str) -> None:
    from llm_training_toolkit.models.lora import add_adapters  # imports peft

    add_adapters(model, adapter, seed=0, dtype=DTYPES[precision], draws=module.batch_position)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def build_dry_run(
    name: str, config: Config, attention: AttentionMemory, rows: int, checkpointing: ActivationCheckpointing
) -> DryRun:
    """Return the pass of a configuration in bf16. Weights in 4 bits count as adapters beside weights in 16."""
    hf = dict(families.resolve_hf_config(config))
    adapter = families.resolve_adapter(config, hf)
    load = DeviceWorkload(
        model=families.read_model_dims(hf),
        zero=2,
        precision="bf16",
        workers=1,
        micro_batch=rows,
        sequence_length=config.data.sequence_length,
        adapter=None if adapter is None else replace(adapter, quantize=None),
        checkpointing=checkpointing,
        loss_chunk=compute_loss_chunk_size(config.model.loss_chunk_size, hf["vocab_size"]),
        attention=attention,
        sequence_parallel=config.engine.sequence_parallel,
    )
    return DryRun(name, load, hf)


def build_sized_run(
    size: str,
    length: int,
    rows: int,
    checkpointing: ActivationCheckpointing,
    attention: AttentionMemory = "varlen",
    *,
    sequence_parallel: int = 1,
    **model: Any,
) -> DryRun:
    """Return the pass of a known size with the given fields of `model`."""
    raw = {
        "run": {"name": "dry"},
        "model": {"name": size, **model},
        "tokenizer": {"path": "none"},
        "data": {"sequence_length": length, "sources": [{"path": "none", "format": "code"}]},
        "train": {"steps": 1},
        "engine": {"sequence_parallel": sequence_parallel},
    }
    return build_dry_run(size, parse_config(raw, "dry run"), attention, rows, checkpointing)


def list_shared_runs() -> list[DryRun]:
    """Return passes of a row that four ranks share, each as one of these ranks has it."""
    kinds: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")
    runs = [build_sized_run("qwen2.5-7b", 131072, 1, kind, sequence_parallel=4) for kind in kinds]
    return [replace(run, name=f"{run.name} on 4 ranks") for run in runs]


def list_recipe_runs() -> list[DryRun]:
    """Return each recipe with one row and with four, with and without masks, and with each kind of checkpointing."""
    runs = []
    for path in sorted(CONFIGS.glob("[qs]*/*.yaml")):
        if path.parent.name == "search":
            continue
        config = load_config(path, ())
        kinds: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")
        attentions: tuple[AttentionMemory, ...] = ("varlen", "masked")
        runs += [
            build_dry_run(path.stem, config, attention, rows, checkpointing)
            for attention in attentions
            for rows in (1, 4)
            for checkpointing in kinds
            if not (attention == "varlen" and config.model.name.startswith("starcoderbase"))
            and not (attention == "masked" and config.engine.sequence_parallel > 1)
        ]
    return runs


def main() -> None:
    """Print the table."""
    print("| pass | tokens | rows | checkpointing | attention | dry run GB | plan GB | error |")
    print("|---|---|---|---|---|---|---|---|")
    for run in (*(build_sized_run(*size) for size in SIZES), *list_shared_runs(), *list_recipe_runs()):
        found, planned = run.measure(), estimate_pass_bytes(run.load)
        load = run.load
        print(
            f"| {run.name} | {load.sequence_length:,} | {load.micro_batch} | {load.checkpointing} | {load.attention} | "
            f"{found / 1e9:.2f} | {planned / 1e9:.2f} | {100 * (planned / found - 1):+.1f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
