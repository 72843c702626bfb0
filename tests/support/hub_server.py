"""A server that speaks as much of the Hugging Face hub's protocol as reading a data set or fetching a model takes."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import pytest
from huggingface_hub import constants

_COMMIT = "a" * 40


class _Handler(BaseHTTPRequestHandler):
    """Answers for one repository; `hub` makes a class of its own with these."""

    repository: str
    files: Mapping[str, bytes]
    kind: str
    sent: list[str]
    token: str
    commits: Mapping[str, Mapping[str, bytes]]
    branches: Mapping[str, str]
    is_listed: bool

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        match = re.fullmatch(rf"{self._folder()}/{self.repository}/resolve/(\w+)/(.*)", unquote(self.path))
        if match is not None and not self._commit(match[1]):
            self._answer(404, {"error": "no such revision"}, "RevisionNotFound")
            return
        if match is None or match[2] not in self._files(match[1]):
            self._answer(404, {"error": "no such entry"}, "EntryNotFound")
            return
        content = self._files(match[1])[match[2]]
        self.send_response(200)
        self.send_header("X-Repo-Commit", self._commit(match[1]))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()

    def do_GET(self) -> None:
        address = urlparse(self.path)
        path = unquote(address.path)
        is_open = self.is_listed and re.fullmatch(f"/api/{self.kind}/{self.repository}", path)
        if self.token and not is_open and self.headers.get("Authorization") != f"Bearer {self.token}":
            self._answer(401, {"error": "gated"}, "GatedRepo")
            return
        recursive = parse_qs(address.query).get("recursive") == ["true"]
        if match := re.fullmatch(rf"/api/{self.kind}/{self.repository}(?:/revision/(\w+))?", path):
            revision = match[1] or "main"
            if not self._commit(revision):
                self._answer(404, {"error": "no such revision"}, "RevisionNotFound")
                return
            siblings = [{"rfilename": name} for name in self._files(revision)]
            gated = "manual" if self.token else False
            described = {"id": self.repository, "sha": self._commit(revision), "siblings": siblings, "gated": gated}
            self._answer(200, described)
        elif path == f"/api/{self.kind}/{self.repository}/auth-check":
            self._answer(200, {})
        elif match := re.fullmatch(rf"/api/{self.kind}/{self.repository}/tree/(\w+)/?(.*)", path):
            entries = _tree(self._files(match[1]), match[2], recursive=recursive)
            self._answer(*((200, entries) if entries else (404, {"error": "no such entry"}, "EntryNotFound")))
        elif match := re.fullmatch(rf"{self._folder()}/{self.repository}/resolve/(\w+)/(.*)", path):
            self.sent.append(match[2])
            self._send(self._files(match[1])[match[2]])
        else:
            self._answer(404, {"error": "no such repository"}, "RepoNotFound")

    def _answer(self, code: int, said: object, error: str = "") -> None:
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
        self._finish(json.dumps(said).encode())

    def _send(self, content: bytes) -> None:
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
        assert asked is not None
        first, last = int(asked[1]), int(asked[2] or len(content) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self._finish(content[first : last + 1])

    def _finish(self, body: bytes) -> None:
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _commit(self, revision: str) -> str:
        """The commit of a revision, "" for one that does not exist. Without `commits` every revision is the same."""
        if not self.commits:
            return _COMMIT
        return revision if revision in self.commits else self.branches.get(revision, "")

    def _files(self, revision: str) -> Mapping[str, bytes]:
        return self.commits.get(self._commit(revision), {}) if self.commits else self.files

    def _folder(self) -> str:
        return "" if self.kind == "models" else f"/{self.kind}"


@contextmanager
def hub(
    repository: str,
    files: Mapping[str, bytes],
    kind: str = "datasets",
    asked: list[str] | None = None,
    *,
    token: str = "",
    commits: Mapping[str, Mapping[str, bytes]] | None = None,
    branches: Mapping[str, str] | None = None,
    is_listed: bool = False,
) -> Iterator[str]:
    """Serve one repository on a free port of this machine; gives the endpoint.

    `kind` is `datasets` or `models`; the names of files that were sent are added to `asked`. With a `token` the
    repository is gated, and the token is needed, on the hub itself for files alone: `is_listed`. `commits` are files by
    commit, in place of `files`, and `branches` commits by name; both may change while the server runs.
    """
    answers = {
        "repository": repository,
        "files": files,
        "kind": kind,
        "sent": [] if asked is None else asked,
        "token": token,
        "commits": commits or {},
        "branches": branches or {},
        "is_listed": is_listed,
    }
    handler = type("Handler", (_Handler,), answers)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process's client of the hub ask another endpoint, as HF_ENDPOINT does from its start."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    files = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)


@contextmanager
def silent_server() -> Iterator[str]:
    """Give the address of a server that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def _tree(files: Mapping[str, bytes], base: str, *, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{base}/" if base else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, content in files.items():
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            folder = prefix + "/".join(parts[:depth])
            entries[folder] = {"type": "directory", "oid": "0", "size": 0, "path": folder}
        if recursive or len(parts) == 1:
            oid = hashlib.sha1(content).hexdigest()
            entries[name] = {"type": "file", "oid": oid, "size": len(content), "path": name}
    return list(entries.values())
