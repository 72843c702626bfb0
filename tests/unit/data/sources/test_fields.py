"""Columns: named, missing, ambiguous; splits, subsets, filters, limits, and prompt templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from llm_training_toolkit.config.data_config import DataConfig
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.chat.prompt_templates import build_jinja_template
from llm_training_toolkit.data.chat.template import ChatTemplate
from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.prepare.builder import prepare_dataset
from llm_training_toolkit.data.preview import preview_step
from llm_training_toolkit.data.sources import Document, DocumentStats, list_source_files, read_source_documents
from llm_training_toolkit.data.tokenizer import TokenizationSpec
from llm_training_toolkit.errors import DataError
from record_sets import build_two_answers, write_json_lines

Configure = Callable[..., Config]


def source(path: Path, form: str = "chat", **more: Any) -> SourceConfig:
    return SourceConfig.model_validate({"path": str(path), "format": form, **more})


def read(path: Path, form: str = "chat", **more: Any) -> list[Document]:
    return list(read_source_documents(source(path, form, **more), 0))


def said(document: Document) -> list[str]:
    return [message["content"] for message in json.loads(document.text)["messages"]]


def test_named_columns_make_the_conversation(tmp_path: Path) -> None:
    row = {"task": "Add.", "data": "1 2", "code": "3", "role": "You add.", "instruction": "no", "output": "no"}
    path = write_json_lines(tmp_path / "a.jsonl", [row])
    named = {"prompt": "task", "context": "data", "completion": "code", "system": "role"}
    assert said(read(path, fields=named)[0]) == ["You add.", "Add.\n1 2", "3"]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_json_lines(tmp_path / "b.jsonl", [{"dialog": talk, "messages": []}])
    assert said(read(path, fields={"messages": "dialog"})[0]) == ["a", "b"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_two_answers_are_an_error_that_shows_the_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_json_lines(path, build_two_answers(5))
    else:
        pq.write_table(pa.Table.from_pylist(build_two_answers(5)), path)
    with pytest.raises(DataError) as raised:
        read(path)
    assert "fields: {prompt: instruction, completion: output}" in str(raised.value)
    assert "fields: {prompt: instruction, completion: response}" in str(raised.value)
    for column, answer in (("output", "print(1)"), ("response", "It is 1.")):
        assert said(read(path, fields={"completion": column})[0]) == ["Print 1.", answer]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("form", "more"),
    [("chat", {"fields": {"completion": "outputs"}}), ("text", {"fields": {"text": "outputs"}})],
)
def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path, kind: str, form: str, more: Any) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_json_lines(path, build_two_answers(5))
    else:
        pq.write_table(pa.Table.from_pylist(build_two_answers(5)), path)
    with pytest.raises(DataError, match=r"has no column 'outputs' .*did you mean 'output'"):
        read(path, form, **more)
    tally = DocumentStats()
    list(read_source_documents(source(path, form, **more), 0, on_error="skip", tally=tally))
    assert tally.skipped == {"no_field": 5}


def test_code_takes_its_columns_by_name(tmp_path: Path) -> None:
    rows = [{"body": "x = 1", "content": "no", "file": "a.py", "project": "p", "likes": 3}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    named = {"content": "body", "path": "file", "repository": "project", "stars": "likes"}
    (document,) = read(tmp_path / "a.parquet", "code", fields=named)
    assert (document.text, document.path, document.repository, document.stars) == ("x = 1", "a.py", "p", 3)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_filter_and_a_limit_choose_records(tmp_path: Path, kind: str) -> None:
    rows = [
        {"content": f"{lang} {n}", "lang": lang, "stars": n} for n in range(20) for lang in ("Python", "Rust", "Go")
    ]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_json_lines(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    tally = DocumentStats()
    wanted = source(path, "code", filter={"language": ["Python", "Rust"], "stars": [1, 2, 3]}, limit=5)
    found = list(read_source_documents(wanted, 0, tally=tally))
    assert [document.text for document in found] == ["Python 1", "Rust 1", "Python 2", "Rust 2", "Python 3"]
    assert [document.stars for document in found] == [1, 1, 2, 2, 3]
    assert tally.dropped["filtered"] == 3 + 1 + 1
    with pytest.raises(DataError, match=r"leaves none of 60 records .*lang is Python \(20\), Rust \(20\), Go"):
        read(path, "code", filter={"language": "python"})


def test_a_filter_by_a_missing_column_is_an_error(tmp_path: Path) -> None:
    rows = [{"content": "x", "lang": "Go", "license": "mit"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"filter: has no column 'licence' .*did you mean 'license'"):
        read(tmp_path / "a.parquet", "code", filter={"licence": "mit"})
    write_json_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"leaves none of 1 records .*has no column 'licence' .*did you mean 'license'"):
        read(tmp_path / "a.jsonl", "code", filter={"licence": "mit"})


def test_a_list_in_a_column_passes_with_one_of_its_values(tmp_path: Path) -> None:
    rows = [{"text": "a", "tags": ["x", "y"]}, {"text": "b", "tags": ["z"]}, {"text": "c", "tags": None}]
    path = write_json_lines(tmp_path / "a.jsonl", rows)
    assert [document.text for document in read(path, "text", filter={"tags": "y"})] == ["a"]


def test_splits_and_subsets_choose_files(tmp_path: Path) -> None:
    names = ["main/train-00000-of-00001.jsonl", "main/train_sft-00000-of-00001.jsonl", "main/test.jsonl"]
    names += ["other/valid/a.jsonl", "other/train.jsonl", "other/trainer.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_json_lines(tmp_path / name, [{"text": name}])

    def files(**more: Any) -> list[str]:
        return [file.name for file in list_source_files(source(tmp_path, "text", **more))]

    assert len(files()) == 6
    assert files(split="train") == [names[0], names[4]]
    assert files(split="train_sft") == [names[1]]
    assert files(split="validation") == [names[3]]
    assert files(split="test", subset="main") == [names[2]]
    with pytest.raises(DataError, match=r"no split 'tests'\. Did you mean split: test\?"):
        files(split="tests")
    with pytest.raises(DataError, match=r"no subset 'mian'\. Did you mean subset: main\?"):
        files(subset="mian")


def test_data_prepared_by_columns_filter_and_limit(
    tmp_path: Path, configure: Configure, markers: TokenizationSpec
) -> None:
    rows = [{"body": f"value {n} of many", "kind": "ab"[n % 2]} for n in range(400)]
    path = write_json_lines(tmp_path / "a.jsonl", rows)
    item = {"path": str(path), "format": "text", "fields": {"text": "body"}, "filter": {"kind": "b"}, "limit": 100}
    prepared = prepare_dataset(configure(sources=[item]), markers)
    (info,) = prepared.dataset_info.sources
    assert (info.documents, info.dropped) == (100, {"filtered": 100})


PROMPTS = {
    "alpaca": "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
    "### Response:",
    "starcoder": "Question: Add.\n1 2\n\nAnswer: ",
    "Q {prompt} ({context})\nA: {completion}!": "Q Add. (1 2)\nA: ",
}


@pytest.mark.parametrize("template", PROMPTS)
def test_a_prompt_template_writes_prompt_and_answer(
    tmp_path: Path, configure: Configure, markers: TokenizationSpec, template: str
) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "it is 3"}
    path = write_json_lines(tmp_path / "a.jsonl", [row])
    item = {"path": str(path), "format": "chat", "prompt_template": template}
    data = configure(sources=[item], sequence_length=512, eval={"fraction": 0.0})
    prepared = prepare_dataset(data, markers)
    ((row_shown,),) = (preview_step(PackedDataset(prepared.dataset_info, global_batch=1), 1),)
    (piece,) = row_shown.pieces
    answer = "".join(span.text for span in piece.spans if span.loss)
    assert answer == "it is 3" + ("!" if "!" in template else "") + "<|endoftext|>"
    assert "".join(span.text for span in piece.spans) == PROMPTS[template] + answer
    written = prepared.tokenizer_path / "chat_template.jinja"
    assert written.read_text(encoding="utf-8") == build_jinja_template(template, "<|endoftext|>")


def test_the_end_of_a_text_template_is_learnt_and_context_may_be_absent() -> None:
    text = "{prompt} {context} = {completion};"
    template = ChatTemplate(build_jinja_template(text, "<|endoftext|>"), ["<|endoftext|>"], {})
    assert template.end_of_turn == "<|endoftext|>"
    assert "message.context or ''" in template.source


def test_starchat_needs_its_special_tokens(tmp_path: Path, configure: Configure, markers: TokenizationSpec) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    item = {"path": str(path), "format": "chat", "prompt_template": "starchat"}
    with pytest.raises(DataError, match=r"no special token '<\|system\|>'"):
        prepare_dataset(configure(sources=[item]), markers)


def test_starchat_writes_turns() -> None:
    source = build_jinja_template("starchat", "<|endoftext|>")
    special = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    template = ChatTemplate(source, special, {})
    assert template.end_of_turn == "<|end|>"
    written = template._template.render_messages([{"role": "user", "content": "q"}], prompt=True)
    assert written.text == "<|system|>\n<|end|>\n<|user|>\nq<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize(
    ("form", "more", "message"),
    [
        ("chat", {"fields": {"text": "x"}}, "fields has text: format chat has"),
        ("text", {"fields": {"prompt": "x"}}, "fields has prompt"),
        ("chat", {"fields": {"messages": "x", "prompt": "y"}}, "one or the other"),
        ("text", {"prompt_template": "alpaca"}, "for format chat"),
        ("chat", {"prompt_template": "alpacca"}, "alpaca, starchat, starcoder"),
        ("chat", {"prompt_template": "{prompt}"}, "must have"),
        ("chat", {"prompt_template": "{completion}{prompt}"}, "last"),
        ("chat", {"prompt_template": "{prompt}{answer}"}, "known are"),
        ("chat", {"filter": {"language": []}}, "at least 1"),
        ("chat", {"limit": 0}, "greater than"),
    ],
)
def test_what_cannot_be_is_refused(form: str, more: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        source(Path("x"), form, **more)


def test_chat_sources_share_one_prompt_template() -> None:
    items = [{"path": "a", "format": "chat"}, {"path": "b", "format": "chat", "prompt_template": "alpaca"}]
    with pytest.raises(ValidationError, match="one chat template"):
        DataConfig.model_validate({"sequence_length": 64, "sources": items})
