"""Addresses: a real S3 server on this machine, a server that speaks the hub's protocol, and a store of fsspec."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import fsspec  # type: ignore[import-untyped]
import httpx2
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import NoCredentialsError  # type: ignore[import-untyped]
from moto.server import ThreadedMotoServer

from hub_server import hub
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.prepare.builder import prepare_dataset
from llm_training_toolkit.data.sources import Document, fingerprint_sources, list_source_files, read_source_documents
from llm_training_toolkit.data.sources.remote import translate_remote_errors
from llm_training_toolkit.data.tokenizer import TokenizationSpec
from llm_training_toolkit.errors import DataError

Put = Callable[[str, bytes], None]
LINES = b'{"text": "one"}\n{"text": "two"}\n'


def source(path: str, form: str = "text", **more: Any) -> SourceConfig:
    return SourceConfig.model_validate({"path": path, "format": form, **more})


def read(path: str, form: str = "text", **more: Any) -> list[Document]:
    return list(read_source_documents(source(path, form, **more), 0))


def parquet(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"{host}:{port}"
    moto.stop()


@pytest.fixture
def put(server: str, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Write an object into the bucket `data`, which the toolkit finds by the usual environment variables."""
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{server}",
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    store = pyarrow.fs.S3FileSystem(endpoint_override=server, scheme="http", allow_bucket_creation=True)
    store.create_dir("data")
    store.delete_dir_contents("data")

    def write(key: str, content: bytes) -> None:
        with store.open_output_stream(f"data/{key}", compression=None) as stream:
            stream.write(content)

    return write


def test_objects_by_name_by_glob_and_by_prefix(put: Put) -> None:
    put("chats/b.jsonl", LINES)
    put("chats/a.jsonl.gz", gzip.compress(b'{"text": "zero"}\n'))
    put("chats/deep/er/c.parquet", parquet(text=["three"], junk=[0]))
    put("chats/deep/.hidden/d.jsonl", LINES)
    put("chats/odd name [1].jsonl", b'{"text": "odd"}\n')
    assert [d.text for d in read("s3://data/chats/b.jsonl")] == ["one", "two"]
    assert [d.name for d in read("s3://data/chats/*.jsonl")] == ["b.jsonl:1", "b.jsonl:2", "odd name [1].jsonl:1"]
    assert [d.text for d in read("s3://data/chats/odd name [1].jsonl")] == ["odd"]
    assert [file.name for file in list_source_files(source("s3://data/chats/**/*.parquet"))] == ["deep/er/c.parquet"]
    assert [d.text for d in read("s3://data/chats/")] == ["zero", "one", "two", "three", "odd"]
    assert [d.text for d in read("s3://data/chats/?.jsonl?region=us-east-1")] == ["one", "two"]


def test_a_tree_of_code_in_a_bucket(put: Put) -> None:
    names = ("app/.git/HEAD", "app/x.py", "app/node_modules/y.js", "app/env/pyvenv.cfg", "app/env/z.py", "w.py")
    for name in names:
        put(f"all/{name}", f"# {name}\n".encode())
    found = {d.name: (d.repository, d.path) for d in read("s3://data/all", "code")}
    assert found == {"app/x.py": ("app", "x.py"), "w.py": ("all", "w.py")}
    assert [d.name for d in read("s3://data/all", "code", group_by="repository")] == ["all", "app"]


def test_the_fingerprint_sees_a_changed_object(put: Put) -> None:
    put("x/a.jsonl", LINES)
    before = fingerprint_sources([source("s3://data/x")])
    assert fingerprint_sources([source("s3://data/x")]) == before
    put("x/a.jsonl", LINES + LINES)
    assert fingerprint_sources([source("s3://data/x")]) != before


@pytest.mark.parametrize("address", ["s3://data/none.jsonl", "s3://data/none/", "s3://no-bucket/x", "s3://data/*.none"])
def test_an_address_without_objects_repeats_it_and_says_what_to_check(put: Put, address: str) -> None:
    with pytest.raises(DataError, match=r"matches no file.*AWS_ACCESS_KEY_ID") as raised:
        read(address)
    assert address in str(raised.value)


def test_what_is_cut_off_in_a_bucket_is_named(put: Put) -> None:
    put("cut.parquet", parquet(text=["a"])[:-10])
    put("cut.jsonl.gz", gzip.compress(LINES * 1000)[:-20])
    with pytest.raises(DataError, match=r"s3://data/cut\.parquet: is damaged"):
        read("s3://data/cut.parquet")
    with pytest.raises(DataError, match=r"s3://data/cut\.jsonl\.gz:\d+: is damaged"):
        read("s3://data/cut.jsonl.gz")


@pytest.mark.slow
def test_a_store_that_stops_answering_ends_the_reading_even_where_errors_are_skipped(
    put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("a.jsonl", LINES)
    (file,) = list_source_files(source("s3://data/a.jsonl"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"s3://data/a\.jsonl cannot be read .*AWS_ENDPOINT_URL"):
        list(read_source_documents(source("s3://data/a.jsonl"), 0, on_error="skip"))
    assert file.display_path == "s3://data/a.jsonl"


def test_an_object_that_is_gone_in_the_middle_is_no_damaged_record(put: Put) -> None:
    for name in "ab":
        put(f"gone/{name}.jsonl", b'{"text": "%s"}\n' % name.encode())
    reading = read_source_documents(source("s3://data/gone/*.jsonl"), 0, on_error="skip")
    assert next(reading).text == "a"
    pyarrow.fs.S3FileSystem(
        endpoint_override=os.environ["AWS_ENDPOINT_URL"].removeprefix("http://"), scheme="http"
    ).delete_file("data/gone/b.jsonl")
    with pytest.raises(DataError, match=r"s3://data/gone/b\.jsonl cannot be read"):
        next(reading)


def test_a_run_is_prepared_from_a_bucket_as_from_a_disk(
    put: Put, configure: Callable[..., Config], markers: TokenizationSpec, corpus: Path, tmp_path: Path
) -> None:
    for path in corpus.iterdir():
        put(f"corpus/{path.name}", path.read_bytes())
    local, remote = (
        prepare_dataset(configure(sources=[{"path": path, "format": "code"}]), markers)
        for path in (str(corpus), "s3://data/corpus")
    )
    for part in ("tokens", "held_out"):
        for name in ("tokens-00000.arrow", "examples.arrow"):
            assert (local.directory / part / name).read_bytes() == (remote.directory / part / name).read_bytes()


def test_a_data_set_of_the_hub() -> None:
    content = {"README.md": b"# data", "data/a.jsonl": LINES, "data/b.parquet": parquet(text=["three"], x=[1])}
    script = """
import json, sys
from llm_training_toolkit.config.data_config import SourceConfig
from llm_training_toolkit.data.sources import read_source_documents, list_source_files
from llm_training_toolkit.data.sources.remote import translate_remote_errors
from llm_training_toolkit.errors import DataError
said = []
for path in sys.argv[1:]:
    source = SourceConfig(path=path, format="text")
    try:
        read = [[d.name, d.text] for d in read_source_documents(source, 0)]
        said.append(read + [f.version_stamp for f in list_source_files(source)])
    except DataError as error:
        said.append(str(error))
print(json.dumps(said))
"""
    base = "hf://datasets/me/set"
    paths = [base, f"{base}/data/*.jsonl", f"{base}/data/b.parquet", "hf://datasets/me/other"]
    with hub("me/set", content) as endpoint:
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", script, *paths], env=environment, capture_output=True, text=True, check=True
        )
    whole, by_glob, one, absent = json.loads(done.stdout)
    lines = [["data/a.jsonl:1", "one"], ["data/a.jsonl:2", "two"]]
    assert whole[:4] == [["README.md", "# data"], *lines, ["data/b.parquet:1", "three"]]
    assert [name for name, _ in by_glob[:2]] == ["a.jsonl:1", "a.jsonl:2"]
    assert one[0] == ["b.parquet:1", "three"]
    assert all("\0" in version and len(version) > 40 for version in whole[4:])  # size, and the hash of the content
    assert "matches no file" in absent
    assert "HF_TOKEN" in absent


def test_other_protocols_go_through_fsspec() -> None:
    store = fsspec.filesystem("memory")
    store.pipe({"/box/a.jsonl": LINES, "/box/b/c.txt": b"whole"})
    assert [d.text for d in read("memory://box")] == ["one", "two", "whole"]
    assert [d.name for d in read("memory://box/**/*.txt")] == ["b/c.txt"]
    before = fingerprint_sources([source("memory://box")])
    store.pipe({"/box/a.jsonl": LINES[::-1]})
    assert fingerprint_sources([source("memory://box")]) != before


@pytest.mark.parametrize(
    "raised",
    [aiohttp.ServerDisconnectedError(), httpx2.ConnectError("no route"), NoCredentialsError(), OSError(5, "x")],
)
def test_what_the_library_of_a_protocol_raises_names_the_address(raised: Exception) -> None:
    with pytest.raises(DataError, match=r"https://x/y cannot be read"), translate_remote_errors("https://x/y"):
        raise raised


def test_a_mistake_of_ours_is_not_blamed_on_the_store() -> None:
    with pytest.raises(AttributeError), translate_remote_errors("https://x/y"):
        raise AttributeError("no such thing")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nothing://x/y", "Protocol not known"),
        ("gs:///x", "separator"),
        ("github://x/y", "missing"),
        ("abfs://x/y", "Install adlfs"),
    ],
)
def test_an_address_that_is_none_is_an_error_in_words(address: str, said: str) -> None:
    with pytest.raises(DataError, match=rf"data\.sources: {address} cannot be read .*{said}.* Check") as raised:
        read(address)
    assert len(str(raised.value)) < 600
