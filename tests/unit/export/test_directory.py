"""What stands beside exported weights: where generation stops, and a card with the facts of the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rank_tasks
from checkpoints import build_manifest, save
from llm_training_toolkit.config import Config, parse_config
from llm_training_toolkit.data.tokenizer import open_tokenizer
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.export import atomic_export_dir
from llm_training_toolkit.export.export_run import build_model_files, export_run
from llm_training_toolkit.export.model_card import ExportKind, format_model_card
from llm_training_toolkit.runs.directory import RunDirectory

MANIFEST = build_manifest(1200, tokens=9_830_400, sequences=153_600, world_size=2, zero=2, versions={"torch": "2.13.0"})

OPTIMIZER = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


def with_sources(config: Config, *formats: str) -> Config:
    data = config.model_dump(mode="json")
    data["data"]["sources"] = [{"path": f"documents/{each}", "format": each} for each in formats]
    return parse_config(data, "test")


@pytest.mark.parametrize(
    ("formats", "ends"),
    [
        (("code",), ["<|endoftext|>"]),
        (("chat",), ["<|im_end|>", "<|endoftext|>"]),
        (("text", "chat"), ["<|im_end|>", "<|endoftext|>"]),
    ],
)
def test_a_model_of_conversations_stops_where_a_turn_ends(
    prepared_run: RunDirectory, formats: tuple[str, ...], ends: list[str]
) -> None:
    spec = rank_tasks.build_worker_spec(str(prepared_run.path))
    found = build_model_files(with_sources(spec.config, *formats), spec.dataset_info, "card", "step_1")
    encoder = open_tokenizer(spec.dataset_info.tokenizer_path)
    assert found.stop_token_ids == {token: encoder.get_special_token_id(token) for token in ends}
    assert list(found.stop_token_ids) == ends
    assert found.pad == encoder.get_special_token_id("<|endoftext|>")


@pytest.mark.parametrize("own", ["<|im_end|>", {"content": "<|im_end|>"}, "<unknown>"])
def test_a_model_tuned_to_converse_still_ends_its_turns_after_code(
    prepared_run: RunDirectory, tmp_path: Path, own: object
) -> None:
    spec = rank_tasks.build_worker_spec(str(prepared_run.path))
    shutil.copytree(spec.dataset_info.tokenizer_path, tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": own}))
    dataset_info = replace(spec.dataset_info, tokenizer_path=str(tmp_path / "tokenizer"))
    wanted = ["<|endoftext|>"] if own == "<unknown>" else ["<|im_end|>", "<|endoftext|>"]
    assert list(build_model_files(spec.config, dataset_info, "card", "step_1").stop_token_ids) == wanted


@pytest.mark.parametrize(
    ("kind", "model", "said"),
    [
        ("model", {}, ["A qwen3-0.6b model, from random weights", "library_name: transformers"]),
        ("model", {"path": "x/y", "config_overrides": {}}, ["which began as `x/y`", "licence of the weights"]),
        (
            "adapters",
            {"path": "x/y", "config_overrides": {}, "lora": {}},
            ["for `x/y`", "base_model: x/y", "PeftModel", "rank 16"],
        ),
        (
            "merged",
            {"path": "x/y", "config_overrides": {}, "lora": {}},
            ["`x/y` with adapters (LoRA) merged", "transformers"],
        ),
    ],
)
def test_the_card_tells_the_facts_of_the_run(
    prepared_run: RunDirectory, kind: ExportKind, model: dict[str, Any], said: list[str]
) -> None:
    changes = {"model": model, "tokenizer": {"path": "x/y", "train": None}} if model else {}
    spec = rank_tasks.build_worker_spec(str(prepared_run.path), changes)
    dataset_info = replace(spec.dataset_info, sources=(replace(spec.dataset_info.sources[0], documents=12_345),))
    text = format_model_card(prepared_run, spec.config, dataset_info, MANIFEST, kind=kind, base="x/y")
    for part in [*said, "| step | 1,200 |", "9,830,400, padding included", "12,345 documents", "torch 2.13.0"]:
        assert part in text, text


def test_an_export_takes_the_place_of_nothing_that_is_needed(
    fresh_run: Callable[[str], RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = fresh_run("one"), fresh_run("other")
    save(
        rank_tasks.build_single_rank_context(),
        run.checkpoints_dir / "step_000000003_a1",
        [],
        OPTIMIZER,
        replace(MANIFEST, step=3),
    )
    for taken in (run.base_weights_dir, other.base_weights_dir, other.export_dir):
        taken.mkdir()
        (taken / "training.json").write_text('{"checkpoint": "seed 1"}')
    monkeypatch.chdir(other.path)
    for out in (run.base_weights_dir, Path("export"), other.path / "export_step_3", Path("base")):
        with pytest.raises(CheckpointError, match=r"--out .* belongs to .*(adapters|another run)"):
            export_run(run, step=None, merge=False, out=out, say=print)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"), atomic_export_dir(tmp_path / "file"):
        pass
    assert other.export_dir.is_dir()
