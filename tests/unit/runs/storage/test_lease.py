"""One holder at a time of a run in a bucket; the dead are found out, the living are not robbed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.runs.storage import lease as claim
from llm_training_toolkit.runs.storage.lease import acquire_lease, hold_lease, is_lease_held
from llm_training_toolkit.runs.storage.s3_client import S3Client, StorageError
from s3_server import silent

pytestmark = pytest.mark.slow
_HOLD = """
import sys, time
from llm_training_toolkit.runs.storage.s3_client import S3Client
from llm_training_toolkit.runs.storage.lease import hold_lease
with hold_lease(S3Client(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


def elsewhere(bucket: S3Client, number: int) -> None:
    """A claim of a process of another machine."""
    record = {"holder": "process 7 on other", "process": "boot/pid/7@1", "token": "t"}
    assert bucket.put_object_if_absent(f"claims/{number:06d}", json.dumps(record).encode())


def test_a_claim_ends_with_its_block_and_the_next_one_has_the_next_number(bucket: str) -> None:
    store = S3Client(bucket)
    assert not is_lease_held(store)
    for number in (1, 2, 3):
        with hold_lease(store, silent):
            assert is_lease_held(store)
            assert list(store.list_objects("claims/")) == [f"claims/{number:06d}"]
        assert not is_lease_held(store)


def test_a_living_holder_is_told_from_a_dead_one(bucket: str) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLD, bucket], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        said: list[str] = []
        with (
            pytest.raises(LaunchError, match=rf"already running \(process {holder.pid} on"),
            hold_lease(S3Client(bucket), said.append),
        ):
            pass
        assert "waiting" in said[0]
        holder.kill()
        holder.wait()
    began = time.monotonic()
    with hold_lease(S3Client(bucket), silent):
        assert time.monotonic() - began < 30, "its process is known to be gone"


def test_a_holder_on_another_machine_is_dead_when_its_claim_expires(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = S3Client(bucket)
    elsewhere(store, 1)
    assert is_lease_held(store)
    monkeypatch.setattr(claim, "EXPIRES_AFTER", 2.0)
    with hold_lease(store, silent):
        assert list(store.list_objects("claims/")) == ["claims/000002"]


def test_a_holder_that_was_taken_over_learns_it(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "RENEWED_EVERY", 0.1)
    store, said = S3Client(bucket), threading.Event()
    with hold_lease(store, lambda _text: said.set()):
        assert not said.wait(0.5)
        elsewhere(store, 2)
        assert said.wait(10)


def test_a_holder_whose_run_was_removed_and_begun_anew_leaves_the_new_claim(bucket: str) -> None:
    store = S3Client(bucket)
    old = acquire_lease(store, silent)
    assert old.renew()
    store.delete_objects(store.list_objects())
    assert not old.renew()
    assert not store.list_objects()
    elsewhere(store, 1)
    assert not old.renew()
    old.release()
    assert is_lease_held(store)


class _Forgetful(BaseHTTPRequestHandler):
    """A store that writes whatever the conditions of a request are."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("ETag", '"one"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        body = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
        if "claims" not in self.path:
            self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        """Nobody reads it."""


def test_a_store_without_conditional_writes_is_refused(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Forgetful)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    try:
        with pytest.raises(LaunchError, match="ignores conditional writes"), hold_lease(S3Client(bucket), silent):
            pass
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "Could not connect"),
        ("BUCKET", "s3://no-such-bucket/run", "NoSuchBucket"),
    ],
)
def test_a_store_that_cannot_be_had_is_said_with_what_to_check(
    bucket: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    address = value if name == "BUCKET" else bucket
    with (
        pytest.raises(StorageError, match=rf"{address}: .*{said}.*AWS_ACCESS_KEY_ID"),
        hold_lease(S3Client(address), silent),
    ):
        pass
