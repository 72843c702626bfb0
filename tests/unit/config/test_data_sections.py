"""The data section: which fields of a source go with which format, and what can be held out."""

from __future__ import annotations

from typing import Any

import pytest

from llm_training_toolkit.config import Config, dump_config_json, flatten_config, parse_config, parse_config_json
from llm_training_toolkit.errors import ConfigError

CODE = {"path": "a", "format": "code"}


def config(source: dict[str, Any] | None = None, held_out: dict[str, Any] | None = None) -> Config:
    data = {"sequence_length": 64, "sources": [source or CODE], "eval": held_out or {}}
    raw = {
        "run": {"name": "x"},
        "model": {"name": "qwen3-0.6b"},
        "tokenizer": {"path": "t"},
        "data": data,
        "train": {"steps": 1},
    }
    return parse_config(raw, "a.yaml")


REFUSED = [
    ({"format": "chat", "fim": {}}, "data.sources.0: fim is for formats code and text"),
    ({"format": "chat", "group_by": "repository"}, "data.sources.0: group_by: only for format code, not for chat"),
    (
        {"format": "text", "metadata": True, "group_by": "repository"},
        "group_by and metadata: only for format code, not for text",
    ),
    ({"loss": "all"}, "data.sources.0: loss is for format chat"),
    ({"loss": "assistant"}, "data.sources.0: loss is for format chat"),
    ({"format": "text", "loss": "last_turn"}, "data.sources.0: loss is for format chat"),
    ({"format": "issues", "fim": {}}, "data.sources.0: fim is for formats code and text, not for issues"),
    ({"format": "issues", "layout": "script"}, "data.sources.0: layout script: format issues has auto"),
    ({"overlong": "window"}, "data.sources.0: overlong: window is for format chat, not for code"),
    ({"failed_steps": "mask"}, "data.sources.0: failed_steps is for format chat, not for code"),
    ({"context": "window"}, "data.sources.0: context is for formats of changes, not for code"),
    ({"format": "git", "layout": "diffs", "context": "window"}, "context is for layout commits, not for diffs"),
    ({"format": "git", "layout": "edits", "context": "window"}, "context is for layout commits, not for edits"),
    ({"format": "commits", "fields": {"text": "a"}}, "format commits has after, before, language, message"),
    ({"path": "s3://key:secret@bucket/a"}, "data.sources.0.path: the address holds a user, key or token"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED)
def test_a_field_that_the_format_does_not_know_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config({**CODE, **fields})
    assert said in str(raised.value)


ACCEPTED = [
    {"group_by": "repository", "metadata": True, "fim": {"level": "document"}},
    {"format": "text", "fim": {}},
    {"format": "chat", "loss": "last_turn"},
    {"format": "chat", "group_by": "file", "metadata": False},
    {"format": "commits", "context": "window", "fields": {"before": "a"}},
    {"format": "git", "context": "window"},
    {"format": "git", "layout": "commits", "context": "window"},
    {"format": "notebooks", "layout": "script"},
]


@pytest.mark.parametrize("fields", ACCEPTED)
def test_what_was_written_down_reads_back(fields: dict[str, Any]) -> None:
    made = config({**CODE, **fields})
    assert parse_config_json(dump_config_json(made)) == made
    assert ('"loss": "' in dump_config_json(made).replace('"loss": "all"', "")) == (fields.get("format") == "chat")


def test_a_share_is_held_out_unless_files_are_named() -> None:
    assert config().data.eval.fraction == 0.01
    own = config(held_out={"sources": [CODE]})
    assert own.data.eval.fraction == 0.0
    assert parse_config_json(dump_config_json(own)) == own
    assert flatten_config(own)["data.eval.sources.0.path"][1] == "a"


BOTH = [
    ({"fraction": 0.1}, "fraction chooses among the training documents"),
    ({"fraction": 0.01}, "fraction chooses among the training documents"),
    ({"split_by": "repository"}, "split_by chooses among the training documents"),
]


@pytest.mark.parametrize(("fields", "said"), BOTH)
def test_a_share_and_files_of_ones_own_exclude_each_other(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml: data\.eval: ") as raised:
        config(held_out={"sources": [CODE], **fields})
    assert said in str(raised.value)


def test_what_is_held_out_is_not_rearranged() -> None:
    with pytest.raises(ConfigError, match="held-out documents are not rearranged"):
        config(held_out={"sources": [{**CODE, "fim": {}}]})


@pytest.mark.parametrize(
    ("sources", "train", "said"),
    [
        (
            [{**CODE, "weight": 1.0}, CODE],
            {"steps": 1},
            "a weight for every one or for none; a has none",
        ),
        ([{**CODE, "weight": 1.0}], {"epochs": 1}, "train.epochs has no meaning where sources have weights"),
        ([{**CODE, "weight": 0.0}], {"steps": 1}, "data.sources.0.weight = 0.0: expected a number above 0"),
    ],
)
def test_weights_go_together_and_not_with_epochs(
    sources: list[dict[str, Any]], train: dict[str, int], said: str
) -> None:
    raw = {
        "run": {"name": "x"},
        "model": {"name": "qwen3-0.6b"},
        "tokenizer": {"path": "t"},
        "data": {"sequence_length": 64, "sources": sources},
        "train": train,
    }
    with pytest.raises(ConfigError) as raised:
        parse_config(raw, "a.yaml")
    assert said in str(raised.value)


def test_held_out_documents_have_no_weight() -> None:
    with pytest.raises(ConfigError, match="every held-out document is evaluated once; remove weight"):
        config(held_out={"sources": [{**CODE, "weight": 1.0}]})
