"""Issues: the layout of both StarCoder generations, numbered participants, and three shapes of records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layout_tokens import decode_source, render_source
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.sources import DocumentStats, read_source_documents
from llm_training_toolkit.errors import DataError
from record_sets import write_json_lines


def event(action: str, author: str, **more: Any) -> dict[str, Any]:
    kind = "comment" if action == "created" else "issue"
    fields = {"type": kind, "action": action, "author": author, "comment": None, "description": None, "title": None}
    return {**fields, **more}


# A record of bigcode/the-stack-github-issues, with its field names.
RECORD = {
    "repo": "me/app",
    "issue_id": 7,
    "issue_number": 1,
    "events": [
        event("opened", "ann", title="It fails", description="On start, says bob."),
        event("created", "bob", comment="Which version, @ann?"),
        event("created", "ann", comment="Two. Bannister has it, too."),
        event("closed", "bob"),
        event("created", "eve", comment="Thanks"),
    ],
}
GOLDEN = (
    "<issue_start>Title: It fails\nusername_0: On start, says username_1."
    "<issue_comment>username_1: Which version, @username_0?"
    "<issue_comment>username_0: Two. Bannister has it, too."
    "<issue_closed><issue_comment>username_2: Thanks<|endoftext|>"
)


@pytest.mark.parametrize("model", ["starcoderbase-1b", "starcoder2-3b"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_issue_is_written_as_starcoder_read_it(
    tmp_path: Path, layout_tokenizers: dict[str, Path], model: str, kind: str
) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_json_lines(path, [RECORD])
    else:
        pq.write_table(pa.Table.from_pylist([RECORD]), path)
    assert decode_source(layout_tokenizers[model], path, format="issues") == [GOLDEN]


def test_masked_authors_and_texts_of_filtered_issues_are_read(
    tmp_path: Path, layout_tokenizers: dict[str, Path]
) -> None:
    events = [
        event("opened", "ann", masked_author="username_0", title="T", text="a"),
        event("edited", "ann", masked_author="username_0", title="T2", text="b"),
        event("created", "bob", masked_author="username_1", text="c"),
    ]
    path = write_json_lines(tmp_path / "a.jsonl", [{"events": events}])
    written = ["<issue_start>Title: T\nusername_0: a<issue_comment>username_1: c<|endoftext|>"]
    assert decode_source(layout_tokenizers["starcoder2-3b"], path, format="issues") == written


def test_issue_of_github_is_read(tmp_path: Path, layout_tokenizers: dict[str, Path]) -> None:
    row = {
        "title": "T",
        "body": "a",
        "user": {"login": "ann"},
        "comments": [{"author": {"login": "bob"}, "body": "b"}, {"user": None, "body": "c"}],
        "state": "CLOSED",
    }
    path = write_json_lines(tmp_path / "a.jsonl", [row])
    written = (
        "<issue_start>Title: T\nusername_0: a<issue_comment>username_1: b<issue_comment>username_2: c"
        "<issue_closed><|endoftext|>"
    )
    assert decode_source(layout_tokenizers["starcoder2-3b"], path, format="issues") == [written]


@pytest.mark.parametrize("author", [None, ""])
def test_comment_without_an_author_is_a_comment(
    tmp_path: Path, layout_tokenizers: dict[str, Path], author: str | None
) -> None:
    events = [
        event("opened", "ann", title="T", text="unknown to ann"),
        {"action": "created", "author": author, "comment": "b"},
    ]
    path = write_json_lines(tmp_path / "a.jsonl", [{"events": events}])
    written = "<issue_start>Title: T\nusername_0: unknown to username_0<issue_comment>username_1: b<|endoftext|>"
    assert decode_source(layout_tokenizers["starcoder2-3b"], path, format="issues") == [written]


def test_number_of_comments_is_no_list_of_them(tmp_path: Path, layout_tokenizers: dict[str, Path]) -> None:
    row = {"title": "T", "body": "a", "user": {"login": "ann"}, "comments": 3, "state": "open"}
    path = write_json_lines(tmp_path / "a.jsonl", [row])
    written = ["<issue_start>Title: T\nusername_0: a<|endoftext|>"]
    assert decode_source(layout_tokenizers["starcoder2-3b"], path, format="issues") == written


def test_content_of_starcoderdata_gets_tokens_for_its_markers(
    tmp_path: Path, layout_tokenizers: dict[str, Path]
) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", [{"content": GOLDEN.removesuffix("<|endoftext|>")}])
    assert decode_source(layout_tokenizers["starcoderbase-1b"], path, format="issues") == [GOLDEN]


def test_tokenizer_without_issue_tokens_is_refused(tmp_path: Path, layout_tokenizers: dict[str, Path]) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", [RECORD])
    with pytest.raises(DataError, match="starcoder2-3b"):
        render_source(layout_tokenizers["qwen2.5-coder-0.5b"], path, format="issues")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"title": "T"}, "no_text"),
        ({"events": "x"}, "wrong_type"),
        ({"events": [{"action": "created", "author": 3, "comment": "a"}]}, "wrong_type"),
        ({"events": [{"action": ["created"], "author": "ann", "comment": "a"}]}, "wrong_type"),
        ({"title": 3, "body": "a"}, "wrong_type"),
        ({"title": "T", "body": "a", "comments": "b"}, "wrong_type"),
        ([1], "no_text"),
    ],
)
def test_record_that_is_no_issue_is_counted(tmp_path: Path, row: Any, reason: str) -> None:
    tally = DocumentStats()
    path = write_json_lines(tmp_path / "a.jsonl", [RECORD, row])
    source = SourceConfig(path=str(path), format="issues")
    assert len(list(read_source_documents(source, 0, on_error="collect", tally=tally))) == 1
    assert tally.skipped == {reason: 1}


def test_issue_without_text_is_empty(tmp_path: Path) -> None:
    tally = DocumentStats()
    path = write_json_lines(tmp_path / "a.jsonl", [{"events": [event("closed", "ann")]}])
    assert not list(read_source_documents(SourceConfig(path=str(path), format="issues"), 0, tally=tally))
    assert tally.dropped == {"empty": 1}
