"""Balance loss and statistics of routers: their values, gradients, and independence of the split of a batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_training_toolkit.models import LossModule, build_model
from llm_training_toolkit.models.router import find_routers
from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing
from unit.models.test_document_isolation import HYBRIDS, MODELS, QWEN3, rows

MIXTURES = {name: config for name, config in (MODELS | HYBRIDS).items() if "num_experts" in config}
BALANCE = 0.5


def build(name: str, balance: float | None, *, attention: str = "sdpa", recompute: bool = False) -> LossModule:
    torch.manual_seed(0)
    kind: ActivationCheckpointing = "full" if recompute else "none"
    model = build_model(MIXTURES[name], precision="fp32", attention=attention, activation_checkpointing=kind)
    return LossModule(model, 5, balance).train()


def labels() -> Tensor:
    """Of two rows; the first bears no loss in its second half."""
    wanted = rows()[0].roll(-1, 1)
    wanted[0, 16:] = -100
    return wanted


def gradients(module: LossModule, *arguments: Any) -> dict[str, Tensor]:
    module(*arguments).backward()
    return {name: each.grad for name, each in module.named_parameters() if each.grad is not None}


def compute_balance(module: LossModule, ids: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
    """The balance loss by its definition, from what the routers return, summed over the tokens that bear a loss."""
    outputs: list[tuple[Tensor, ...]] = []
    handles = [
        router.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for router in find_routers(module)
    ]
    module.compute_logits(ids, positions)
    for handle in handles:
        handle.remove()
    total = torch.zeros(())
    for logits, _, chosen in outputs:
        for row in range(len(ids)):
            here = slice(row * ids.shape[1], (row + 1) * ids.shape[1])
            kept = wanted[row] != -100
            probability = logits[here].softmax(-1)[kept].mean(0)
            picks = torch.stack([(chosen[here][kept] == expert).sum() for expert in range(logits.shape[1])])
            total = total + kept.sum() * logits.shape[1] * (picks / picks.sum() * probability).sum()
    return total / len(outputs)


@pytest.mark.parametrize(
    ("name", "attention", "recompute"),
    [
        ("qwen2-moe", "sdpa", False),
        ("qwen3-moe", "varlen", True),
        ("qwen3-next", "sdpa", True),
        ("qwen3.5-moe", "varlen", False),
    ],
)
def test_value_and_gradients_are_those_of_the_definition(name: str, attention: str, *, recompute: bool) -> None:
    given = (*rows(), labels())
    plain = build(name, None)
    loss = plain(*given)
    wanted = compute_balance(plain, *given)
    (loss + BALANCE * wanted).backward()
    module = build(name, BALANCE, attention=attention, recompute=recompute)
    found = gradients(module, *given)
    assert module.router_monitor is not None
    balance = module.router_monitor.get_balance_sum()
    assert float(balance) == pytest.approx(BALANCE * float(wanted.detach()), rel=1e-5)
    for parameter, each in plain.named_parameters():
        if each.grad is not None:
            assert float((found[parameter] - each.grad).norm()) <= 2e-5 * float(each.grad.norm()), parameter


def test_the_objective_does_not_depend_on_micro_batches() -> None:
    given = (*rows(), labels())
    whole, split = build("qwen3-moe", BALANCE), build("qwen3-moe", BALANCE)
    wanted = gradients(whole, *given)
    for row in range(2):
        found = gradients(split, *(each[row : row + 1] for each in given))
    for name, each in wanted.items():
        assert float((found[name] - each).norm()) <= 1e-5 * float(each.norm()), name
    for module in (whole, split):
        assert module.router_monitor is not None
    one, other = (module.router_monitor.compute_statistics(50) for module in (whole, split))  # type: ignore[union-attr]
    assert one == pytest.approx(other, rel=1e-5)


def test_a_row_without_loss_adds_nothing_and_evaluation_has_no_balance_loss() -> None:
    ids, positions = rows()
    module = build("qwen3-moe", BALANCE)
    assert float(module(ids, positions, torch.full_like(ids, -100)).detach()) == 0
    with torch.no_grad():
        evaluated = float(module.eval()(ids, positions, labels()))
        plain = float(build("qwen3-moe", None)(ids, positions, labels()))
    assert evaluated == pytest.approx(plain, rel=1e-6)


def test_statistics_of_routers_that_choose_alike_and_evenly() -> None:
    module = build("qwen3-moe", None)
    ids, positions = rows()
    for layer, router in enumerate(find_routers(module)):
        with torch.no_grad():
            router.weight.zero_()  # type: ignore[operator]
            if layer == 0:  # of level experts topk takes the same two for every token
                continue
            router.weight.normal_()  # type: ignore[operator]
    monitor = module.router_monitor
    assert monitor is not None
    module(ids, positions, labels())
    found = monitor.compute_statistics(1)
    assert found["router/max_load"] == pytest.approx(2)
    assert found["router/dead_experts"] >= 2
    assert math.log(2) / math.log(4) / 2 < found["router/entropy"] < (1 + math.log(2) / math.log(4)) / 2 + 1e-6
    assert "router/balance_loss" not in found
    monitor.reset(ids.device)
    assert monitor.compute_statistics(1)["router/dead_experts"] == 2 * 4


def test_every_mixture_has_as_many_routers_as_layers() -> None:
    for name, config in MIXTURES.items():
        assert len(find_routers(build(name, None))) == config["num_hidden_layers"]


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_multiplied_together(name: str) -> None:
    model: Any = build(name, None).lm
    assert set(model.get_experts_implementation().values()) == {"grouped_mm"}


def test_a_dense_model_has_no_monitor() -> None:
    assert LossModule(build_model(QWEN3, precision="fp32", attention="sdpa"), 5).router_monitor is None
