"""Data sets by hub id: a server on this machine that speaks the hub's protocol, its cache, and no network at all."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub_server import hub
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.sources.hub import is_hub_id

_SCRIPT = """
import json, sys
from llm_training_toolkit.config.data_config import SourceConfig
from llm_training_toolkit.data.sources import fingerprint_sources, read_source_documents
from llm_training_toolkit.errors import DataError
for values in json.loads(sys.argv[1]):
    source = SourceConfig.model_validate({"format": "text", **values})
    try:
        found = [[d.name, d.text] for d in read_source_documents(source, 0)]
        print(json.dumps([*found, fingerprint_sources([source])]))
    except DataError as error:
        print(json.dumps(str(error)))
"""
README = b"""---
license: mit
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: socratic
  data_files:
  - {split: train, path: [socratic/*.parquet]}
---
# A data set
"""


def parquet(*texts: str) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), buffer)
    return buffer.getvalue()


def ask(endpoint: str, home: Path, *sources: dict[str, Any], **more: str) -> list[Any]:
    """What reading some sources gives, in a process of its own: the hub's library reads the environment once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path), **more}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps(sources)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_data_set_is_read_by_its_id_and_again_without_a_network(tmp_path: Path) -> None:
    name = "data/train-00000-of-00001-abc.parquet"
    asked: list[str] = []
    with hub("me/set", {"README.md": b"# data", name: parquet("one", "two")}, asked=asked) as endpoint:
        (read,) = ask(endpoint, tmp_path, {"path": "me/set"})
    assert read[:2] == [[f"{name}:1", "one"], [f"{name}:2", "two"]]
    assert sorted(asked) == ["README.md", name]
    assert ask(endpoint, tmp_path, {"path": "me/set", "split": "train"}, HF_HUB_OFFLINE="1") == [read]


def test_subsets_and_splits_of_a_readme(tmp_path: Path) -> None:
    content = {
        "README.md": README,
        "main/train-00000-of-00001.parquet": parquet("a"),
        "main/test-00000-of-00001.parquet": parquet("b"),
        "socratic/train.parquet": parquet("c"),
    }
    with hub("me/set", content) as endpoint:
        which, split, main, socratic, wrong = ask(
            endpoint,
            tmp_path,
            {"path": "me/set"},
            {"path": "me/set", "subset": "main"},
            {"path": "me/set", "subset": "main", "split": "test"},
            {"path": "me/set", "subset": "socratic"},
            {"path": "me/set", "subset": "man"},
        )
    assert "has the subsets main, socratic: say which one, as in subset: main" in which
    assert "has the splits train, test: say which one, as in split: train" in split
    assert main[0] == ["main/test-00000-of-00001.parquet:1", "b"]
    assert socratic[0] == ["socratic/train.parquet:1", "c"]
    assert "no subset 'man'. Did you mean subset: main?" in wrong


def test_splits_by_name_and_json_lines(tmp_path: Path) -> None:
    content = {"train.jsonl": b'{"text": "a"}\n', "test.jsonl": b'{"text": "b"}\n', "notes.csv": b"x"}
    with hub("me/set", content) as endpoint:
        which, test = ask(endpoint, tmp_path, {"path": "me/set"}, {"path": "me/set", "split": "test"})
    assert "say which one, as in split: train" in which
    assert test[0] == ["test.jsonl:1", "b"]
    with hub("me/other", {"a.csv": b"x"}) as endpoint:
        (said,) = ask(endpoint, tmp_path, {"path": "me/other"})
    assert "has no .arrow, .feather, .json" in said
    assert ".csv" in said


def test_what_the_hub_does_not_give_is_said(tmp_path: Path) -> None:
    with hub("me/set", {"train.jsonl": b'{"text": "a"}\n'}, token="right") as endpoint:
        gated, absent = ask(endpoint, tmp_path, {"path": "me/set"}, {"path": "me/nothing"}, HF_TOKEN="wrong")
        (read,) = ask(endpoint, tmp_path, {"path": "me/set"}, HF_TOKEN="right")
    assert "is gated: accept its conditions" in gated
    assert "HF_TOKEN" in gated
    assert "gated" in absent or "shows no data set of this name" in absent
    assert read[0] == ["train.jsonl:1", "a"]
    with hub("me/set", {"train.jsonl": b"{}"}) as endpoint:
        (absent,) = ask(endpoint, tmp_path / "b", {"path": "me/sett"})
    assert "is no path here" in absent
    assert "the hub shows no data set of this name" in absent


def test_without_a_network_nothing_hangs(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"  # nobody listens there
        begun = time.monotonic()
        (refused,) = ask(endpoint, tmp_path, {"path": "me/set"})
        (offline,) = ask(endpoint, tmp_path, {"path": "me/set"}, HF_HUB_OFFLINE="1")
    assert time.monotonic() - begun < 60
    assert "cannot be reached" in refused
    assert "offline mode is on" in offline


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("tatsu-lab/alpaca", True),
        ("openai/gsm8k@main", True),
        ("data/train.jsonl", False),
        ("data/train.jsonl.gz", False),
        ("src/main.py", False),
        ("one", False),
        ("a/b/c", False),
        ("a/*", False),
        ("./a/b", False),
        ("~/a", False),
    ],
)
def test_what_counts_as_an_id(path: str, expected: bool) -> None:
    assert is_hub_id(path) is expected


def test_a_directory_here_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "me" / "set").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("me/set")
    assert SourceConfig(path="me/set", format="text").path == "me/set"
