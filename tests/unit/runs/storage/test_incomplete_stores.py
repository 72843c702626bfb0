"""Stores that lack a part of the S3 protocol end in words, after a few tries, or are read all the same."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from llm_training_toolkit.runs.storage import s3_client
from llm_training_toolkit.runs.storage.lease import acquire_lease
from llm_training_toolkit.runs.storage.s3_client import S3Client, StorageError
from llm_training_toolkit.runs.storage.s3_storage import S3Storage
from s3_server import silent

pytestmark = pytest.mark.slow  # boto3

ATTEMPT = "attempts/0001.json"


class _Store(BaseHTTPRequestHandler):
    """A store of the bucket `bucket` that refuses If-Match, and lists other ETags than it answers with."""

    protocol_version = "HTTP/1.1"  # answers "Expect: 100-continue", for which the client would wait a second
    objects: dict[str, bytes]
    refusal: tuple[int, str]
    requests: list[str]

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("ETag", '"answered"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        conditional = "If-Match" in self.headers
        self.requests.append("PUT over a version" if conditional else "PUT")
        if conditional:
            status, code = self.refusal
            self._answer(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())
            return
        self.objects[urlsplit(self.path).path] = body
        self._answer(200)

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if "list-type" not in address.query:
            self._answer(200, self.objects[address.path])
            return
        self.requests.append("LIST")
        prefix = parse_qs(address.query).get("prefix", [""])[0]
        found = [path.removeprefix("/bucket/") for path in self.objects]
        entries = "".join(
            f"<Contents><Key>{key}</Key><Size>1</Size><ETag>listed</ETag>"
            "<LastModified>2026-12-01T00:00:00Z</LastModified></Contents>"
            for key in found
            if key.startswith(prefix)
        )
        listing = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        self._answer(200, listing.encode())

    def log_message(self, *_arguments: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Store]]:
    class Fresh(_Store):
        objects, requests, refusal = {}, [], (412, "PreconditionFailed")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {"ENDPOINT_URL": address, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "c"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(s3_client, "_CONDITIONAL_INTERVAL", 0.0)
    yield Fresh
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("refusal", "said", "tries"),
    [
        ((412, "PreconditionFailed"), "refuses If-Match with its own ETag", 5),
        ((409, "ConditionalRequestConflict"), "refuses If-Match with its own ETag", 5),
        ((501, "NotImplemented"), r"no conditional writes \(If-Match\)", 1),
    ],
)
def test_a_store_that_refuses_each_write_over_a_version_ends_the_run_in_words(
    store: type[_Store], tmp_path: Path, refusal: tuple[int, str], said: str, tries: int
) -> None:
    store.refusal = refusal
    with pytest.raises(StorageError, match=f"{said}.*Set run.dir"):
        acquire_lease(S3Client("s3://bucket/run"), silent)
    assert store.requests.count("PUT over a version") == tries
    record = tmp_path / ATTEMPT
    record.parent.mkdir()
    storage = S3Storage(S3Client("s3://bucket/run"), tmp_path)
    record.write_text(json.dumps({"run_id": "one"}))
    storage.flush()
    record.write_text(json.dumps({"run_id": "one", "host": "a"}))
    with pytest.raises(StorageError, match=f"{said}.*Set run.dir"):
        storage.flush()
    assert store.requests.count("PUT over a version") == 2 * tries


def test_a_run_is_opened_though_listed_etags_are_others(store: type[_Store], tmp_path: Path) -> None:
    store.objects[f"/bucket/run/{ATTEMPT}"] = b'{"run_id": "one"}'
    storage = S3Storage(S3Client("s3://bucket/run"), tmp_path)
    storage.refresh_directory(tmp_path)
    assert json.loads((tmp_path / ATTEMPT).read_text()) == {"run_id": "one"}
    assert store.requests.count("LIST") == 3
