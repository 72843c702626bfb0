"""Every class of model, whole and with adapters, under every ZeRO stage: loads, trains, resumes bit for bit, exports.

A row of the table is a case. Every class meets every stage; two classes, made of the parts of others, meet two. Every
two values of any two other columns meet in some row. Another column goes into `Case`, `case` and `changes`. Every row
begins with published weights, and ends with plain transformers or peft loading what was exported, with equal logits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import rank_tasks
from llm_training_toolkit import families
from llm_training_toolkit.config import Config, dump_config_json, parse_config
from llm_training_toolkit.data.prepare.epochs import prepare_run_data
from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool
from run_results import newest_checkpoint, read_losses
from tiny_models import SHAPES
from tiny_runs import engine_at, tiny_config
from vision_language import save_vision_language_model

Pools = Callable[[int], RankPool]
STEPS = 2
"""The second moves by the moments of the first, which a resume between them has to bring back."""
ROWS_SAVED = 512
"""Of the embedding in the weights that are loaded."""


KINDS: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Case:
    """One row."""

    model: str
    zero: int
    method: Literal["full", "grown", "LoRA", "LoRA with dropout"]
    precision: Literal["bf16", "fp32"]
    checkpointing: ActivationCheckpointing

    @property
    def is_lora(self) -> bool:
        return self.method.startswith("LoRA")

    @property
    def lora(self) -> dict[str, Any] | None:
        """Adapters; those without dropout are on the experts of a mixture, too."""
        if not self.is_lora:
            return None
        if self.method.endswith("dropout"):
            return {"rank": 4, "dropout": 0.1}
        return {"rank": 4, "target_parameters": ["gate_up_proj", "down_proj"] * ("num_experts" in SHAPES[self.model])}

    @property
    def rows(self) -> int:
        """Of the embedding."""
        return ROWS_SAVED + 64 * (self.method == "grown")

    def __str__(self) -> str:
        return f"{self.model}, {self.method}, ZeRO {self.zero}, {self.precision}, checkpointing {self.checkpointing}"

    def changes(self, weights: Path, tokenizer: str) -> dict[str, Any]:
        """Changes to the prepared run of the class."""
        model = {
            "path": str(weights),
            "config_overrides": {},
            "lora": self.lora,
            "activation_checkpointing": self.checkpointing,
            "resize_vocab_to": self.rows if self.rows > ROWS_SAVED else None,
        }
        return {
            "model": model,
            "tokenizer": {"path": tokenizer, "train": None},
            "engine": engine_at(self.zero),
            "train": {"precision": self.precision},
        }


def case(number: int, model: str, zero: int) -> Case:
    """The row of a class and a stage: the other columns are spread so that all their pairs occur, bf16 least often."""
    upper, half = zero // 2, number // 2
    methods: tuple[Literal["full", "grown"], ...] = ("full", "grown")
    adapters: tuple[Literal["LoRA", "LoRA with dropout"], ...] = ("LoRA", "LoRA with dropout")
    return Case(
        model,
        zero,
        (methods, adapters)[(number + zero) % 2][(upper + half) % 2],
        "fp32" if (number + 2 * zero + upper) % 4 else "bf16",
        KINDS[(zero + half + 2 * upper) % 3],
    )


TWO_STAGES = {"qwen3.5-35b-a3b": (0, 3), "qwen2-57b-a14b": (1, 2)}
ROWS = [case(number, model, zero) for number, model in enumerate(SHAPES) for zero in TWO_STAGES.get(model, range(4))]


def test_any_two_values_meet_in_a_row() -> None:
    columns = list(zip(*(astuple(row) for row in ROWS if row.model not in TWO_STAGES), strict=True))
    for one, other in combinations(columns, 2):
        assert set(zip(one, other, strict=True)) == set(product(one, other))
    assert [len(set(column)) for column in columns] == [len(SHAPES) - 2, 4, 4, 2, 3]


@dataclass(frozen=True)
class Prepared:
    """A run directory ready for workers, and weights to start from, as transformers publishes them."""

    run: RunDirectory
    weights: Path
    tokenizer: str


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Prepared]:
    """Prepares a class when it is first asked for."""
    made: dict[str, Prepared] = {}

    def make(model: str) -> Prepared:
        if model not in made:
            made[model] = _prepare(model, corpus, tmp_path_factory.mktemp("families"))
        return made[model]

    return make


def _prepare(model: str, corpus: Path, folder: Path) -> Prepared:
    source: dict[str, Any] = {"path": str(corpus), "format": "code"}
    if families.find_size(model).family.special_tokens.has_fim:
        source["fim"] = {"rate": 0.5, "loss": "middle"}
    sections: dict[str, Any] = {
        "model": {"name": model, "config_overrides": SHAPES[model], "loss_chunk_size": "auto"},
        "train": {"steps": STEPS, "global_batch_size": 5, "micro_batch_size": 2},
        "data": {"eval": {"fraction": 0.0}, "sources": [source]},
        "eval": {"interval": 10},
        "checkpoint": {"interval": 1},
        "export": {"at_end": True},
    }
    config: Config = tiny_config(corpus, folder, **sections)
    run = RunDirectory(folder / "tiny")
    run.dataset_info_path.parent.mkdir(parents=True)
    dataset_info = prepare_run_data(config, lambda _stage, _done, _total: None).dataset_info
    run.dataset_info_path.write_text(dataset_info.to_json())
    run.resolved_config_path.write_text(dump_config_json(config))
    run.config_path.write_text("# a test's run\n")
    torch.manual_seed(3)
    hf = families.resolve_hf_config(config)
    if hf["model_type"].endswith("_text"):
        save_vision_language_model(hf, folder / "weights")
    else:
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf)).save_pretrained(folder / "weights")
    return Prepared(run, folder / "weights", dataset_info.tokenizer_path)


def _copy(run: RunDirectory, changes: Mapping[str, Any], target: Path) -> RunDirectory:
    """A run directory of its own, with the changes written into its configuration."""
    shutil.copytree(run.path, target)
    copy = RunDirectory(target)
    data = json.loads(copy.resolved_config_path.read_text())
    for section, values in changes.items():
        data[section] |= values
    copy.resolved_config_path.write_text(dump_config_json(parse_config(data, "test")))
    return copy


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_a_model_is_loaded_trained_resumed_and_exported(
    pools: Pools, prepared: Callable[[str], Prepared], tmp_path: Path, case: Case
) -> None:
    base = prepared(case.model)
    changes = case.changes(base.weights, base.tokenizer)
    whole, rest = (_copy(base.run, changes, tmp_path / name) for name in ("whole", "rest"))
    assert pools(2).run(rank_tasks.work_on, run=str(whole.path))[0]["status"] == "finished"
    assert sorted(read_losses(whole)) == [1, 2]
    first = whole.get_checkpoint_dir(1, 1)  # what a stop leaves, too: tests/ranks/test_elastic.py
    shutil.copytree(first, rest.checkpoints_dir / first.name)
    assert pools(2).run(rank_tasks.work_on, run=str(rest.path))[0]["status"] == "finished"
    assert read_losses(rest) == {step: loss for step, loss in read_losses(whole).items() if step > 1}
    found, wanted = (rank_tasks.read_final_state(run) for run in (rest, whole))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert all("lora_" in name for name in wanted) == case.is_lora
    _assert_exported(pools, whole, case)


def _assert_exported(pools: Pools, run: RunDirectory, case: Case) -> None:
    """Plain transformers, or peft, loads all of the export, and has the engine's logits bit for bit.

    In the same process, because a process that has had a model under ZeRO 3 keeps DeepSpeed's linear layers: these
    round to bf16 before they add a bias, torch's do it once.
    """
    ids = [[5, 17, 300, 42, 8, 111, 7, 64], [400, 3, 3, 9, 250, 31, 77, 1]]
    wanted = pools(2).run(rank_tasks.logits_of, run=str(run.path), checkpoint=str(newest_checkpoint(run)), ids=ids)[0]
    found = pools(2).run(rank_tasks.reloaded_logits, directory=str(run.export_dir), precision=case.precision, ids=ids)[
        0
    ]
    assert wanted.shape[-1] == case.rows
    assert found["architecture"] == families.find_size(case.model).family.architecture
    assert not any(found["info"].values()), found["info"]
    assert np.array_equal(found["logits"], wanted)
    assert AutoTokenizer.from_pretrained(run.export_dir).eos_token == "<|endoftext|>"
