"""A server that speaks as much of the Hugging Face hub's protocol as an upload takes: rights, LFS, commits."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OWNER = "someone"
WRITE, READ = "may-write", "may-read"  # tokens of the owner


@dataclass
class Repository:
    """Files of the newest commit, and who sees them."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def commit(self) -> str:
        """The newest commit: one for each state, as on the hub."""
        names = "".join(f"{name}{hashlib.sha1(content).hexdigest()}" for name, content in sorted(self.files.items()))
        return hashlib.sha1(names.encode()).hexdigest()


@dataclass
class UploadHub:
    """State of the server."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Files of LFS by their SHA-256."""
    breaks_at: str = ""
    """Requests whose path has this text are refused with 500."""
    requests: list[str] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    """Answers for all repositories; `upload_hub` makes a class of its own with the state."""

    hub: UploadHub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        token = self._token()
        if self.path == "/api/whoami-v2":
            self._answer(*((200, {"name": OWNER, "type": "user", "orgs": []}) if token else (401, {"error": "token"})))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/?]+)(?:\?.*)?", self.path):
            self._answer_with(match[1], self.hub.repositories.get(match[1]))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", self.path):
            self._send_file(self.hub.repositories[match[1]], match[3])
        else:
            self._answer(404, {"error": "no such entry"}, "EntryNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        content = self._read()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.objects[oid] = content
        self._answer(200, {})

    def do_POST(self) -> None:
        content = self._read()
        self.hub.requests.append(self.path)
        if self.hub.breaks_at and self.hub.breaks_at in self.path:
            self._answer(500, {"error": "out of order"})
        elif self._token() != WRITE and not self.path.startswith("/api/validate-yaml"):
            self._answer(403, {"error": "this token may only read"})
        elif self.path == "/api/repos/create":
            self._create(json.loads(content))
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.path):
            self._answer(200, self._plan_objects(json.loads(content)["objects"]))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", self.path):
            self._answer(200, {"files": [_choose_mode(file) for file in json.loads(content)["files"]]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            self._commit(match[1], [json.loads(line) for line in content.splitlines()])
        else:
            self._answer(404, {"error": "no such address"})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != OWNER:
            self._answer(403, {"error": f"you may not create repositories of {asked['organization']}"})
        elif name in self.hub.repositories:
            self._answer(409, {"error": "You already created this model repo"})
        else:
            files = {".gitattributes": b"*.safetensors filter=lfs\n"}
            self.hub.repositories[name] = Repository(asked["visibility"] == "private", files)
            self._answer(200, {"url": f"{self.hub.endpoint}/{name}", "id": name})

    def _plan_objects(self, asked: list[dict[str, Any]]) -> dict[str, Any]:
        """Addresses for the files that are not here yet."""
        objects = []
        for each in asked:
            upload = {"href": f"{self.hub.endpoint}/objects/{each['oid']}", "header": {}}
            objects.append(each if each["oid"] in self.hub.objects else each | {"actions": {"upload": upload}})
        return {"transfer": "basic", "objects": objects}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repository = self.hub.repositories[name]
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    repository.commits.append(value["summary"])
                case "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    repository.files[value["path"]] = self.hub.objects[value["oid"]]
                case "deletedFile":
                    del repository.files[value["path"]]
        url = f"{self.hub.endpoint}/{name}/commit/{repository.commit}"
        self._answer(200, {"success": True, "commitOid": repository.commit, "commitUrl": url, "hookOutput": ""})

    def _answer_with(self, name: str, repository: Repository | None) -> None:
        if repository is None or (repository.private and not self._token()):
            self._answer(404, {"error": "Repository not found"}, "RepoNotFound")
            return
        siblings = [{"rfilename": file} for file in repository.files]
        self._answer(200, {"id": name, "sha": repository.commit, "private": repository.private, "siblings": siblings})

    def _send_file(self, repository: Repository, name: str) -> None:
        content = repository.files[name]
        self.send_response(200)
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _token(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return token if token in {WRITE, READ} else ""

    def _read(self) -> bytes:
        """The body of the request, whose length a stream gives in pieces."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, code: int, said: object, error: str = "") -> None:
        body = json.dumps(said).encode()
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _choose_mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


@contextmanager
def upload_hub() -> Iterator[UploadHub]:
    """Serve a hub without repositories on a free port of this machine."""
    state = UploadHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": state}))
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
