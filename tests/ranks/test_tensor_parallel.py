"""Ranks that hold slices of the matrices train as one rank that has them whole, and move between cuts bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import rank_tasks
from llm_training_toolkit.plan import make_plan
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool
from run_results import newest_checkpoint, read_fetched, read_values
from tiny_runs import SHAPE

Pools = Callable[[int], RankPool]
Gradients = tuple[float, float, dict[str, Any]]

WIDE: dict[str, Any] = SHAPE | {"num_attention_heads": 8, "num_key_value_heads": 4}
"""Two query heads for each of four key-value heads, which two and four ranks divide."""
PLAIN: dict[str, Any] = {key: value for key, value in WIDE.items() if key != "head_dim"}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"name": "qwen3-0.6b", "config_overrides": WIDE},
    "untied": {"name": "qwen2.5-7b", "config_overrides": PLAIN},
    "window": {"name": "starcoder2-3b", "config_overrides": PLAIN | {"sliding_window": 24}},
}


def build_changes(each: int, zero: int, model: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """Sections of a run in fp32 whose replicas have so many ranks."""
    engine = {"zero_stage": zero, "tensor_parallel": each} | sections.pop("engine", {})
    return {"model": model, "train": {"precision": "fp32"}, "engine": engine, **sections}


def compute_gradients(pools: Pools, run: RunDirectory, ranks: int, micro_batch: int, changes: Any) -> Gradients:
    """Loss, norm and gradients of 11 sequences on so many ranks; they are the same on each rank."""
    found = pools(ranks).run(rank_tasks.compute_gradients, run=str(run.path), changes=changes, micro_batch=micro_batch)
    for other in found[1:]:
        assert other[:2] == found[0][:2]
        assert all(np.array_equal(other[2][name], values) for name, values in found[0][2].items())
    return found[0]  # type: ignore[no-any-return]


def assert_agree(found: Gradients, wanted: Gradients) -> None:
    """Losses, norms and gradients agree within 1e-6, gradients relative to the largest."""
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found[1] == pytest.approx(wanted[1], rel=1e-6)
    assert found[2].keys() == wanted[2].keys()
    largest = max(float(np.abs(values).max()) for values in wanted[2].values())
    errors = {name: float(np.abs(found[2][name] - values).max()) / largest for name, values in wanted[2].items()}
    assert max(errors.values()) < 1e-6, errors


@pytest.fixture(scope="module")
def references(pools: Pools, prepared_run: RunDirectory) -> Callable[[str], Gradients]:
    """Gradients on one rank, all rows in one micro-batch, by the name of the model."""
    known: dict[str, Gradients] = {}

    def find(name: str) -> Gradients:
        if name not in known:
            known[name] = compute_gradients(pools, prepared_run, 1, 11, build_changes(1, 0, MODELS[name]))
        return known[name]

    return find


@pytest.mark.parametrize(
    ("ranks", "each", "zero", "model", "sections"),
    [
        (2, 2, 0, "qwen3", {}),
        (4, 2, 0, "qwen3", {}),
        (4, 2, 1, "qwen3", {}),
        (4, 4, 1, "qwen3", {}),
        (4, 2, 1, "untied", {}),
        (2, 2, 0, "untied", {"attn_implementation": "varlen"}),
        (4, 2, 1, "window", {}),
        (2, 2, 1, "window", {"activation_checkpointing": "full"}),
        (2, 2, 0, "qwen3", {"activation_checkpointing": "selective"}),
    ],
)
def test_gradients_are_those_of_one_rank(
    pools: Pools,
    prepared_run: RunDirectory,
    references: Callable[[str], Gradients],
    ranks: int,
    each: int,
    zero: int,
    model: str,
    sections: dict[str, Any],
) -> None:
    changes = build_changes(each, zero, MODELS[model] | sections)
    assert_agree(compute_gradients(pools, prepared_run, ranks, 3, changes), references(model))


@pytest.mark.parametrize(("zero", "offload"), [(0, "none"), (1, "none"), (1, "optimizer")])
def test_gradients_in_bf16_are_those_of_one_rank_up_to_its_rounding(
    pools: Pools, prepared_run: RunDirectory, references: Callable[[str], Gradients], zero: int, offload: str
) -> None:
    changes = build_changes(2, zero, MODELS["qwen3"], engine={"offload": offload}) | {"train": {"precision": "bf16"}}
    (loss, norm, found), (wanted_loss, wanted_norm, wanted) = (
        compute_gradients(pools, prepared_run, 4, 3, changes),
        references("qwen3"),
    )
    assert loss == pytest.approx(wanted_loss, rel=2e-3)
    assert norm == pytest.approx(wanted_norm, rel=2e-2)
    largest = max(float(np.abs(values).max()) for values in wanted.values())
    assert max(float(np.abs(found[name] - values).max()) for name, values in wanted.items()) < 2e-2 * largest


@pytest.mark.parametrize("machines", ["aabc", "aaab"])
def test_replicas_form_on_machines_with_unequal_numbers_of_ranks(
    pools: Pools, prepared_run: RunDirectory, machines: str
) -> None:
    """Groups of a machine's ranks are made before; a rank alone on its machine must count them as the others do."""
    found = pools(4).run(
        rank_tasks.list_fragments_on,
        run=str(prepared_run.path),
        changes=build_changes(2, 1, MODELS["qwen3"]),
        machines=machines,
    )
    assert found == [found[0]] * 4


def test_gradients_with_the_optimizer_in_host_memory(
    pools: Pools, prepared_run: RunDirectory, references: Callable[[str], Gradients]
) -> None:
    changes = build_changes(2, 1, MODELS["qwen3"], engine={"offload": "optimizer"})
    assert_agree(compute_gradients(pools, prepared_run, 4, 3, changes), references("qwen3"))


@pytest.mark.parametrize("resized", [None, 640])
def test_weights_of_a_directory_are_cut_as_they_are_read(
    pools: Pools, prepared_run: RunDirectory, tmp_path: Path, resized: int | None
) -> None:
    config = rank_tasks.build_worker_spec(str(prepared_run.path), {"model": MODELS["untied"]}).config
    torch.manual_seed(1)
    written = AutoModelForCausalLM.from_config(AutoConfig.for_model(**make_plan(config).hf_config))
    written.save_pretrained(tmp_path, max_shard_size="100KB")
    model: dict[str, Any] = {
        "name": "qwen2.5-7b",
        "config_overrides": {},
        "path": str(tmp_path),
        "resize_vocab_to": resized,
    }
    found = compute_gradients(pools, prepared_run, 4, 3, build_changes(2, 1, model))
    assert_agree(found, compute_gradients(pools, prepared_run, 1, 11, build_changes(1, 0, model)))


def test_weights_that_do_not_fit_are_refused_on_every_rank(
    pools: Pools, prepared_run: RunDirectory, tmp_path: Path
) -> None:
    config = rank_tasks.build_worker_spec(str(prepared_run.path), {"model": MODELS["untied"]}).config
    written = AutoModelForCausalLM.from_config(AutoConfig.for_model(**make_plan(config).hf_config))
    written.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(64, 120)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    changes = build_changes(2, 1, {"name": "qwen2.5-7b", "config_overrides": {}, "path": str(tmp_path)})
    said = pools(2).run(rank_tasks.catch_build_error, run=str(prepared_run.path), changes=changes)
    assert said[0] == said[1]
    assert "model.layers.1.mlp.down_proj.weight" in said[0]
    assert "[64, 120]" in said[0]


def test_runs_change_the_ranks_of_a_replica_at_a_resume(pools: Pools, fresh_run: Callable[[str], RunDirectory]) -> None:
    """Losses of 10 steps are those of one rank within 1e-5, and no sequence is fetched twice."""

    def work(run: RunDirectory, ranks: int, each: int, zero: int, stop: int | None) -> None:
        sections = {"train": {"precision": "fp32", "steps": 10}, "eval": {"interval": 5}}
        changes = build_changes(each, zero, MODELS["qwen3"], failures={"log_samples": True}) | sections
        pools(ranks).run(rank_tasks.train_run, run=str(run.path), changes=changes, stop_after=stop)

    whole, cut, changing = (fresh_run(name) for name in ("whole", "cut", "changing"))
    work(whole, 1, 1, 0, None)
    work(cut, 4, 2, 1, None)
    for ranks, each, zero, stop in [(4, 2, 1, 3), (2, 1, 3, 5), (4, 4, 0, 7), (2, 2, 0, 9), (1, 1, 0, None)]:
        work(changing, ranks, each, zero, stop)
    for name, count in (("train/loss", 10), ("eval/loss", 3), ("optim/grad_norm", 10)):
        wanted = read_values(whole, name)
        assert len(wanted) == count
        assert read_values(cut, name) == pytest.approx(wanted, rel=1e-5)
        assert read_values(changing, name) == pytest.approx(wanted, rel=1e-5)
    assert read_fetched(cut) == read_fetched(changing) == read_fetched(whole)


@pytest.mark.parametrize("model", ["qwen3", "window"])
def test_states_move_between_cuts_bit_for_bit(
    pools: Pools, fresh_run: Callable[[str], RunDirectory], tmp_path: Path, model: str
) -> None:
    run = fresh_run("begun")
    begun = build_changes(2, 1, MODELS[model])
    pools(4).run(rank_tasks.train_run, run=str(run.path), changes=begun, stop_after=2)
    checkpoint = newest_checkpoint(run)
    wanted = rank_tasks.read_state(checkpoint)
    for number, (ranks, each, zero) in enumerate([(1, 1, 0), (2, 1, 3), (4, 4, 1), (2, 2, 0), (2, 1, 1)]):
        directory = tmp_path / f"{number}"
        [(state, _, counters), *_] = pools(ranks).run(
            rank_tasks.load_checkpoint,
            run=str(run.path),
            changes=build_changes(each, zero, MODELS[model]),
            checkpoint=str(checkpoint),
            directory=str(directory),
        )
        assert state.keys() == wanted.keys()
        assert all(np.array_equal(state[name], values) for name, values in wanted.items())
        assert counters == {2.0 if number == 0 else 0.0}  # a state that was only loaded is of step 0
        checkpoint = directory  # the next cut reads what this one has written
