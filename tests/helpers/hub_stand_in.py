"""The part of the hub's HTTP API that an upload uses, on this machine.

POST /api/repos/create
POST /api/models/REPO/branch/BRANCH
POST /api/validate-yaml
POST /api/models/REPO/preupload/BRANCH      which files to upload as large ones
POST /REPO.git/info/lfs/objects/batch       which of these are missing, and their upload addresses
PUT  /large/SHA256
POST /api/models/REPO/commit/BRANCH         the small files, and the names of the large ones
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "s" * 34
READ_ONLY = "hf_" + "r" * 34


class Hub(ThreadingHTTPServer):
    """Attributes:

    repos: `{name: {"private": bool, "branches": {branch: {file: bytes}}, "messages": [...]}}`.
    large: bytes by SHA-256. sent: paths of all requests. refuse_large: whether to reject large files.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.refuse_large = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Log nothing."""

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, value: Any, code: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_PUT(self) -> None:
        self.server.sent.append(self.path)
        body = self._body()
        if self.server.refuse_large:
            self._answer({"error": "too large"}, 413)
            return
        assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
        self.server.large[self.path.rpartition("/")[2]] = body
        self._answer({})

    def do_POST(self) -> None:
        self.server.sent.append(self.path)
        body = self._body()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (TOKEN, READ_ONLY):
            self._answer({"error": "Invalid credentials"}, 401)
        elif token == READ_ONLY:
            self._answer({"error": "This token may not write"}, 403)
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path):
            self._batch(json.loads(body))
        elif match := re.fullmatch(r"/api/models/(.+)/(branch|preupload|commit)/(.+)", self.path):
            getattr(self, f"_{match[2]}")(match[1], match[3], body)
        else:
            self._answer({"error": f"no such place: {self.path}"}, 404)

    def _create(self, request: dict[str, Any]) -> None:
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        address = {"url": f"{self.server.address}/{name}"}
        if name in self.server.repos:
            self._answer(address | {"error": "You already created this model repo"}, 409)
            return
        # The field depends on the version of the library.
        private = request.get("private", request.get("visibility") == "private")
        self.server.repos[name] = {"private": private, "branches": {"main": {}}, "messages": []}
        self._answer(address)

    def _branch(self, name: str, branch: str, _: bytes) -> None:
        repo = self.server.repos[name]
        exists = branch in repo["branches"]
        repo["branches"].setdefault(branch, {})
        self._answer({"error": "Reference already exists"} if exists else {}, 409 if exists else 200)

    def _preupload(self, _: str, __: str, body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer({"files": files})

    def _batch(self, request: dict[str, Any]) -> None:
        objects = []
        for item in request["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.large:
                answer["actions"] = {"upload": {"href": f"{self.server.address}/large/{item['oid']}"}}
            objects.append(answer)
        self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, branch: str, body: bytes) -> None:
        repo = self.server.repos[name]
        files = repo["branches"][branch]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo["messages"].append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                raise ValueError(line["key"])
        commit = hashlib.sha1(body).hexdigest()
        self._answer(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.server.address}/{name}/commit/{commit}"}
        )
