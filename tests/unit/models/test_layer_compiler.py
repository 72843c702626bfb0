"""Compiled layers: bit for bit the numbers of eager ones, by one graph for all layers, packings and steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.nn.attention import varlen as _operators  # noqa: F401 - defines them
from transformers import AttentionInterface

from llm_training_toolkit import families
from llm_training_toolkit.models import LossModule, attention, build_model
from llm_training_toolkit.models.layer_compiler import is_compile_error
from llm_training_toolkit.models.lora import add_adapters
from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing
from tiny_models import SHAPES, one_thread
from unit.models.test_checkpointing import TOKENS, config_of

# torch hides this warning of its own where warnings are shown, which is too late where they are errors.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")]
COMPILED = [name for name, shape in SHAPES.items() if "linear_num_value_heads" not in shape]
LORA = {"rank": 4, "dropout": 0.1}
Batch = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # torch would log every graph for pytest
    torch._dynamo.reset()
    counters.clear()
    with one_thread():
        yield
    torch._dynamo.reset()


def module_of(
    name: str,
    *,
    checkpointing: ActivationCheckpointing = "none",
    lora: dict[str, Any] | None = None,
    balance: float | None = None,
    precision: str = "fp32",
    kind: str = "sdpa",
    backend: str | None = "aot_eager",
    values: Mapping[str, Any] = MappingProxyType({}),
) -> LossModule:
    """A model in training, eager with `backend` None; the same weights each time."""
    config = config_of(name, lora)
    hf = dict(families.resolve_hf_config(config)) | {"vocab_size": 128, **values}
    torch.manual_seed(0)
    model = build_model(hf, precision=precision, attention=kind, activation_checkpointing=checkpointing)
    module = LossModule(model, 16, balance).train()
    adapter = families.resolve_adapter(config, hf)
    if adapter is not None:
        add_adapters(model, adapter, seed=0, dtype=torch.float32, draws=module.batch_position)
    if backend is not None:
        module.compile_layers(backend)
    return module


def packings(count: int, rows: int = 1) -> Iterator[Batch]:
    """Rows of two to six documents, cut at other places each time."""
    generator = torch.Generator().manual_seed(9)
    for number in range(count):
        positions = []
        for _ in range(rows):
            cuts = (torch.randperm(TOKENS - 1, generator=generator)[: 1 + number % 5] + 1).sort().values.tolist()
            bounds = [0, *cuts, TOKENS]
            positions += [torch.arange(stop - start) for start, stop in pairwise(bounds)]
        ids = torch.randint(0, 128, (rows, TOKENS), generator=generator)
        yield ids, torch.cat(positions).reshape(rows, TOKENS)


def run(module: LossModule, batch: Batch) -> dict[str, Tensor]:
    """Loss and gradients of a micro-batch."""
    module.zero_grad()
    loss = module(*batch, batch[0].roll(-1, 1))
    loss.backward()
    found = {name: each.grad.clone() for name, each in module.named_parameters() if each.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_equal(eager: LossModule, compiled: LossModule, batches: Iterator[Batch]) -> None:
    for step, batch in enumerate(batches):
        for module in (eager, compiled):
            module.batch_position.step, module.batch_position.first = step, 3 * step
        wanted, found = run(eager, batch), run(compiled, batch)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def count_graphs() -> tuple[int, int]:
    """Return the graphs compiled so far, a recompilation being one, and the breaks in them."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.parametrize("name", COMPILED)
def test_one_graph_takes_packings_bit_for_bit(name: str) -> None:
    assert_equal(module_of(name, backend=None), module_of(name), packings(12))
    assert count_graphs() == (1, 0)


CASES: dict[str, dict[str, Any]] = {
    "selective": {"name": "qwen2.5-0.5b", "checkpointing": "selective"},
    "full": {"name": "starcoder2-3b", "checkpointing": "full"},
    "balance loss": {"name": "qwen3-30b-a3b", "balance": 0.5},
    "balance loss, full": {"name": "qwen3-30b-a3b", "balance": 0.5, "checkpointing": "full"},
    "adapters": {"name": "qwen3-0.6b", "lora": LORA},
    "adapters, selective": {"name": "starcoderbase-1b", "lora": LORA, "checkpointing": "selective"},
    "eager attention": {"name": "qwen3-0.6b", "kind": "eager"},
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_one_graph_with_everything_else(case: str) -> None:
    given = CASES[case]
    eager, compiled = module_of(**given, backend=None), module_of(**given)
    assert_equal(eager, compiled, packings(6, rows=2))
    # Beside adapters the input of the first layer needs no gradient: it has a graph of its own.
    assert count_graphs() == (2 if "lora" in given else 1, 0)
    if eager.router_monitor is not None and compiled.router_monitor is not None:
        wanted = eager.router_monitor.compute_statistics(100)
        assert compiled.router_monitor.compute_statistics(100) == wanted
        assert wanted["router/max_load"] > 0


def test_names_of_weights_stay() -> None:
    eager, compiled = module_of("qwen3-0.6b", backend=None), module_of("qwen3-0.6b")
    assert list(compiled.state_dict()) == list(eager.state_dict())
    assert [name for name, _ in compiled.named_modules()] == [name for name, _ in eager.named_modules()]


def test_evaluation_and_rare_shapes_compile_nothing() -> None:
    eager, compiled = module_of("qwen2.5-0.5b", backend=None), module_of("qwen2.5-0.5b")
    assert_equal(eager, compiled, packings(1, rows=3))
    assert_equal(eager, compiled, packings(1, rows=2))
    assert count_graphs() == (2, 0), "micro-batches, and a smaller last one"
    assert_equal(eager, compiled, packings(1, rows=1))
    batch = next(packings(1, rows=3))
    assert torch.equal(compiled.compute_logits(*batch), eager.compute_logits(*batch))
    with torch.no_grad():
        assert torch.equal(*(module(*batch, batch[0]) for module in (eager, compiled)))
        assert torch.equal(*(module.eval()(*batch, batch[0]) for module in (eager, compiled)))
    assert count_graphs() == (2, 0)


def attend_as_on_gpus(_module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **given: Any) -> Any:
    """Attention (1, T, H, D) by the operator that GPUs use."""
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    bounds, longest, window = given["cu_seq_lens_q"], given["max_length_q"], given.get("sliding_window")
    out = attention._attend_on_gpu((query, key, value), bounds, longest, given["scaling"], window)
    return out.unsqueeze(0), None


def weigh_keys(query: Tensor, key: Tensor, bounds: Tensor, scale: float, window: Sequence[int]) -> Tensor:
    """Attention (H, T, T) of queries and keys (T, H, D): of each document by itself, causal, within a window."""
    places = torch.arange(len(query))
    documents, distance = torch.bucketize(places, bounds, right=True), places[:, None] - places
    seen = (documents[:, None] == documents) & (distance >= 0)
    if window[0] >= 0:
        seen &= distance <= window[0]
    scores = scale * torch.einsum("thd,shd->hts", query, key)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def run_operator(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """Compute torch's operator; its second and third result are not read here."""
    times = query.shape[1] // key.shape[1]
    weights = weigh_keys(query, key.repeat_interleave(times, 1), bounds, given[4], given[5])
    out = torch.einsum("hts,shd->thd", weights, value.repeat_interleave(times, 1))
    return out.contiguous(), torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


def run_operator_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """Compute the gradients of `run_operator`."""
    bounds, scale, window = given[2], given[8], given[9]
    times, kept = query.shape[1] // key.shape[1], key.shape
    key, value = (each.repeat_interleave(times, 1) for each in (key, value))
    weights = weigh_keys(query, key, bounds, scale, window)
    of_weights = torch.einsum("thd,shd->hts", grad, value)
    of_scores = scale * weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
    of_key, of_value = torch.einsum("hts,thd->shd", of_scores, query), torch.einsum("hts,thd->shd", weights, grad)
    shared = (each.reshape(kept[0], kept[1], times, -1).sum(2) for each in (of_key, of_value))
    return torch.einsum("hts,shd->thd", of_scores, key).contiguous(), *shared


@pytest.fixture
def _varlen_of_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention as on GPUs, by an operator of torch that has no kernels for CPUs."""
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.VARLEN, attend_as_on_gpus)
    with torch.library._scoped_library("torch_attn", "IMPL") as library:
        library.impl("_varlen_attn", run_operator, "CPU")
        library.impl("_varlen_attn_backward", run_operator_backward, "CPU")
        yield


VARLEN_CASES: list[tuple[str, ActivationCheckpointing, int]] = [
    *((name, "none", 50) for name in COMPILED),
    ("qwen3-0.6b", "selective", 6),
    ("qwen3-0.6b", "full", 6),
]


@pytest.mark.usefixtures("_varlen_of_gpus")
@pytest.mark.parametrize("window", [None, 16])
def test_the_kernels_here_compute_attention_by_document(window: int | None) -> None:
    heads = torch.randn(3, 1, 4, TOKENS, 8, generator=torch.Generator().manual_seed(0))
    bounds, results = torch.tensor([0, 5, 30, TOKENS], dtype=torch.int32), []
    for attend in (attend_as_on_gpus, attention.attend_by_document):
        tokens = [heads[0].clone().requires_grad_(), *(each[:, :2].clone().requires_grad_() for each in heads[1:])]
        given: dict[str, Any] = {"cu_seq_lens_q": bounds, "max_length_q": 34, "scaling": 0.3, "sliding_window": window}
        out = attend(nn.Module(), tokens[0], tokens[1], tokens[2], None, **given)[0]
        results.append([out, *torch.autograd.grad(out.sin().sum(), tokens)])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*results, strict=True))


@pytest.mark.usefixtures("_varlen_of_gpus")
@pytest.mark.parametrize(("name", "checkpointing", "count"), VARLEN_CASES)
def test_one_graph_takes_any_number_of_documents_on_gpus(
    name: str, checkpointing: ActivationCheckpointing, count: int
) -> None:
    window = {"sliding_window": 16} if name.startswith("starcoder2") else {}
    given: dict[str, Any] = {"checkpointing": checkpointing, "kind": attention.VARLEN, "values": window}
    batches = list(packings(count, rows=2))
    assert len({int((positions == 0).sum()) for _, positions in batches}) > 3
    assert_equal(module_of(name, **given, backend=None), module_of(name, **given), iter(batches))
    assert count_graphs() == (1, 0)


def test_a_compiler_that_fails_is_known_by_its_error() -> None:
    module = module_of("starcoderbase-1b", backend="inductor")
    without = inductor.patch({"cpp.cxx": ("/no/such/compiler",), "fx_graph_cache": False})
    with without, pytest.raises(RuntimeError) as raised:
        run(module, next(packings(1)))
    assert is_compile_error(raised.value)
    assert not is_compile_error(RuntimeError("another"))
