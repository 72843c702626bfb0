"""Object store in memory that answers the calls of boto3's client, with the clock of a simulation.

Like S3: strongly consistent, conditional writes by If-None-Match and If-Match, an ETag that is the content's MD5.
"""

# ruff: noqa: ARG002, N803 - the arguments are boto3's

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError, EndpointConnectionError  # type: ignore[import-untyped]

from simulation import SimulatedThread, Simulation, T, find_thread

_BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class StoredObject:
    """A version of an object."""

    body: bytes
    written: float

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.body, usedforsecurity=False).hexdigest()}"'


Watch = Callable[[SimulatedThread, str, StoredObject | None], None]


class StoreInMemory:
    """The store, and boto3's client for it. `on_read` and `on_write` see each request of a simulated thread that works.

    `on_write` also gets the version before.
    """

    def __init__(
        self, simulation: Simulation, on_read: Callable[[SimulatedThread, str], None], on_write: Watch
    ) -> None:
        self.objects: dict[str, StoredObject] = {}
        self.error: Exception | None = None  # raised by each request
        self._simulation, self._on_read, self._on_write = simulation, on_read, on_write

    def put_object(
        self, Bucket: str, Key: str, Body: bytes, IfNoneMatch: str | None = None, IfMatch: str | None = None
    ) -> dict[str, str]:
        def put() -> dict[str, str]:
            before = self.objects.get(Key)
            if IfMatch is not None and before is None:
                raise _build_error("NoSuchKey", 404)
            if (IfNoneMatch and before is not None) or (IfMatch and before is not None and before.etag != IfMatch):
                raise _build_error("PreconditionFailed", 412)
            self.objects[Key] = StoredObject(bytes(Body), self._simulation.now)
            if thread := find_thread():
                self._on_write(thread, Key, before)
            return {"ETag": self.objects[Key].etag}

        return self._request(put)

    def upload_file(
        self, path: str, bucket: str, key: str, Callback: Callable[[int], None] | None, Config: object
    ) -> None:
        self.put_object(bucket, key, Path(path).read_bytes())

    def head_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        found = self.objects.get(Key)
        if found is None:
            raise _build_error("404", 404)
        return {"ContentLength": len(found.body), "ETag": found.etag}

    def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        def get() -> dict[str, Any]:
            if thread := find_thread():
                self._on_read(thread, Key)
            if Key not in self.objects:
                raise _build_error("NoSuchKey", 404)
            return {"Body": io.BytesIO(self.objects[Key].body), "ETag": self.objects[Key].etag}

        return self._request(get)

    def download_file(self, bucket: str, key: str, path: str, Config: object) -> None:
        Path(path).write_bytes(self.get_object(bucket, key)["Body"].read())

    def delete_objects(self, Bucket: str, Delete: Mapping[str, Any]) -> dict[str, Any]:
        def delete() -> dict[str, Any]:
            for entry in Delete["Objects"]:
                self.objects.pop(entry["Key"], None)
            return {}

        return self._request(delete)

    def list_multipart_uploads(self, Bucket: str, Prefix: str) -> dict[str, Any]:
        return {}

    def get_paginator(self, operation: str) -> StoreInMemory:
        assert operation == "list_objects_v2"
        return self

    def paginate(self, Bucket: str, Prefix: str) -> Iterator[dict[str, Any]]:
        def list_page() -> dict[str, Any]:
            date = format_datetime(_BEGAN + timedelta(seconds=self._simulation.now), usegmt=True)
            contents = [
                {
                    "Key": key,
                    "Size": len(found.body),
                    "ETag": found.etag,
                    "LastModified": _BEGAN + timedelta(seconds=int(found.written)),
                }
                for key, found in sorted(self.objects.items())
                if key.startswith(Prefix)
            ]
            if thread := find_thread():
                self._on_read(thread, Prefix)
            return {"Contents": contents, "ResponseMetadata": {"HTTPHeaders": {"date": date}}}

        yield self._request(list_page)

    def _request(self, answer: Callable[[], T]) -> T:
        if self.error is not None:
            raise self.error
        return self._simulation.request(answer, lambda: EndpointConnectionError(endpoint_url="http://store"))


def _build_error(code: str, status: int) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "request")
