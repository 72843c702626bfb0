"""A prefix in an S3 bucket: objects by key, conditional creates, errors in words.

boto3, because pyarrow has no conditional writes and fsspec's s3fs pins a botocore of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

_ADDRESS = re.compile(r"s3://([^/?#]+)(?:/(.*))?")
_LONGEST_CAUSE = 300
_ATTEMPTS = 5
"""Times a request is tried, within some ten seconds where nobody answers at all."""
_LARGE = 32 << 20
"""Bytes from which a file goes and comes in parts, and of each of them: S3 takes 10,000 parts, 300 GB a file."""
_AT_ONCE = 4
"""Parts at a time: some hundred MB/s, and the training keeps its cores."""
_DELETED_AT_ONCE = 1000
"""S3's limit."""
HINT = (
    "Check the address, the network and the keys: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
    "AWS_REGION; AWS_ENDPOINT_URL for a store that is not Amazon's"
)


class StorageError(OSError):
    """An object store refuses, or does not answer."""


@dataclass(frozen=True)
class ObjectInfo:
    """An object as a listing shows it."""

    size: int
    etag: str
    """Of this version of it."""
    age: float
    """Seconds since it was written, by the store's own clock."""


class ObjectContent(NamedTuple):
    """An object that was fetched."""

    body: bytes
    etag: str
    """Of this version of it."""


class S3Client:
    """What lies below an address such as `s3://bucket/runs/name`. Safe to use from several threads."""

    def __init__(self, address: str) -> None:
        """Raises StorageError where the address names no bucket. Nothing is asked of the store yet."""
        import boto3  # noqa: PLC0415 - a third of a second, for those alone whose runs lie in a store
        from boto3.exceptions import Boto3Error  # noqa: PLC0415
        from boto3.s3.transfer import TransferConfig  # noqa: PLC0415
        from botocore.config import Config  # type: ignore[import-untyped]  # noqa: PLC0415
        from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]  # noqa: PLC0415

        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise StorageError(f"{address}: not an address in an S3 bucket, such as s3://bucket/runs")
        self.address = address.rstrip("/")
        self._name, self._prefix = match[1], (match[2] or "").strip("/")
        self._boto_errors: tuple[type[Exception], ...] = (Boto3Error, BotoCoreError, ClientError)
        self._client_error: Any = ClientError
        self._transfer = TransferConfig(
            multipart_threshold=_LARGE, multipart_chunksize=_LARGE, max_concurrency=_AT_ONCE
        )
        with self._translate_errors():
            self._boto_client: Any = boto3.client(
                "s3",
                region_name=os.environ.get("AWS_REGION") or None,  # as data.sources; boto3 alone knows another name
                config=Config(
                    connect_timeout=10,
                    read_timeout=60,
                    retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
                    max_pool_connections=4 * _AT_ONCE,
                ),
            )

    def put_object(self, key: str, content: bytes) -> str:
        """Write an object, whatever was there; the mark of this version."""
        with self._translate_errors():
            answer = self._boto_client.put_object(Bucket=self._name, Key=self._build_full_key(key), Body=content)
        return str(answer["ETag"])

    def put_object_if_absent(self, key: str, content: bytes) -> str | None:
        """Write an object unless there is one: of several who try, one writes. Its mark; None where it is another's."""
        with self._translate_errors():
            try:
                answer = self._boto_client.put_object(
                    Bucket=self._name, Key=self._build_full_key(key), Body=content, IfNoneMatch="*"
                )
            except self._client_error as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] not in {409, 412}:
                    raise
                # An answer may have been lost on its way: then the one that is there is ours.
                found = self.get_object(key)
                return found.etag if found is not None and found.body == content else None
        return str(answer["ETag"])

    def get_object(self, key: str) -> ObjectContent | None:
        """An object; None where there is none."""
        with self._translate_errors():
            try:
                answer = self._boto_client.get_object(Bucket=self._name, Key=self._build_full_key(key))
            except self._client_error as error:
                if error.response["Error"]["Code"] != "NoSuchKey":
                    raise
                return None
            return ObjectContent(answer["Body"].read(), str(answer["ETag"]))

    def list_objects(self, below: str = "") -> dict[str, ObjectInfo]:
        """Every object whose key begins with `below`, by key, in the order of keys."""
        found: dict[str, ObjectInfo] = {}
        with self._translate_errors():
            pages = self._boto_client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._name, Prefix=self._build_full_key(below)):
                now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
                for entry in page.get("Contents", ()):
                    key = entry["Key"][len(self._build_full_key("")) :]
                    age = (now - entry["LastModified"]).total_seconds()
                    found[key] = ObjectInfo(entry["Size"], entry["ETag"], age)
        return found

    def list_directories(self) -> list[str]:
        """The names directly below the address that have something below them."""
        with self._translate_errors():
            pages = self._boto_client.get_paginator("list_objects_v2")
            listed = pages.paginate(Bucket=self._name, Prefix=self._build_full_key(""), Delimiter="/")
            found = [entry["Prefix"] for page in listed for entry in page.get("CommonPrefixes", ())]
        return [prefix[len(self._build_full_key("")) :].rstrip("/") for prefix in found]

    def upload_file(self, path: Path, key: str, told: Callable[[int], None] | None = None) -> str:
        """Send a file, large ones in parts, each with a checksum that the store compares; `told` of bytes sent.

        Its mark. Raises StorageError when it did not arrive whole.
        """
        size = path.stat().st_size
        with self._translate_errors():
            self._boto_client.upload_file(
                str(path), self._name, self._build_full_key(key), Callback=told, Config=self._transfer
            )
            stored = self._boto_client.head_object(Bucket=self._name, Key=self._build_full_key(key))
        if stored["ContentLength"] != size:
            raise StorageError(f"{self.address}/{key}: {stored['ContentLength']} bytes have arrived, {size} were sent")
        return str(stored["ETag"])

    def download_file(self, key: str, path: Path) -> None:
        """Fetch an object into a file. Raises FileNotFoundError where there is none."""
        with self._translate_errors():
            try:
                self._boto_client.download_file(self._name, self._build_full_key(key), str(path), Config=self._transfer)
            except self._client_error as error:
                if error.response["Error"]["Code"] not in {"404", "NoSuchKey"}:
                    raise
                raise FileNotFoundError(f"{self.address}/{key}: no such object") from error

    def delete_objects(self, keys: Iterable[str]) -> None:
        """Delete objects; one that is not there is no error."""
        wanted = [{"Key": self._build_full_key(key)} for key in keys]
        for start in range(0, len(wanted), _DELETED_AT_ONCE):
            some = {"Objects": wanted[start : start + _DELETED_AT_ONCE], "Quiet": True}
            with self._translate_errors():
                answer: Mapping[str, Any] = self._boto_client.delete_objects(Bucket=self._name, Delete=some)
            if errors := answer.get("Errors"):
                raise StorageError(f"{self.address}: {errors[0]['Key']} cannot be deleted ({errors[0]['Message']})")

    def abort_multipart_uploads(self, below: str) -> None:
        """Delete the parts of files that were never sent whole: no listing shows them, and they cost money."""
        with self._translate_errors():
            found = self._boto_client.list_multipart_uploads(Bucket=self._name, Prefix=self._build_full_key(below)).get(
                "Uploads", ()
            )
            for upload in found:
                self._boto_client.abort_multipart_upload(
                    Bucket=self._name, Key=upload["Key"], UploadId=upload["UploadId"]
                )

    def _build_full_key(self, below: str) -> str:
        return f"{self._prefix}/{below}" if self._prefix else below

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except self._boto_errors as error:
            said = shorten(str(error), _LONGEST_CAUSE) or type(error).__name__
            raise StorageError(f"{self.address}: {said}. {HINT}") from error
