"""Adapters under DeepSpeed have the gradients of plain torch, whatever the split, the stage and the dropout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import rank_tasks
from llm_training_toolkit.data.dataloader import DataLoader
from llm_training_toolkit.models import LossModule, build_model
from llm_training_toolkit.models.lora import add_adapters
from llm_training_toolkit.plan import make_plan
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.worker.base_weights import ensure_base_weights
from rank_pool import RankPool
from run_results import largest_gradient_error
from tiny_models import SHAPES

Pools = Callable[[int], RankPool]

LORA = {"rank": 4, "dropout": 0.2}
SPLITS = [(1, 11), (1, 3), (2, 6), (2, 2)]
"""(workers, micro-batch) of 11 sequences, as for full training."""


def changes(lora: dict[str, Any], zero: int, **model: Any) -> dict[str, Any]:
    return {"train": {"precision": "fp32"}, "engine": {"zero_stage": zero}, "model": {"lora": lora, **model}}


def plain(run: str, lora: dict[str, Any], **model: Any) -> tuple[float, dict[str, Any]]:
    """Loss and gradients of the first step in plain torch: all rows at once, no DeepSpeed."""
    spec = rank_tasks.build_worker_spec(run, changes(lora, 0, **model))
    plan = make_plan(spec.config)
    assert plan.adapter is not None
    base = ensure_base_weights(spec, plan, rank_tasks.build_single_rank_context())
    built = build_model(plan.hf_config, precision="fp32", attention="sdpa", path=base)
    module = LossModule(built, 64)
    add_adapters(built, plan.adapter, seed=spec.config.run.seed, dtype=torch.float32, draws=module.batch_position)
    trained = {name: parameter for name, parameter in built.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(rank_tasks.draw_adapter_weights(name, parameter.shape))
    dataloader = DataLoader(spec.dataset_info, global_batch=plan.global_batch, epochs=None)
    [batch] = dataloader.get_micro_batches(0, range(plan.global_batch), plan.global_batch, 1)
    module.train()
    loss = module(batch.input_ids, batch.position_ids, batch.labels) / dataloader.count_loss_tokens(0)
    loss.backward()
    return float(loss.detach()), {f"lm.{name}": parameter.grad.numpy() for name, parameter in trained.items()}  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def run(prepared_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("adapters") / "run"
    shutil.copytree(prepared_run.path, target)
    return str(target)


@pytest.fixture(scope="module")
def run_of_mixture(prepared_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The run with base weights of each mixture's own."""
    made: dict[str, str] = {}

    def make(size: str) -> str:
        if size not in made:
            target = tmp_path_factory.mktemp("mixture") / "run"
            made[size] = str(shutil.copytree(prepared_run.path, target))
        return made[size]

    return make


@pytest.fixture(scope="module")
def reference(run: str) -> tuple[float, dict[str, Any]]:
    return plain(run, LORA)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("workers", "micro_batch"), SPLITS)
def test_gradients_are_those_of_plain_torch(
    pools: Pools, run: str, reference: Any, workers: int, micro_batch: int, zero: int
) -> None:
    answers = pools(workers).run(
        rank_tasks.compute_gradients, run=run, changes=changes(LORA, zero), micro_batch=micro_batch, perturbed=True
    )
    loss, norm, found = answers[0]
    assert largest_gradient_error(found, reference[1]) < 1e-5
    assert loss == pytest.approx(reference[0], rel=1e-6)
    total = float(np.sqrt(sum(np.square(values, dtype=np.float64).sum() for values in reference[1].values())))
    assert norm == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize(
    "lora", [{"rank": 4, "use_dora": True}, {"rank": 4, "use_rslora": True, "target_modules": ["q_proj"]}]
)
def test_variants_have_the_gradients_of_plain_torch(pools: Pools, run: str, lora: dict[str, Any], zero: int) -> None:
    answers = pools(2).run(
        rank_tasks.compute_gradients, run=run, changes=changes(lora, zero), micro_batch=2, perturbed=True
    )
    loss, _, found = answers[0]
    wanted = plain(run, lora)
    assert largest_gradient_error(found, wanted[1]) < 1e-5
    assert loss == pytest.approx(wanted[0], rel=1e-6)


@pytest.mark.parametrize(("zero", "kind"), [(2, "full"), (2, "selective"), (3, "selective")])
def test_recomputing_activations_changes_no_gradient(
    pools: Pools, run: str, reference: Any, zero: int, kind: str
) -> None:
    given = changes(LORA, zero, activation_checkpointing=kind)
    loss, _, found = pools(2).run(rank_tasks.compute_gradients, run=run, changes=given, micro_batch=2, perturbed=True)[
        0
    ]
    assert largest_gradient_error(found, reference[1]) < 1e-5
    assert loss == pytest.approx(reference[0], rel=1e-6)


@pytest.mark.parametrize(("zero", "kind"), [(0, "none"), (2, "selective"), (3, "none"), (3, "full")])
@pytest.mark.parametrize("size", ["qwen3-30b-a3b", "qwen3.5-35b-a3b"])
def test_adapters_of_experts_have_the_gradients_of_plain_torch(
    pools: Pools, run_of_mixture: Callable[[str], str], size: str, zero: int, kind: str
) -> None:
    """DeepSpeed knows the experts of the first class; both are gathered by the plan's setting for their adapters."""
    lora = {"rank": 4, "target_parameters": ["gate_up_proj", "down_proj"]}
    model = {"name": size, "config_overrides": SHAPES[size]}
    run = run_of_mixture(size)
    given = changes(lora, zero, activation_checkpointing=kind, **model)
    # Parameters below a threshold stay whole at stage 3, which here would be all of them.
    given["engine"]["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    loss, _, found = pools(2).run(rank_tasks.compute_gradients, run=run, changes=given, micro_batch=2, perturbed=True)[
        0
    ]
    wanted = plain(run, lora, **model)
    assert any(".experts.base_layer.lora_A." in name for name in found)
    assert largest_gradient_error(found, wanted[1]) < 1e-5
    assert loss == pytest.approx(wanted[0], rel=1e-6)


def test_dropout_leaves_something_out(run: str, reference: Any) -> None:
    assert abs(plain(run, {"rank": 4})[0] - reference[0]) > 1e-4
