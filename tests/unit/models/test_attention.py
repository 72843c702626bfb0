"""Attention by document: the numbers of a mask, no tensor of T x T, and the bounds that flash kernels need."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from llm_training_toolkit.models import LossModule, build_model
from llm_training_toolkit.models.attention import (
    _attend_on_gpu,
    attend_by_document,
    compute_cu_seqlens,
    get_attention,
    using_attention,
)
from llm_training_toolkit.plan import choose_attention
from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing
from llm_training_toolkit.setup.machine import find_attention_problem
from unit.models.test_document_isolation import MODELS, WINDOW

SIZES = {name: config | {"initializer_range": 0.05} for name, config in MODELS.items()}
BOUNDS = [0, 40, 41, 70, 96, 96 + 30, 96 + 60, 192]
"""Of two rows of 96 tokens: many documents are longer than the window, and two that follow have one length."""


@pytest.fixture(params=list(SIZES))
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SIZES[request.param]


def module_of(config: dict[str, Any], attention: str, checkpointing: ActivationCheckpointing = "none") -> LossModule:
    torch.manual_seed(0)
    model = build_model(config, precision="fp32", attention=attention, activation_checkpointing=checkpointing)
    return LossModule(model, 16).train()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, positions and labels (2, 96)."""
    lengths = torch.tensor(BOUNDS).diff().tolist()
    ids = torch.randint(0, 512, (2, 96), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(length) for length in lengths]).reshape(2, 96)
    labels = ids.roll(-1, 1)
    labels[:, ::7] = -100
    return ids, positions, labels


def run(module: LossModule) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients with the bounds given."""
    module.zero_grad()
    cu_seqlens, longest = compute_cu_seqlens(batch()[1])
    assert cu_seqlens.tolist() == BOUNDS
    loss = module(*batch(), cu_seqlens, longest)
    loss.backward()
    return loss.detach(), {name: each.grad for name, each in module.named_parameters() if each.grad is not None}


def far(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_logits_and_gradients_are_those_of_a_mask(
    config: dict[str, Any], checkpointing: ActivationCheckpointing
) -> None:
    masked, alone = module_of(config, "sdpa"), module_of(config, "varlen", checkpointing=checkpointing)
    ids, positions, _ = batch()
    with torch.no_grad():
        assert far(alone.compute_logits(ids, positions), masked.compute_logits(ids, positions)) < 1e-6
    (loss, gradients), (wanted_loss, wanted) = run(alone), run(masked)
    assert far(loss, wanted_loss) < 1e-6
    assert gradients.keys() == wanted.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in gradients.items():
        assert float((gradient - wanted[name]).abs().max()) < 1e-6 * float(largest), name
    with torch.no_grad():
        assert far(alone.eval()(*batch()), wanted_loss) < 1e-6


class LargestOutput(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Elements of the largest tensor that an operation makes; views of a parameter are none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements, self.operation = 0, ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.numel() > self.elements:
                self.elements, self.operation = tensor.numel(), str(func)
        return out


@pytest.mark.parametrize(("attention", "small"), [("varlen", True), ("sdpa", False)])
def test_no_operation_of_a_step_makes_a_tensor_of_t_x_t(config: dict[str, Any], attention: str, *, small: bool) -> None:
    rows, length = 2, 256
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    bigcode = {"n_embd": 32, "n_inner": 64, "n_head": 2}
    shape = {"num_hidden_layers": 1, "n_layer": 1, "moe_intermediate_size": 16, "head_dim": 16}
    sizes = shape | narrow | bigcode | {"max_position_embeddings": 256, "n_positions": 256}
    module = module_of(config | {key: sizes[key] for key in sizes if key in config}, attention)
    ids = torch.randint(0, 512, (rows, length))
    positions = torch.cat([torch.arange(100), torch.arange(156)]).repeat(rows, 1)
    cu_seqlens, longest = compute_cu_seqlens(positions)
    with LargestOutput() as largest:
        module(ids, positions, ids, cu_seqlens, longest).backward()
    assert (largest.elements < rows * length * length) == small, largest.operation


class HostWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations that make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal"}:
            self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_micro_batch_waits_for_the_gpu_once_at_most(
    config: dict[str, Any], checkpointing: ActivationCheckpointing
) -> None:
    """The one is the choice of the tokens that have a label; neither layers nor masks search for documents."""
    module = module_of(config, "varlen", checkpointing=checkpointing)
    inputs, bounds = batch(), compute_cu_seqlens(batch()[1])
    loss = module(*inputs, *bounds)  # what is made once
    loss.backward()
    with HostWaits() as waits:
        loss = module(*inputs, *bounds)
        loss.backward()
    assert len(waits.operations) <= 1, waits.operations


def attend_by_bounds(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, window: int | None
) -> Tensor:
    """(T, H, D) by plain loops over the documents, with a mask for each."""
    out, repeat = [], query.shape[1] // key.shape[1]
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        assert stop - start <= longest
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        mask = (distance >= 0) & (distance < (window or math.inf))
        q, k, v = (tensor[start:stop].transpose(0, 1) for tensor in (query, key, value))
        k, v = (tensor.repeat_interleave(repeat, 0) for tensor in (k, v))
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Arguments of each call of the flash packages, which compute with plain torch here."""
    calls: list[dict[str, Any]] = []

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert causal
        assert not dropout_p
        assert softmax_scale == pytest.approx(q.shape[-1] ** -0.5)
        calls.append({"q": cu_seqlens_q, "k": cu_seqlens_k, "longest": (max_seqlen_q, max_seqlen_k)})
        window = None if window_size[0] < 0 else window_size[0] + 1
        return attend_by_bounds(q, k, v, cu_seqlens_q, max_seqlen_q, window)

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise AssertionError("packed rows go through the function for bounds")

    for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn_interface"):
        stub: Any = ModuleType(name)
        stub.flash_attn_varlen_func = flash_attn_varlen_func
        stub.flash_attn_func = stub.flash_attn_with_kvcache = stub.pad_input = stub.unpad_input = refuse
        monkeypatch.setitem(sys.modules, name, stub)
    monkeypatch.setattr(flash, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(flash, "_is_packed_sequence", refuse)  # it would wait for the GPU in every layer
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    yield calls
    flash._loaded_implementation = None


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_flash_packages_get_int32_bounds_from_the_packing_plan(
    config: dict[str, Any], attention: str, flash_calls: list[dict[str, Any]]
) -> None:
    wanted, gradients = run(module_of(config, "varlen"))
    module = module_of(config, "varlen")
    with using_attention(module.lm, attention):  # transformers builds a model for these on GPUs only
        loss, found = run(module)
    assert len(flash_calls) == config.get("num_hidden_layers", config.get("n_layer"))
    for call in flash_calls:
        assert (call["q"].tolist(), call["q"].dtype) == (BOUNDS, torch.int32)
        assert call["k"] is call["q"]
        assert call["longest"] == (40, 40)
    assert far(loss, wanted) < 1e-6
    largest = max(gradient.abs().max() for gradient in gradients.values())
    assert all(float((found[name] - gradients[name]).abs().max()) < 1e-5 * float(largest) for name in gradients)


@pytest.mark.parametrize("window", [None, WINDOW, 1, 40])
def test_documents_alone_have_what_a_mask_gives(window: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, 192, 8, generator=generator) for heads in (4, 2, 2))
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    found, _ = attend_by_document(
        torch.nn.Module(), query, key, value, None, sliding_window=window, cu_seq_lens_q=cu_seqlens, max_length_q=40
    )
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    wanted = attend_by_bounds(query, key, value, cu_seqlens, 40, window)
    torch.testing.assert_close(found[0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 5])
def test_torch_s_kernel_for_gpus_takes_the_arguments_and_gives_the_shapes(window: int | None) -> None:
    with FakeTensorMode():
        query, key, value = (torch.empty(192, heads, 16, requires_grad=True) for heads in (4, 2, 2))
        cu_seqlens = torch.empty(8, dtype=torch.int32)
        out = _attend_on_gpu((query, key, value), cu_seqlens, 40, 0.25, window)
        out.sum().backward()  # type: ignore[no-untyped-call]
    assert out.shape == (192, 4, 16)
    assert key.grad is not None
    assert key.grad.shape == key.shape


def test_without_bounds_it_refuses_to_attend() -> None:
    tokens = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ValueError, match="to generate text use sdpa"):
        attend_by_document(torch.nn.Module(), tokens, tokens, tokens, None)


def test_another_attention_lasts_as_long_as_its_block() -> None:
    model = module_of(SIZES["qwen3"], "sdpa").lm
    with suppress(RuntimeError), using_attention(model, "varlen"):
        assert get_attention(model) == "varlen"
        raise RuntimeError
    assert get_attention(model) == "sdpa"


@pytest.mark.parametrize(
    ("precision", "head_dim", "device", "has_flash", "deterministic", "expected"),
    [
        ("bf16", 128, "cuda", True, False, "varlen"),
        ("bf16", 256, "cuda", True, False, "varlen"),
        ("bf16", 257, "cuda", True, False, "sdpa"),
        ("bf16", 36, "cuda", True, False, "sdpa"),
        ("fp32", 128, "cuda", True, False, "sdpa"),
        ("bf16", 128, "cuda", False, False, "sdpa"),
        ("bf16", 128, "cuda", True, True, "sdpa"),
        ("bf16", 128, "cpu", False, False, "sdpa"),
    ],
)
def test_auto_takes_the_kernel_that_the_device_has(
    precision: str, head_dim: int, device: str, has_flash: bool, deterministic: bool, expected: str
) -> None:
    chosen = choose_attention(precision, head_dim, device, has_flash=has_flash, deterministic=deterministic)
    assert (chosen.key, chosen.value) == ("model.attn_implementation", expected)
    assert chosen.reason


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = set()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    assert "needs flash-attn on GPUs" in str(find_attention_problem("flash_attention_2", gpu=True))
    assert "needs flash-attn-3 on GPUs" in str(find_attention_problem("flash_attention_3", gpu=True))
    assert "flash-linear-attention and causal-conv1d" in str(find_attention_problem("linear_attention", gpu=True))
    assert "needs a GPU" in str(find_attention_problem("flash_attention_2", gpu=False))
    assert "needs a GPU" in str(find_attention_problem("flex_attention", gpu=False))
    for kind in ("auto", "varlen", "sdpa", "eager", "linear_attention"):
        assert find_attention_problem(kind, gpu=False) is None
    installed |= {"flash_attn", "fla"}
    assert find_attention_problem("flash_attention_2", gpu=True) is None
    assert find_attention_problem("flash_attention_3", gpu=True) is not None
    assert "needs causal-conv1d on GPUs" in str(find_attention_problem("linear_attention", gpu=True))
