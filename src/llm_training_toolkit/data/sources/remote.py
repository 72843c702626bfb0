"""Remote file listing: S3 and Google Cloud through pyarrow, the Hugging Face hub and others through fsspec."""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from textwrap import shorten
from typing import Any
from urllib.parse import quote

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.fs as arrow
from fsspec.utils import glob_translate  # type: ignore[import-untyped]
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import EntryNotFoundError

from llm_training_toolkit.config.uri import redact_text, redact_uri
from llm_training_toolkit.data.sources.files import (
    HIDDEN_PREFIX,
    SourceFile,
    SourceRoot,
    has_wildcards,
    is_wanted_directory,
    split_pattern,
)
from llm_training_toolkit.errors import DataError

_MAX_CAUSE_LENGTH = 300
_OPTIONS = re.compile(r"\?(\w+=[^&?]*(?:&\w+=[^&?]*)*)$")
_GCS_RETRY_OPTION = "retry_limit_seconds=60"  # Google's library retries silently for 15 minutes by default
_VERSION_KEYS = (
    "blob_id",
    "etag",
    "ETag",
    "md5Hash",
    "mtime",
    "LastModified",
    "Last-Modified",
    "Content-MD5",
    "last_modified",
    "created",
)
# Arrow, fsspec and the hub; most libraries of other protocols derive their errors from OSError, too.
_COMMON_ERRORS = (OSError, ValueError, ImportError, NotImplementedError, pa.ArrowException, EntryNotFoundError)
# Libraries of some protocols have a root error class of their own; few of them are installed at a time.
_ERRORS_BY_LIBRARY = {
    "aiohttp": "ClientError",
    "azure.core.exceptions": "AzureError",
    "botocore.exceptions": "BotoCoreError",
    "ftplib": "Error",
    "gcsfs.retry": "HttpError",
    "google.auth.exceptions": "GoogleAuthError",
    "httpx2": "HTTPError",
    "paramiko.ssh_exception": "SSHException",
}
_HINTS = {
    "s3": "Check the address, the network and the keys: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
    "AWS_REGION; AWS_ENDPOINT_URL for a store that is not Amazon's.",
    "gs": "Check the address, the network and the login: GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth "
    "application-default login`; `gs://anonymous@bucket/…` for what is public.",
    "hf": "Check the address (hf://datasets/owner/name/…), the network and, for a private or gated repository, the "
    "login: `hf auth login` or HF_TOKEN.",
}


@contextmanager
def translate_remote_errors(address: str) -> Iterator[None]:
    """Turn library errors while accessing an address into a DataError with a hint."""
    try:
        yield
    except _get_library_errors() as error:
        said = shorten(redact_text(str(error)), _MAX_CAUSE_LENGTH) or type(error).__name__
        raise DataError(
            f"data.sources: {redact_uri(address)} cannot be read ({said}). {get_access_hint(address)}"
        ) from error


def _get_library_errors() -> tuple[type[Exception], ...]:
    """Return the error classes of the loaded libraries, the only ones that can have raised."""
    loaded = ((sys.modules[module], name) for module, name in _ERRORS_BY_LIBRARY.items() if module in sys.modules)
    return (*_COMMON_ERRORS, *(getattr(module, name) for module, name in loaded))


def get_access_hint(address: str) -> str:
    """Return advice for an inaccessible address. Stores also report forbidden objects as absent."""
    return _HINTS.get(address.partition("://")[0], "Check the address, the network and your rights.")


def find_remote_files(address: str) -> tuple[list[SourceFile], bool]:
    """Return the files at an address, and whether it is a directory.

    The address is tried as a directory (searched as on a local disk), then as a file, then as a glob. Raises DataError
    if the store does not answer or denies access.
    """
    with translate_remote_errors(address):
        scheme, filesystem, path = _open_filesystem(address)
        kind = filesystem.get_file_info(path).type
        if kind == arrow.FileType.Directory:
            root = SourceRoot(path, posixpath.basename(path.rstrip("/")), filesystem, scheme)
            return list(_find_directory_files(root)), True
        if kind == arrow.FileType.File:
            folder, name = posixpath.split(path)
            info = filesystem.get_file_info(path)
            return [
                SourceFile(SourceRoot(folder, "", filesystem, scheme), name, "", _build_version_stamp(filesystem, info))
            ], False
        if has_wildcards(path):
            return list(_match_glob(filesystem, scheme, path)), False
        return [], False


def _open_filesystem(address: str) -> tuple[str, Any, str]:
    """Return scheme with slashes, pyarrow file system and path. An address may end in options: `?region=eu-west-1`."""
    protocol, _, rest = address.partition("://")
    scheme = f"{protocol}://"
    if protocol in {"s3", "gs", "gcs"}:
        options = match[1] if (match := _OPTIONS.search(rest)) else ""
        rest = _OPTIONS.sub("", rest)
        if protocol != "s3" and "retry_limit_seconds" not in options:
            options = f"{options}&{_GCS_RETRY_OPTION}".lstrip("&")
        bucket, _, key = rest.partition("/")
        # Only the bucket is parsed as a URI: wildcards and spaces in the key would be invalid.
        filesystem, found = arrow.FileSystem.from_uri(f"{scheme}{quote(bucket, safe='@:.-_')}?{options}".rstrip("?"))
        return scheme, filesystem, f"{found}/{key.strip('/')}".rstrip("/")
    if protocol == "hf":
        # A new instance each time: a cached one would answer from an old listing.
        inner, path = HfFileSystem(skip_instance_cache=True), rest
    else:
        try:
            inner, path = fsspec.core.url_to_fs(address)
        except TypeError as error:  # a part missing from the address is a missing argument
            raise ValueError(str(error)) from error
        inner.invalidate_cache()
    return scheme, arrow.PyFileSystem(arrow.FSSpecHandler(inner)), path.rstrip("/")


def _find_directory_files(root: SourceRoot) -> Iterator[SourceFile]:
    """Yield the files below a directory, except hidden ones, unwanted directories and virtual environments."""
    listed = _list_file_infos(root, recursive=True)
    environments = {posixpath.dirname(name) for name in listed if posixpath.basename(name) == "pyvenv.cfg"}
    checkouts = _find_git_checkouts(listed)
    for name, info in listed.items():
        folders = _get_parent_directories(name)
        wanted = all(is_wanted_directory(posixpath.basename(folder)) for folder in folders)
        if wanted and environments.isdisjoint(folders) and not posixpath.basename(name).startswith(HIDDEN_PREFIX):
            yield SourceFile(
                root, name, _find_nearest_checkout(folders, checkouts), _build_version_stamp(root.filesystem, info)
            )


def _match_glob(filesystem: Any, scheme: str, pattern: str) -> Iterator[SourceFile]:  # noqa: ANN401 - pyarrow is untyped
    fixed, rest = split_pattern(pattern)
    matches = re.compile(glob_translate(rest)).fullmatch
    hidden_wanted = any(part.startswith(HIDDEN_PREFIX) for part in rest.split("/"))
    root = SourceRoot(fixed, posixpath.basename(fixed), filesystem, scheme)
    listed = _list_file_infos(root, recursive="/" in rest or "**" in rest)
    checkouts = _find_git_checkouts(listed)
    for name, info in listed.items():
        if matches(name) and (hidden_wanted or not any(part.startswith(HIDDEN_PREFIX) for part in name.split("/"))):
            yield SourceFile(
                root,
                name,
                _find_nearest_checkout(_get_parent_directories(name), checkouts),
                _build_version_stamp(filesystem, info),
            )


def _list_file_infos(root: SourceRoot, *, recursive: bool) -> dict[str, Any]:
    """Return the store's metadata of every file below a directory, by relative path."""
    selector = arrow.FileSelector(root.path, recursive=recursive, allow_not_found=True)
    return {
        info.path[len(root.path) :].lstrip("/"): info
        for info in root.filesystem.get_file_info(selector)
        if info.type == arrow.FileType.File
    }


def _find_git_checkouts(names: Iterable[str]) -> set[str]:
    """Return the directories that hold a `.git`."""
    return {match[1] for name in names if (match := re.match(r"(.+?)/\.git(?:/|$)", name))}


def _find_nearest_checkout(folders: Iterable[str], among: set[str]) -> str:
    return next((folder for folder in folders if folder in among), "")


def _get_parent_directories(name: str) -> list[str]:
    """Return the directories above a name, nearest first."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _build_version_stamp(filesystem: Any, info: Any) -> str:  # noqa: ANN401 - pyarrow is untyped
    """Return size and modification time, or size and version tags (`_VERSION_KEYS`) if the store has no times."""
    if info.mtime is not None:
        return f"{info.size}\0{info.mtime_ns}"
    known: dict[str, Any] = filesystem.handler.fs.info(info.path) if isinstance(filesystem, arrow.PyFileSystem) else {}
    return f"{info.size}\0" + "\0".join(str(known[mark]) for mark in _VERSION_KEYS if known.get(mark) is not None)
