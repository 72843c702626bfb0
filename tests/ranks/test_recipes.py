"""Every recipe in configs/ trains in a tiny shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rank_tasks
from llm_training_toolkit import families
from llm_training_toolkit.config import Config, dump_config_json, load_config, parse_config
from llm_training_toolkit.data.prepare.epochs import prepare_run_data
from llm_training_toolkit.plan import make_plan
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool
from tiny_models import SHAPES
from tiny_runs import write_corpus
from unit.test_recipes import CONFIGS, RECIPES

TINY = {families.find_size(size).family.model_type: dict(shape) for size, shape in SHAPES.items()}
LENGTH = 256
"""Tokens of a small sequence: Qwen2.5's own system text takes 100 of those that a small tokenizer makes."""
TINY["gpt_bigcode"]["n_positions"] = LENGTH


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Conversations, a repository, and a table of files, by what a recipe's path ends with."""
    folder = tmp_path_factory.mktemp("documents")
    turns = [
        [{"role": "user", "content": f"{number} + 1?"}, {"role": "assistant", "content": f"It is {number + 1}."}]
        for number in range(60)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": pair * 2}) + "\n" for pair in turns))
    files = sorted(write_corpus(folder / "repository").iterdir())
    columns = {"content": [file.read_text() for file in files], "path": [file.name for file in files]}
    pq.write_table(pa.table(columns | {"repository": ["us/maths"] * len(files)}), folder / "code.parquet")
    return {"jsonl": folder / "chats.jsonl", "repository": folder / "repository", "parquet": folder / "code.parquet"}


def miniature(name: str, documents: dict[str, Path], folder: Path) -> Config:
    """The recipe on two workers, with three steps of small sequences, a tiny shape, and documents made here."""
    data = json.loads(dump_config_json(load_config(CONFIGS / name)))
    model_type = families.find_size(data["model"]["name"]).family.model_type
    data["run"] |= {"name": "tiny", "dir": str(folder)}
    data["model"] |= {"path": None, "config_overrides": TINY[model_type]}
    if data["model"]["lora"] is not None:
        data["model"]["lora"]["quantize"] = None  # needs a GPU
    data["tokenizer"] = {"train": {"vocab_size": 512}}
    for source in data["data"]["sources"]:
        kind = next((kind for kind in documents if str(source["path"]).endswith(kind)), "repository")
        source["path"] = str(documents[kind])
    data["data"] |= {"sequence_length": LENGTH}
    data["optim"]["warmup"] = 1
    data["train"] |= {"steps": 3, "epochs": None, "tokens": None, "global_batch_size": 4, "micro_batch_size": 1}
    data["export"]["at_end"] = name == "qwen/full-7b-one-node.yaml"
    data["cluster"] |= {"workers": 2, "cpus_per_worker": 1}
    data["engine"]["sequence_parallel"] = min(data["engine"]["sequence_parallel"], 2)
    return parse_config(data, name)


@pytest.mark.parametrize("name", RECIPES)
def test_a_tiny_shape_of_it_trains(
    pools: Callable[[int], RankPool], documents: dict[str, Path], tmp_path: Path, name: str
) -> None:
    config = miniature(name, documents, tmp_path)
    run = RunDirectory(tmp_path / "tiny")
    run.dataset_info_path.parent.mkdir(parents=True)
    run.dataset_info_path.write_text(
        prepare_run_data(config, lambda _stage, _done, _total: None).dataset_info.to_json()
    )
    run.resolved_config_path.write_text(dump_config_json(config))
    run.config_path.write_text("# a test's run\n")
    assert pools(2).run(rank_tasks.train_run, run=str(run.path))[0]["status"] == "finished"
    rows: list[dict[str, Any]] = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    peak = make_plan(config).lr
    assert steps[0]["optim/lr"] == peak
    assert steps[2]["optim/lr"] == pytest.approx(peak * config.optim.min_lr_ratio)
    assert all(0 < row["optim/grad_norm"] < 100 for row in steps)
    experts = families.resolve_hf_config(config).get("num_experts", 0)
    assert all(("router/max_load" in row) == bool(experts) for row in steps)
    assert all(1 <= row["router/max_load"] <= experts for row in steps if experts)
    if config.export.at_end:
        assert_answers_end(run)


def assert_answers_end(run: RunDirectory) -> None:
    """Whatever generates with a model of chat stops at the end of a turn, or of a text."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(run.export_dir)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert GenerationConfig.from_pretrained(run.export_dir).eos_token_id == ends
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert "<|im_start|>" in tokenizer.chat_template
