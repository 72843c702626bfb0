"""Addresses: what is secret in them is refused, or never stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.config import Config, diff_configs, dump_config_json, fingerprint, load_config, redact_config
from llm_training_toolkit.config.uri import has_userinfo, redact_text, redact_uri
from llm_training_toolkit.errors import ConfigError

SIGNED = "https://host/set/ok.jsonl?X-Amz-Signature=S3CR3T&x=1"


def load(folder: Path, changes: dict[str, Any]) -> Config:
    sections: dict[str, Any] = {
        "run": {"name": "one"},
        "model": {"name": "qwen3-0.6b"},
        "tokenizer": {"path": "/t"},
        "data": {"sequence_length": 64, "sources": [{"path": SIGNED, "format": "text"}]},
        "train": {"steps": 1, "global_batch_size": 1},
    }
    for key, value in changes.items():
        top, _, name = key.partition(".")
        sections.setdefault(top, {})[name] = value
    (folder / "a.yaml").write_text(json.dumps(sections))  # JSON is YAML
    return load_config(folder / "a.yaml")


@pytest.mark.parametrize(
    ("address", "redacted"),
    [
        (SIGNED, "https://host/set/ok.jsonl"),
        ("HTTPS://host/a#token", "HTTPS://host/a"),
        ("s3://bucket/part-?.jsonl", "s3://bucket/part-?.jsonl"),
        ("s3://bucket/a/*.jsonl?access_key=K&secret_key=S", "s3://bucket/a/*.jsonl"),
        ("gs://b/x?x-goog-signature=S&other=T", "gs://b/x"),
        ("s3://b/a?X-Amz%2DSignature=S", "s3://b/a"),
        ("s3://K:S@bucket/a", "s3://bucket/a"),
        ("hf://datasets/owner/name@rev/a", "hf://datasets/owner/name@rev/a"),
        ("/home/a?b=c", "/home/a?b=c"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
    ],
)
def test_redaction_leaves_the_address(address: str, redacted: str) -> None:
    assert redact_uri(address) == redacted
    assert redact_text(f"path: {address}, format: text") == f"path: {redacted}, format: text"
    assert redact_text(f"[{{path: {address}}}]") == f"[{{path: {redacted}}}]"


@given(st.text(max_size=40))
def test_redaction_is_final(text: str) -> None:
    assert redact_uri(redact_uri(f"s3://{text}")) == redact_uri(f"s3://{text}")
    assert redact_text(redact_text(text)) == redact_text(text)


@pytest.mark.parametrize(
    "key", ["run.dir", "model.path", "model.init_from", "tokenizer.path", "data.cache", "data.sources", "eval.tasks"]
)
@pytest.mark.parametrize("user", ["KEY:S3CR3T", "S3CR3T", ":S3CR3T"])
def test_userinfo_is_refused_wherever_an_address_may_stand(tmp_path: Path, key: str, user: str) -> None:
    address = f"s3://{user}@bucket/a"
    value: Any = {
        "data.sources": [{"path": address, "format": "text"}],
        "eval.tasks": [{"task": "perplexity", "data": address}],
    }.get(key, address)
    with pytest.raises(ConfigError, match=rf"{key}.*user, key or token") as caught:
        load(tmp_path, {key: value})
    assert "S3CR3T" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["run.dir", "model.path", "model.init_from", "tokenizer.path", "data.cache", "monitoring.mlflow"]
)
@pytest.mark.parametrize("query", ["?secret_key=S3CR3T", "?X-Amz-Signature=S3CR3T", "?S3CR3T", "#S3CR3T"])
def test_a_query_is_refused_where_no_document_is_read(tmp_path: Path, key: str, query: str) -> None:
    address = f"s3://bucket/a{query}"
    value: Any = {"tracking_uri": address, "experiment": "one"} if key == "monitoring.mlflow" else address
    with pytest.raises(ConfigError, match=rf"{key}.*a query or fragment, which may be a key") as caught:
        load(tmp_path, {key: value})
    assert "S3CR3T" not in str(caught.value)


@pytest.mark.parametrize("key", ["run.dir", "model.path", "tokenizer.path", "data.cache"])
def test_the_home_of_a_user_that_does_not_exist_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}.*~nobody-of-this-name is no home directory of this machine"):
        load(tmp_path, {key: "~nobody-of-this-name/a"})


def test_public_buckets_may_be_read_anonymously() -> None:
    assert not has_userinfo("gs://anonymous@bucket/a")
    assert not has_userinfo("abfs://container@account.dfs.core.windows.net/a")
    assert has_userinfo("s3://anonymous@bucket/a")


def test_a_new_signature_is_no_change_and_none_is_stored(tmp_path: Path) -> None:
    one, other = (
        load(tmp_path, {"data.sources": [{"path": SIGNED + more, "format": "text"}]}) for more in ("", "&again=1")
    )
    assert diff_configs(one, other) == []
    assert fingerprint(one) == fingerprint(other)
    assert one.data.sources[0].path == SIGNED, "what reads the documents needs it"
    task = load(tmp_path, {"eval.tasks": [{"task": "perplexity", "data": SIGNED}]})
    assert "S3CR3T" not in dump_config_json(redact_config(task))
    benchmarks = load(tmp_path, {"data.decontamination": {"paths": [SIGNED, "/home/a"]}})
    assert "S3CR3T" not in dump_config_json(redact_config(benchmarks))
