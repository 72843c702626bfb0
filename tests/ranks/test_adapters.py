"""Adapters of every family: trained, resumed, moved to other ranks, exported; only they are saved, beside one base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import rank_tasks
from llm_training_toolkit.checkpoint import CheckpointReader
from llm_training_toolkit.config import dump_config_json
from llm_training_toolkit.data.prepare.epochs import prepare_run_data
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.export.export_run import export_run
from llm_training_toolkit.plan import make_plan
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool
from run_results import assert_same_state, newest_checkpoint, read_losses
from tiny_models import SHAPES, one_thread
from tiny_runs import SHAPE, engine_at, tiny_config

Pools = Callable[[int], RankPool]
Make = Callable[..., RunDirectory]
STEPS, STOP = 4, 2
IDS = [[5, 17, 300, 42, 8, 111, 7, 64], [400, 3, 3, 9, 250, 31, 77, 1]]

QWEN2 = {key: value for key, value in SHAPE.items() if key != "head_dim"}
BIGCODE = {"n_layer": 2, "n_embd": 64, "n_inner": 128, "n_head": 4}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"name": "qwen3-0.6b", "config_overrides": SHAPE},
    "qwen3 untied": {"name": "qwen3-0.6b", "config_overrides": SHAPE | {"tie_word_embeddings": False}},
    "qwen2": {"name": "qwen2.5-0.5b", "config_overrides": QWEN2},
    "qwen3 mixture": {"name": "qwen3-30b-a3b", "config_overrides": SHAPES["qwen3-30b-a3b"]},
    "starcoder2": {"name": "starcoder2-3b", "config_overrides": QWEN2},
    "starcoder 1": {"name": "starcoderbase-1b", "config_overrides": BIGCODE},
}


EXPERTS = {"target_parameters": ["gate_up_proj", "down_proj"]}


@dataclass(frozen=True)
class Row:
    """One combination of adapter settings; tests/ranks/test_families.py has every class and stage."""

    model: str
    zero: int
    workers: int
    precision: str
    lora: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.model}, zero {self.zero}, {self.workers} x {self.precision}, {self.lora}"


TABLE = [
    Row("qwen3", 0, 2, "bf16", {"use_dora": True}),
    Row("qwen3 untied", 3, 2, "fp32", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    Row("qwen2", 3, 1, "fp32", {"use_dora": True, "dropout": 0.1}),
    Row("qwen3 mixture", 3, 2, "fp32", {"dropout": 0.1}),
    Row("qwen3 mixture", 0, 2, "bf16", EXPERTS),
    Row("qwen3 mixture", 2, 1, "fp32", {"target_parameters": ["down_proj"], "use_rslora": True}),
    Row("starcoder2", 2, 1, "bf16", {"use_rslora": True, "target_modules": ["q_proj", "c_proj"]}),
    Row("starcoder 1", 0, 1, "fp32", {"use_dora": True}),
]


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunDirectory]:
    """A run directory of each model, ready for workers."""
    made: dict[str, RunDirectory] = {}

    def prepare(model: str) -> RunDirectory:
        if model not in made:
            run = RunDirectory(tmp_path_factory.mktemp("prepared") / "tiny")
            optim = {"lr": 1e-2, "warmup": 0}
            config = tiny_config(
                corpus,
                run.path.parent,
                model=MODELS[model],
                train={"steps": STEPS},
                optim=optim,
                export={"at_end": True},
            )
            run.dataset_info_path.parent.mkdir(parents=True)
            run.dataset_info_path.write_text(
                prepare_run_data(config, lambda _stage, _done, _total: None).dataset_info.to_json()
            )
            run.resolved_config_path.write_text(dump_config_json(config))
            made[model] = run
        return made[model]

    return prepare


@pytest.fixture
def make(prepared: Callable[[str], RunDirectory], tmp_path: Path) -> Make:
    """A copy of the prepared run of a model, with changes that stay."""

    def copied(name: str, size: str = "qwen3", **sections: dict[str, Any]) -> RunDirectory:
        return copy_run(prepared(size), tmp_path / name, sections)

    return copied


def copy_run(run: RunDirectory, target: Path, changes: Mapping[str, Any]) -> RunDirectory:
    """A copy with these changes, and the plan that follows."""
    copy = RunDirectory(target)
    shutil.copytree(run.path, target)
    spec = rank_tasks.build_worker_spec(str(target), changes)
    copy.resolved_config_path.write_text(dump_config_json(spec.config))
    copy.plan_path.write_text(json.dumps(make_plan(spec.config).to_json()))
    return copy


@torch.no_grad()
def logits(model: Any) -> Any:
    """With one thread, as a rank has: on AMD processors the sums of two threads differ from those of one."""
    with one_thread():
        return model(input_ids=torch.tensor(IDS), use_cache=False).logits.float().numpy()


def reloaded(directory: Path, dtype: torch.dtype) -> Any:
    """Adapters as plain peft loads them."""
    base = json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, str(directory), autocast_adapter_dtype=False).eval()


def of(row: Row) -> dict[str, Any]:
    """The changes of a row."""
    model = {"lora": {"rank": 4, **row.lora}}
    train = {"precision": row.precision}
    return {"engine": engine_at(row.zero), "train": train, "model": model, "checkpoint": {"interval": STOP}}


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_every_family_trains_resumes_bitwise_and_loads_in_plain_peft(pools: Pools, make: Make, row: Row) -> None:
    whole, rest = make("whole", row.model, **of(row)), make("rest", row.model, **of(row))
    pool = pools(row.workers)
    assert pool.run(rank_tasks.train_run, run=str(whole.path))[0]["status"] == "finished"
    first = whole.get_checkpoint_dir(STOP, 1)  # what a stop leaves, too: the next test
    shutil.copytree(first, rest.checkpoints_dir / first.name)
    assert pool.run(rank_tasks.train_run, run=str(rest.path))[0]["status"] == "finished"
    assert sorted(read_losses(whole)) == list(range(1, STEPS + 1))
    assert read_losses(rest) == {step: loss for step, loss in read_losses(whole).items() if step > STOP}
    state = rank_tasks.read_final_state(whole)
    assert_same_state(rank_tasks.read_final_state(rest), state)
    assert all("lora_" in name or "modules_to_save" in name for name in state)
    manifest = CheckpointReader(newest_checkpoint(whole)).manifest
    plan = json.loads(whole.plan_path.read_text())
    assert sum(int(np.prod(shape)) for shape in manifest.shapes.values()) == plan["trainable_parameters"]
    assert any(np.abs(values).max() > 1e-3 for name, values in state.items() if "lora_B" in name and "weights" in name)

    # DoRA reads weights that ZeRO 3 gathers for the engine's own forward pass alone.
    stage = {"engine": {"zero_stage": 0}} if "use_dora" in row.lora else None
    checkpoint = str(newest_checkpoint(whole))
    asked: dict[str, Any] = {"run": str(whole.path), "checkpoint": checkpoint, "ids": IDS, "changes": stage}
    wanted = pool.run(rank_tasks.compute_logits, **asked)[0]
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[row.precision]
    assert np.array_equal(logits(reloaded(whole.export_dir, dtype)), wanted)
    merged = AutoModelForCausalLM.from_pretrained(export_run(whole, step=None, merge=True, out=None, say=print).path)
    difference, largest = np.abs(logits(merged) - wanted).max(), np.abs(wanted).max()
    assert difference < {"bf16": 0.05, "fp32": 1e-4}[row.precision] * largest
    base = AutoModelForCausalLM.from_pretrained(whole.base_weights_dir, dtype=dtype)
    assert np.abs(logits(base) - wanted).max() > 3 * difference, "what was learnt is more than what rounding changes"


@pytest.fixture(scope="module")
def begun_and_whole(
    pools: Pools, prepared: Callable[[str], RunDirectory], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDirectory, RunDirectory]:
    """A run of two ranks that has been stopped, and the one that nothing disturbed."""
    folder, changes = tmp_path_factory.mktemp("moved"), {"model": {"lora": {"rank": 4, "dropout": 0.2}}}
    begun, whole = (copy_run(prepared("qwen3"), folder / name, changes) for name in ("begun", "whole"))
    assert pools(2).run(rank_tasks.train_run, run=str(whole.path))[0]["status"] == "finished"
    stopped = pools(2).run(rank_tasks.train_run, run=str(begun.path), stop_after=STOP)
    assert (stopped[0]["status"], stopped[0]["step"]) == ("stopped", STOP)
    return begun, whole


@pytest.mark.parametrize(("workers", "zero"), [(1, 3), (3, 2), (3, 0), (1, 1)])
def test_adapters_resume_with_other_ranks_and_stages(
    pools: Pools, begun_and_whole: tuple[RunDirectory, RunDirectory], tmp_path: Path, workers: int, zero: int
) -> None:
    begun, whole = begun_and_whole
    run = copy_run(begun, tmp_path / "moved", {"engine": {"zero_stage": zero}})
    pools(workers).run(rank_tasks.train_run, run=str(run.path))
    found, wanted = read_losses(run), read_losses(whole)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert max(abs(found[step] - wanted[step]) / wanted[step] for step in found) < 2e-6


def test_another_base_is_refused(pools: Pools, make: Make) -> None:
    full, run = make("full"), make("run", model={"lora": {}})
    pools(1).run(rank_tasks.train_run, run=str(full.path))
    pools(1).run(rank_tasks.train_run, run=str(run.path), stop_after=STOP)
    shutil.copy(full.export_dir / "model.safetensors", run.base_weights_dir / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not the weights.*model\.safetensors has other content"):
        pools(1).run(rank_tasks.train_run, run=str(run.path))
    with pytest.raises(CheckpointError, match=r"not the weights.*model\.safetensors has other content"):
        export_run(run, step=None, merge=True, out=None, say=print)
    shutil.rmtree(run.base_weights_dir)  # from scratch it is a function of the seed
    assert pools(1).run(rank_tasks.train_run, run=str(run.path))[0]["status"] == "finished"


def test_adapters_stand_beside_a_saved_model_and_name_it_as_given(pools: Pools, make: Make) -> None:
    full = make("full")
    pools(1).run(rank_tasks.train_run, run=str(full.path))
    given = {"path": str(full.export_dir), "config_overrides": {}, "lora": {"rank": 4}}
    tokenizer = {"path": str(full.export_dir), "train": None}
    run = make("run", model=given, tokenizer=tokenizer)
    pools(2).run(rank_tasks.train_run, run=str(run.path))
    assert read_losses(run)[1] < read_losses(full)[1] - 0.3
    assert not run.base_weights_dir.exists()
    assert json.loads((run.export_dir / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        full.export_dir
    )
    assert CheckpointReader(newest_checkpoint(run)).manifest.extra["base"]["path"] == str(full.export_dir)


def test_weights_of_another_run_become_the_base(pools: Pools, make: Make) -> None:
    full = make("full")
    pools(1).run(rank_tasks.train_run, run=str(full.path))
    tokenizer = {"path": rank_tasks.build_worker_spec(str(full.path)).dataset_info.tokenizer_path, "train": None}
    given = {"init_from": str(full.path), "config_overrides": {}, "lora": {"rank": 4}}
    run = make("run", model=given, tokenizer=tokenizer)
    pools(2).run(rank_tasks.train_run, run=str(run.path), stop_after=STOP)
    assert read_losses(run)[1] < read_losses(full)[1] - 0.3
    shutil.rmtree(full.checkpoints_dir)  # a resume needs that run no more
    pools(2).run(rank_tasks.train_run, run=str(run.path))
    again = AutoModelForCausalLM.from_pretrained(run.base_weights_dir)
    assert np.array_equal(logits(again), logits(AutoModelForCausalLM.from_pretrained(full.export_dir)))

    third = make("third", model=given | {"init_from": str(run.path), "lora": {"rank": 2}}, tokenizer=tokenizer)
    pools(1).run(rank_tasks.train_run, run=str(third.path), stop_after=1)
    merged = export_run(run, step=None, merge=True, out=None, say=print)
    base = AutoModelForCausalLM.from_pretrained(third.base_weights_dir)
    assert np.array_equal(logits(base), logits(AutoModelForCausalLM.from_pretrained(merged.path)))

    whole = make("whole", model=given | {"init_from": str(run.path), "lora": None}, tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match=r"that run trained adapters.*--merge"):
        pools(1).run(rank_tasks.train_run, run=str(whole.path))
