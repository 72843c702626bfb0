"""Client for a prefix in an S3 bucket: objects by key, conditional creates, errors as StorageError.

boto3, because pyarrow has no conditional writes and fsspec's s3fs pins a botocore of its own.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from llm_training_toolkit.config.uri import has_userinfo, redact_uri
from llm_training_toolkit.runs.storage.object_keys import find_key_problem, is_directory_marker

_ADDRESS = re.compile(r"s3://([^/?#]+)(?:/(.*))?")
_LONGEST_CAUSE = 300
_ATTEMPTS = 5  # tries of a request, within about ten seconds if no server answers
# Size from which files are transferred in parts, and size of a part: S3 takes 10,000 parts, 300 GB a file.
_LARGE = 32 << 20
_AT_ONCE = 4  # parts in parallel: some hundred MB/s, and training keeps its cores
_DELETED_AT_ONCE = 1000  # S3's limit
_CONDITIONAL_ATTEMPTS = 5  # writes over the newest version, which another writer may replace before each
_CONDITIONAL_INTERVAL = 0.2  # seconds between two of them
_CONDITION_ERRORS = frozenset({"ConditionalRequestConflict", "NoSuchKey", "PreconditionFailed"})  # of If-Match
HINT = (
    "Check the address, the network and the keys: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
    "AWS_REGION; AWS_ENDPOINT_URL for a store that is not Amazon's"
)
CONDITIONAL_WRITES_HINT = (
    "Without them nothing would keep two processes out of one run. Set run.dir to a store that has them, or to a path"
)


class StorageError(OSError):
    """Failure of an object store that refuses or does not answer."""


class UnsafeKeyError(StorageError):
    """Object whose key cannot be a path below the directory of its run."""


@dataclass(frozen=True)
class ObjectInfo:
    """Object in a listing."""

    size: int
    etag: str
    """ETag of this version."""
    age: float
    """Seconds since it was written, by the store's own clock."""


class ObjectContent(NamedTuple):
    """Fetched object."""

    body: bytes
    etag: str
    """ETag of this version."""


class S3Client:
    """Client for the keys below an address such as `s3://bucket/runs/name`. Thread-safe."""

    def __init__(self, address: str) -> None:
        """Create the client without a request to the store. Raises StorageError if the address names no bucket."""
        import boto3  # noqa: PLC0415 - a third of a second, for those alone whose runs lie in a store
        from boto3.exceptions import Boto3Error  # noqa: PLC0415
        from boto3.s3.transfer import TransferConfig  # noqa: PLC0415
        from botocore.config import Config  # type: ignore[import-untyped]  # noqa: PLC0415
        from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]  # noqa: PLC0415

        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise StorageError(f"{address}: not an address in an S3 bucket, such as s3://bucket/runs")
        if has_userinfo(address):
            raise StorageError(f"{redact_uri(address)}: keys in an address would be stored and shown with it. {HINT}")
        self.address = address.rstrip("/")
        self._name, self._prefix = match[1], (match[2] or "").strip("/")
        if self._prefix and (problem := find_key_problem(self._prefix)):
            raise UnsafeKeyError(f"{address!r}: not an address of a run or its directory: {problem}")
        self._boto_errors: tuple[type[Exception], ...] = (Boto3Error, BotoCoreError, ClientError)
        self._client_error: Any = ClientError
        self._transfer = TransferConfig(
            multipart_threshold=_LARGE, multipart_chunksize=_LARGE, max_concurrency=_AT_ONCE
        )
        with self._translate_errors():
            self._boto_client: Any = boto3.client(
                "s3",
                region_name=os.environ.get("AWS_REGION") or None,  # as in data.sources; boto3 itself reads another name
                config=Config(
                    connect_timeout=10,
                    read_timeout=60,
                    retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
                    max_pool_connections=4 * _AT_ONCE,
                ),
            )

    def put_object(self, key: str, content: bytes) -> str:
        """Write or overwrite an object and return its ETag."""
        with self._translate_errors():
            answer = self._boto_client.put_object(Bucket=self._name, Key=self._build_full_key(key), Body=content)
        return str(answer["ETag"])

    def put_object_if_absent(self, key: str, content: bytes) -> str | None:
        """Create an object and return its ETag, or None if it exists. Only one of several writers succeeds."""
        with self._translate_errors():
            try:
                answer = self._boto_client.put_object(
                    Bucket=self._name, Key=self._build_full_key(key), Body=content, IfNoneMatch="*"
                )
            except self._client_error as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] not in {409, 412}:
                    raise
                # The response to our own write may have been lost: then the object is ours.
                found = self.get_object(key)
                return found.etag if found is not None and found.body == content else None
        return str(answer["ETag"])

    def put_object_if_unchanged(self, key: str, content: bytes, etag: str) -> str | None:
        """Overwrite the version `etag` of an object and return the new ETag; None if that version is gone.

        It is also gone after an own write whose response was lost. Raises StorageError if the store has no such writes.
        """
        with self._translate_errors():
            try:
                answer = self._boto_client.put_object(
                    Bucket=self._name, Key=self._build_full_key(key), Body=content, IfMatch=etag
                )
            except self._client_error as error:
                if error.response["Error"]["Code"] == "NotImplemented":
                    raise StorageError(
                        f"{self.address}: this store has no conditional writes (If-Match). {CONDITIONAL_WRITES_HINT}"
                    ) from error
                if error.response["Error"]["Code"] not in _CONDITION_ERRORS:
                    raise
                return None
        return str(answer["ETag"])

    def replace_own_object(
        self, key: str, content: bytes, etag: str | None, is_own: Callable[[bytes], bool]
    ) -> str | None:
        """Write over `etag`, or over a newer version that `is_own` accepts; return the new ETag, or None if it is gone.

        Without `etag` the object is created. Raises StorageError if the store refuses each of several tries.
        """
        for _ in range(_CONDITIONAL_ATTEMPTS):
            if etag is None:
                written = self.put_object_if_absent(key, content)
            else:
                written = self.put_object_if_unchanged(key, content, etag)
            if written is not None:
                return written
            found = self.get_object(key)
            if found is None or not is_own(found.body):
                return None
            etag = found.etag  # of another own writer, or of a write whose response was lost
            time.sleep(_CONDITIONAL_INTERVAL)
        raise StorageError(
            f"{self.address}/{key}: the store refuses If-Match with its own ETag, in each of {_CONDITIONAL_ATTEMPTS} "
            f"tries. {CONDITIONAL_WRITES_HINT}"
        )

    def get_object(self, key: str) -> ObjectContent | None:
        """Return an object, or None if it is absent."""
        with self._translate_errors():
            try:
                answer = self._boto_client.get_object(Bucket=self._name, Key=self._build_full_key(key))
            except self._client_error as error:
                if error.response["Error"]["Code"] != "NoSuchKey":
                    raise
                return None
            return ObjectContent(answer["Body"].read(), str(answer["ETag"]))

    def list_objects(self, below: str = "") -> dict[str, ObjectInfo]:
        """Return every object with a key that begins with `below`, by key, in key order.

        Raises UnsafeKeyError for a key that is no path below a directory, except directory markers, which are skipped.
        """
        found: dict[str, ObjectInfo] = {}
        with self._translate_errors():
            pages = self._boto_client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._name, Prefix=self._build_full_key(below)):
                now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
                for entry in page.get("Contents", ()):
                    key = entry["Key"][len(self._build_full_key("")) :]
                    if not key or is_directory_marker(key):
                        continue
                    self._check_key(key)
                    age = (now - entry["LastModified"]).total_seconds()
                    found[key] = ObjectInfo(entry["Size"], entry["ETag"], age)
        return found

    def list_directories(self) -> list[str]:
        """Return the names of the non-empty prefixes directly below the address, unchecked."""
        with self._translate_errors():
            pages = self._boto_client.get_paginator("list_objects_v2")
            listed = pages.paginate(Bucket=self._name, Prefix=self._build_full_key(""), Delimiter="/")
            found = [entry["Prefix"] for page in listed for entry in page.get("CommonPrefixes", ())]
        return [prefix[len(self._build_full_key("")) :].removesuffix("/") for prefix in found]

    def upload_file(self, path: Path, key: str, told: Callable[[int], None] | None = None) -> str:
        """Upload a file and return its ETag; large files go in parts, with checksums that the store compares.

        `told` receives the bytes sent. Raises StorageError if the file did not arrive completely.
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
        """Download an object into a file. Raises FileNotFoundError if it is absent."""
        with self._translate_errors():
            try:
                self._boto_client.download_file(self._name, self._build_full_key(key), str(path), Config=self._transfer)
            except self._client_error as error:
                if error.response["Error"]["Code"] not in {"404", "NoSuchKey"}:
                    raise
                raise FileNotFoundError(f"{self.address}/{key}: no such object") from error

    def delete_objects(self, keys: Iterable[str]) -> None:
        """Delete objects; absent ones are ignored."""
        wanted = [{"Key": self._build_full_key(key)} for key in keys]
        for start in range(0, len(wanted), _DELETED_AT_ONCE):
            some = {"Objects": wanted[start : start + _DELETED_AT_ONCE], "Quiet": True}
            with self._translate_errors():
                answer: Mapping[str, Any] = self._boto_client.delete_objects(Bucket=self._name, Delete=some)
            if errors := answer.get("Errors"):
                raise StorageError(f"{self.address}: {errors[0]['Key']} cannot be deleted ({errors[0]['Message']})")

    def abort_multipart_uploads(self, below: str) -> None:
        """Delete the parts of incomplete uploads: they cost money, and no listing shows them."""
        with self._translate_errors():
            found = self._boto_client.list_multipart_uploads(Bucket=self._name, Prefix=self._build_full_key(below)).get(
                "Uploads", ()
            )
            for upload in found:
                self._boto_client.abort_multipart_upload(
                    Bucket=self._name, Key=upload["Key"], UploadId=upload["UploadId"]
                )

    def _check_key(self, key: str) -> None:
        if problem := find_key_problem(key):
            raise UnsafeKeyError(
                f"{self.address}: it holds an object that no run has, {key!r} ({problem}). Nothing of the run was "
                "read. Find out who can write into the bucket, and delete the object"
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
