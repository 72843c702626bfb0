"""The DeepSpeed configuration: what it says, what it never says, and what may be added."""

import json
from typing import Any

import pytest

from llm_training_toolkit.config.model_config import LoraConfig, ModelConfig
from llm_training_toolkit.config.schema import Config, EngineConfig
from llm_training_toolkit.plan import build_deepspeed_config, find_deepspeed_problems, format_plan, make_plan
from llm_training_toolkit.plan.deepspeed import OWNED_KEYS, REMOVED_KEYS


def config(zero: int = 2, precision: str = "bf16", **deepspeed: Any) -> Config:
    raw = {
        "run": {"name": "test"},
        "model": {"name": "qwen3-0.6b"},
        "tokenizer": {"path": "tokenizer"},
        "data": {"sequence_length": 64, "sources": [{"path": "x", "format": "text"}]},
        "train": {"steps": 10, "micro_batch_size": 3, "precision": precision},
        "optim": {"max_grad_norm": 0.0},
        "engine": {"zero_stage": zero, "deepspeed": deepspeed},
    }
    return Config.model_validate_json(json.dumps(raw), strict=True)


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_recipe(zero: int, precision: str) -> None:
    made = build_deepspeed_config(config(zero, precision))
    assert made["train_micro_batch_size_per_gpu"] == 3
    assert made["gradient_accumulation_steps"] == 1
    assert made["gradient_clipping"] == 0.0
    assert (made["zero_optimization"]["stage"], made["zero_optimization"]["overlap_comm"]) == (
        zero if zero >= 2 else 0,
        False,
    )
    assert not {"train_batch_size", "optimizer", "scheduler", "fp16"} & set(made)
    assert ("bf16" in made) == (precision == "bf16" and zero >= 2), (
        "at stages 0 and 1 the engine keeps the fp32 weights"
    )
    assert ("data_types" in made) == (precision == "bf16" and zero >= 2)


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("experts", [("down_proj",), ()])
def test_stage_3_gathers_experts_before_their_adapters_are_added(zero: int, experts: tuple[str, ...]) -> None:
    lora = LoraConfig.model_validate({"target_parameters": experts})
    asked = config(zero).model_copy(update={"model": ModelConfig(name="qwen3-30b-a3b", lora=lora)})
    block = build_deepspeed_config(asked)["zero_optimization"]
    assert ("leaf_module" in block) == (zero == 3 and bool(experts))


@pytest.mark.parametrize("offload", ["none", "optimizer", "optimizer_and_weights"])
@pytest.mark.parametrize("zero", ["auto", 0, 1, 2, 3])
def test_offload_is_refused_at_stages_that_cannot(zero: int | str, offload: str) -> None:
    asked = config().model_copy(
        update={"engine": EngineConfig.model_validate({"zero_stage": zero, "offload": offload})}
    )
    plan = make_plan(asked, ranks=2)
    possible = {"none": {0, 1, 2, 3}, "optimizer": {1, 3}, "optimizer_and_weights": {3}}[offload]
    refused = zero != "auto" and zero not in possible
    assert [problem.code for problem in plan.problems] == (["offload-stage"] if refused else [])
    if not refused:
        assert plan.zero in possible
        keys = {"offload_optimizer", "offload_param"} & set(plan.deepspeed["zero_optimization"])
        assert len(keys) == {"none": 0, "optimizer": 1, "optimizer_and_weights": 2}[offload] * (plan.zero == 3)
        copy = 12 * plan.trainable_parameters / 2 / 1e9
        assert (plan.host_memory_gb_per_worker > 1.1 * copy) == (offload != "none")
        assert f"; and {plan.host_memory_gb_per_worker:.3g} GB of host memory a worker" in str(format_plan(plan))


def test_buckets_are_no_larger_than_the_model() -> None:
    assert build_deepspeed_config(config(), parameters=1000)["zero_optimization"]["reduce_bucket_size"] == 1000
    assert build_deepspeed_config(config(), parameters=10**12)["zero_optimization"]["reduce_bucket_size"] == 100_000_000


def test_a_persons_keys_are_merged_deeply() -> None:
    extra: dict[str, Any] = {
        "zero_optimization": {"reduce_bucket_size": 7, "overlap_comm": True},
        "wall_clock_breakdown": True,
    }
    plan = make_plan(config(**extra))
    assert plan.problems == ()
    zero = plan.deepspeed["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["overlap_comm"]) == (2, 7, True)
    assert plan.deepspeed["wall_clock_breakdown"] is True


@pytest.mark.parametrize("key", [*OWNED_KEYS, *REMOVED_KEYS])
def test_owned_and_removed_keys_are_problems(key: str) -> None:
    block, _, name = key.rpartition(".")
    given = {block: {name: 1}} if block else {name: 1}
    (problem,) = find_deepspeed_problems(given)
    assert problem.where == f"engine.deepspeed.{key}"
    assert problem.fix
    assert make_plan(config(**given)).deepspeed["gradient_accumulation_steps"] == 1


def test_a_block_that_is_none() -> None:
    (problem,) = make_plan(config(zero_optimization=3)).problems
    assert problem.where == "engine.deepspeed.zero_optimization"


def test_the_removed_keys_are_those_of_the_installed_deepspeed() -> None:
    import re
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("deepspeed")  # read, not imported: the import takes seconds
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "runtime" / "config.py").read_text()
    tables = source[source.index("_REMOVED_TOP_LEVEL") : source.index("def _reject_removed")]
    top, zero = (set(re.findall(r'^    "(\w+)":', table, re.M)) for table in tables.split("_REMOVED_ZERO_CONFIG_KEYS"))
    assert top | {f"zero_optimization.{key}" for key in zero} == set(REMOVED_KEYS)
