"""Compiled layers: bit for bit the numbers of eager ones, by one graph for all layers, packings and steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode
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
) -> LossModule:
    """A model in training, eager with `backend` None; the same weights each time."""
    config = config_of(name, lora)
    hf = dict(families.resolve_hf_config(config)) | {"vocab_size": 128}
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
def test_one_graph_takes_fifty_packings_bit_for_bit(name: str) -> None:
    assert_equal(module_of(name, backend=None), module_of(name), packings(50))
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


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_one_graph_takes_any_number_of_documents_on_gpus(
    checkpointing: ActivationCheckpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's operator without values: it has no kernel for CPUs."""

    def attend(_module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **given: Any) -> Any:
        bounds, longest = given["cu_seq_lens_q"], given["max_length_q"]
        return attention._attend_on_gpu((query, key, value), bounds, longest, given["scaling"], None), None

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.VARLEN, attend)
    batches = [(ids, *attention.compute_cu_seqlens(positions), positions) for ids, positions in packings(6, rows=2)]
    summed = mock.patch(
        "llm_training_toolkit.models.loss.compute_token_loss_sum",
        lambda hidden, weight, _labels, _chunk: (hidden @ weight.T).sum(),
    )
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, summed:
        module = module_of("qwen3-0.6b", checkpointing=checkpointing, precision="bf16", kind=attention.VARLEN)
        for ids, bounds, longest, positions in batches:
            tokens, places, cut = (fake.from_tensor(each) for each in (ids, positions, bounds))
            module(tokens, places, tokens, cut, longest).backward()
    assert len({len(bounds) for _, bounds, _, _ in batches}) > 1
    assert len({longest for _, _, longest, _ in batches}) > 1
    assert count_graphs() == (1, 0)


def test_a_compiler_that_fails_is_known_by_its_error() -> None:
    module = module_of("starcoderbase-1b", backend="inductor")
    without = inductor.patch({"cpp.cxx": ("/no/such/compiler",), "fx_graph_cache": False})
    with without, pytest.raises(RuntimeError) as raised:
        run(module, next(packings(1)))
    assert is_compile_error(raised.value)
    assert not is_compile_error(RuntimeError("another"))
