"""A server that speaks as much of the Hugging Face hub's protocol as reading a data set takes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse


@contextmanager
def hub(repository: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """Serve one data set repository on a free port of this machine; gives the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            address = urlparse(self.path)
            path = unquote(address.path)
            recursive = parse_qs(address.query).get("recursive") == ["true"]
            if re.fullmatch(rf"/api/datasets/{repository}(/revision/main)?", path):
                self._answer(200, {"id": repository, "sha": "a" * 40, "siblings": []})
            elif match := re.fullmatch(rf"/api/datasets/{repository}/tree/main/?(.*)", path):
                entries = _tree(files, match[1], recursive=recursive)
                self._answer(200 if entries else 404, entries or {"error": "no such entry"}, "EntryNotFound")
            elif match := re.fullmatch(rf"/datasets/{repository}/resolve/main/(.*)", path):
                self._send(files[match[1]])
            else:
                self._answer(404, {"error": "no such repository"}, "RepoNotFound")

        def _answer(self, code: int, said: object, error: str = "") -> None:
            self.send_response(code)
            if code == 404:
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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


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
