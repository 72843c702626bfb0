"""Documents behind a signed address: read, and the signature stays in nobody's files or errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llm_training_toolkit.config import SourceConfig
from llm_training_toolkit.data.sources.find import fingerprint_sources, list_source_files
from llm_training_toolkit.data.sources.read import read_source_documents
from llm_training_toolkit.errors import DataError

pytest.importorskip("aiohttp")
SIGNATURE = "X-Amz-Signature=S3CR3T"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_signed_file_is_read_under_its_plain_name(served: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    source = SourceConfig(path=f"{served}/a.jsonl?{SIGNATURE}", format="text")
    [file] = list_source_files(source)
    assert (file.name, file.display_path) == ("a.jsonl", f"{served}/a.jsonl")
    [document] = read_source_documents(source, 0)
    assert (document.name, document.text) == ("a.jsonl:1", "one")
    other = source.model_copy(update={"path": f"{served}/a.jsonl?X-Amz-Signature=another"})
    assert fingerprint_sources([source]) == fingerprint_sources([other])


def test_errors_name_the_address_without_its_signature(served: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("no record\n")
    for name in ("a.jsonl", "absent.jsonl"):
        with pytest.raises(DataError, match=rf"{name[:-6]}\.jsonl") as caught:
            list(read_source_documents(SourceConfig(path=f"{served}/{name}?{SIGNATURE}", format="text"), 0))
        assert "S3CR3T" not in str(caught.value)
