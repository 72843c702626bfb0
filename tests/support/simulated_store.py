"""A store of the S3 protocol in memory, and processes that take turns at it: one request, then perhaps another's.

It takes the place of boto3's client below `S3Client`, with a clock of its own. A process is a thread that stops before
each request until it is told to go on, so that a test chooses every interleaving, and a death at every request.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from botocore.exceptions import ClientError  # type: ignore[import-untyped]

from llm_training_toolkit.runs.storage.s3_client import S3Client

_CLOCK_ERRORS = (0, 2, -2)  # seconds between the clocks of the store's machines, which answer in turn
_PATIENCE_SECONDS = 60.0
_running = threading.local()


class Killed(BaseException):
    """Death of a simulated process: nothing catches it."""


class StoredObject(NamedTuple):
    """Version of an object."""

    body: bytes
    etag: str
    written: float
    """Seconds of the store's clock."""


class Write(NamedTuple):
    """A write or deletion that has been done."""

    process: SimulatedProcess | None
    key: str
    body: bytes | None
    """None: deleted."""


class SimulatedProcess:
    """Thread that goes on only when told, until its next request."""

    def __init__(self, name: str, script: Callable[[], None]) -> None:
        self.name = name
        self.is_alive = True
        self.error: BaseException | None = None
        self._script, self._is_killed, self._left = script, False, 0
        self._go, self._paused = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._paused.acquire()
        threading.Thread(target=self._run, daemon=True, name=name).start()

    def advance(self, requests: int = 1) -> None:
        """Let it do so many requests, and what follows up to the next one."""
        self._left = requests
        self._go.release()
        assert self._paused.acquire(timeout=_PATIENCE_SECONDS), f"{self.name} neither asks nor ends"

    def kill(self) -> None:
        """End it before its next request."""
        self._is_killed = True
        while self.is_alive:  # again at each request of its clean-up
            self.advance()

    def wait_for_turn(self) -> None:
        """Stop its thread before a request, unless it has been told to do more."""
        if self._is_killed:
            raise Killed
        if self._left == 0:
            self._pause()
        self._left -= 1

    def _pause(self) -> None:
        self._paused.release()
        self._go.acquire()
        if self._is_killed:
            raise Killed

    def _run(self) -> None:
        _running.process = self
        self._go.acquire()
        try:
            if not self._is_killed:
                self._script()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error
        self.is_alive = False
        self._paused.release()


def find_process() -> SimulatedProcess | None:
    """Return the process of this thread; None in the test's own."""
    found: SimulatedProcess | None = getattr(_running, "process", None)
    return found


@dataclass(frozen=True)
class _Page:
    """One page of a listing, which is all of it."""

    store: SimulatedStore

    def paginate(self, *, Bucket: str, Prefix: str) -> Iterator[dict[str, Any]]:  # noqa: ARG002, N803
        """As boto3."""
        self.store.take_turn()
        yield self.store.list_page(Prefix)


class SimulatedStore:
    """Objects of one bucket, by key."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.objects: dict[str, StoredObject] = {}
        self.on_write: Callable[[Write], None] = lambda _write: None
        self.on_list: Callable[[SimulatedProcess | None, str], None] = lambda _process, _prefix: None
        self._answers = 0

    def connect(self, client: S3Client) -> S3Client:
        """Return a copy of the client that talks to this store."""
        connected = copy.copy(client)
        connected._boto_client = self
        return connected

    def take_turn(self) -> None:
        """Wait until the process of this thread is told to go on; the test itself need not wait."""
        if (process := find_process()) is not None:
            process.wait_for_turn()

    def list_page(self, prefix: str) -> dict[str, Any]:
        """Return the objects whose keys begin so, with a date that is off by as much as clocks are."""
        self._answers += 1
        now = datetime.fromtimestamp(self.now + _CLOCK_ERRORS[self._answers % len(_CLOCK_ERRORS)], UTC)
        self.on_list(find_process(), prefix)
        return {
            "ResponseMetadata": {"HTTPHeaders": {"date": format_datetime(now, usegmt=True)}},
            "Contents": [
                {
                    "Key": key,
                    "Size": len(found.body),
                    "ETag": found.etag,
                    "LastModified": datetime.fromtimestamp(int(found.written), UTC),
                }
                for key, found in sorted(self.objects.items())
                if key.startswith(prefix)
            ],
        }

    def get_paginator(self, _name: str) -> _Page:
        """As boto3."""
        return _Page(self)

    def put_object(self, *, Bucket: str, Key: str, Body: bytes, **conditions: str) -> dict[str, str]:  # noqa: ARG002, N803
        """As boto3, with IfMatch and IfNoneMatch."""
        self.take_turn()
        found = self.objects.get(Key)
        if conditions.get("IfNoneMatch") == "*" and found is not None:
            raise _build_error("PreconditionFailed", 412)
        if "IfMatch" in conditions:
            if found is None:
                raise _build_error("NoSuchKey", 404)
            if found.etag != conditions["IfMatch"]:
                raise _build_error("PreconditionFailed", 412)
        return {"ETag": self._store(Key, Body)}

    def get_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:  # noqa: ARG002, N803
        """As boto3."""
        self.take_turn()
        if (found := self.objects.get(Key)) is None:
            raise _build_error("NoSuchKey", 404)
        return {"Body": BytesIO(found.body), "ETag": found.etag}

    def delete_objects(self, *, Bucket: str, Delete: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002, N803
        """As boto3."""
        self.take_turn()
        self.remove(entry["Key"] for entry in Delete["Objects"])
        return {}

    def upload_file(self, path: str, bucket: str, key: str, **_options: object) -> None:  # noqa: ARG002
        """As boto3."""
        self.take_turn()
        self._store(key, Path(path).read_bytes())

    def head_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:  # noqa: ARG002, N803
        """As boto3."""
        self.take_turn()
        if (found := self.objects.get(Key)) is None:
            raise _build_error("404", 404)
        return {"ContentLength": len(found.body), "ETag": found.etag}

    def remove(self, keys: Iterable[str]) -> None:
        """Delete objects; absent ones are ignored."""
        for key in list(keys):
            if self.objects.pop(key, None) is not None:
                self.on_write(Write(find_process(), key, None))

    def _store(self, key: str, body: bytes) -> str:
        self._answers += 1
        self.on_write(Write(find_process(), key, body))
        self.objects[key] = StoredObject(body, f'"{self._answers}"', self.now)
        return self.objects[key].etag


def _build_error(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "")
