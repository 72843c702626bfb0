"""Faults: all of a source at once, by kind, with places; skipped within their share; a sample checked in seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llm_training_toolkit.cli.app import app
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.prepare.builder import prepare_dataset
from llm_training_toolkit.data.prepare.source_check import check_sources
from llm_training_toolkit.data.preview import preview_step
from llm_training_toolkit.data.tokenizer import TokenizationSpec
from llm_training_toolkit.errors import DataError
from record_sets import build_code_instructions, build_two_answers, write_json_lines

Configure = Callable[..., Config]


def chat(path: Path, **more: Any) -> dict[str, Any]:
    return {"path": str(path), "format": "chat", "prompt_template": "starcoder", **more}


def test_every_fault_is_said_at_once_and_skipped_within_the_share(
    tmp_path: Path, configure: Configure, markers: TokenizationSpec
) -> None:
    path = write_json_lines(tmp_path / "set.jsonl", build_code_instructions())
    with pytest.raises(DataError) as raised:
        prepare_dataset(configure(sources=[chat(path)], sequence_length=256), markers)
    said = str(raised.value)
    assert "data.sources: 2 of 2,017 documents cannot be read" in said
    assert f"2 of 2,017 records: output: the assistant's text is empty ({path}: 238, 1,077)" in said
    report = Path(said.rpartition("All places: ")[2])
    (faulty,) = json.loads(report.read_text(encoding="utf-8"))["sources"]
    assert faulty["faults"][0]["places"] == [f"{path}:238", f"{path}:1077"]
    prepared = prepare_dataset(configure(sources=[chat(path)], sequence_length=256, on_error="skip"), markers)
    (info,) = prepared.dataset_info.sources
    assert (info.documents, info.dropped) == (2015, {"empty_message": 2})
    assert prepared.dataset_info.fault_report is not None
    shown = preview_step(PackedDataset(prepared.dataset_info, global_batch=1), 1)[0].pieces[0]
    answer = "".join(span.text for span in shown.spans if span.loss)
    assert answer.startswith("def add(x):\n    return x + ")
    assert answer.endswith("<|endoftext|>")


def test_faults_of_several_kinds_and_files(tmp_path: Path, configure: Configure, markers: TokenizationSpec) -> None:
    rows = build_two_answers(3)
    broken = "\n".join([json.dumps(rows[0]), "{", json.dumps({"text": 1}), '{"instruction": "a", "output": " "}'])
    (tmp_path / "a.jsonl").write_text(broken + "\n", encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    config = configure(sources=[chat(tmp_path)], on_error="skip", max_skipped=1.0)
    with pytest.raises(DataError) as raised:
        prepare_dataset(config, markers)
    lines = str(raised.value).split("\n")
    assert "5 of 5 documents" in lines[0]
    assert any("a.jsonl:1: holds more than one conversation" in line for line in lines)
    assert any("a.jsonl:2: is not JSON" in line for line in lines)
    assert any("a.jsonl:3: holds no conversation" in line for line in lines)
    assert any("a.jsonl:4: output: the assistant's text is empty" in line for line in lines)
    assert any("b.jsonl.gz:1: is damaged" in line for line in lines)
    assert "how much that is is not known" in lines[-2]


def test_a_sample_of_every_source(tmp_path: Path, configure: Configure, markers: TokenizationSpec) -> None:
    path = write_json_lines(tmp_path / "set.jsonl", build_code_instructions(400, empty=[12]))
    data = configure(sources=[chat(path), chat(path, limit=5)], sequence_length=32)
    first, second = check_sources(data, markers)
    assert (first.files, first.documents) == (1, 299)
    assert first.faults == (f"{path}:12: output: the assistant's text is empty",)
    assert first.tokens is not None
    assert first.tokens > 299 * 20
    assert first.overlong == 299
    assert (first.examples, first.loss_tokens) == (0, 0)  # too long for the sequences
    assert first.preview.startswith("user: Write a function that adds 1. | assistant: def add(x):")
    assert second.path == first.path
    assert not (tmp_path / "runs").exists()


def test_prepare_check_on_the_command_line(tmp_path: Path, tokenizer_path: Path) -> None:
    path = write_json_lines(tmp_path / "set.jsonl", build_two_answers(20))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""\
run: {{name: two, dir: {tmp_path}/runs}}
model: {{name: starcoder2-3b}}
tokenizer: {{path: {tokenizer_path}}}
data:
  sequence_length: 256
  sources: [{{path: {path}, format: chat, prompt_template: starcoder, fields: {{completion: response}}}}]
train: {{epochs: 1}}
""",
        encoding="utf-8",
    )
    done = CliRunner().invoke(app, ["prepare", str(config), "--check", "--json"])
    assert done.exit_code == 0
    (sample,) = json.loads(done.stdout)["sources"]
    assert (sample["documents"], sample["faults"]) == (20, [])
    done = CliRunner().invoke(app, ["prepare", str(config), "--check", "data.sources.0.fields={}"])
    assert done.exit_code == 1
    assert "20 of 20 records: holds more than one conversation" in done.stdout


SETS = {
    "two empty answers": (build_code_instructions(), "prompt_template: starcoder", "on_error: skip"),
    "two columns of answers": (build_two_answers(), "fields: {completion: response}, prompt_template: alpaca", ""),
}


@pytest.mark.parametrize("name", SETS)
def test_eight_lines_prepare_a_set_as_people_have_it(tmp_path: Path, tokenizer_path: Path, name: str) -> None:
    records, choice, more = SETS[name]
    path = write_json_lines(tmp_path / "set.jsonl", records)
    config = tmp_path / "run.yaml"
    text = f"""\
run: {{name: set, dir: {tmp_path}/runs}}
model: {{name: starcoder2-3b}}
tokenizer: {{path: {tokenizer_path}}}
data:
  sequence_length: 512
  sources: [{{path: {path}, format: chat, {choice}}}]
  {more}
train: {{epochs: 1}}
"""
    config.write_text(text, encoding="utf-8")
    assert len(text.splitlines()) <= 8
    done = CliRunner().invoke(app, ["show-batch", str(config), "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)["sequences"][0]["text"].split("<|endoftext|>")[0]
    asked, _, answer = shown.partition("\n\nAnswer: " if "starcoder" in choice else "\n\n### Response:")
    if "starcoder" in choice:
        assert asked.startswith("Question: Write a function that adds ")
        assert answer.startswith("def add(x):\n    return x + ")
    else:
        assert asked.startswith("Below is an instruction that describes a task. Write a response")
        assert answer.startswith("It is ")
