"""A Hub on this machine: the part of its HTTP API with which huggingface_hub makes, fills and reads repositories.

Files of text are committed inline, all others through LFS, as on the Hub. A write needs the token `TOKEN`.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]
TOKEN = "hf_test"
COMMIT = "c" * 40
_TEXT = (".md", ".json", ".py")


@dataclass
class Hub:
    """Repositories by kind and name, such as `models/user/name`, with their files; uploads by digest."""

    address: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    num_uploads: int = 0
    commits: list[str] = field(default_factory=list)  # messages

    def run(self, *arguments: str, home: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
        """Run `python -m …` as a user of this Hub does."""
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
            env={**os.environ, "HF_ENDPOINT": self.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home),
                 "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                 "RETORT_CACHE": str(home / "cache")} | environment,
        )  # fmt: skip


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve an empty Hub."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(self._chunks())
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/(\w+/[\w.-]+/[\w.-]+)/preupload/main", self.path):
            self._answer({"files": [self._mode(found[1], one) for one in json.loads(body)["files"]]})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [self._upload(one) for one in json.loads(body)["objects"]]})
        elif found := re.fullmatch(r"/api/(\w+/[\w.-]+/[\w.-]+)/commit/main", self.path):
            self._commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.send_error(404)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        digest = self.path.removeprefix("/upload/")
        assert hashlib.sha256(data).hexdigest() == digest
        self.hub.uploads[digest] = data
        self.hub.num_uploads += 1
        self._answer({})

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        if found := re.fullmatch(r"/api/(\w+/[\w.-]+/[\w.-]+)/tree/main/(.+)", path):
            files = self.hub.repos.get(found[1], {})
            self._answer(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
                    for name, data in files.items()
                    if name.startswith(f"{found[2]}/")
                ]
            )
        elif found := re.fullmatch(r"/api/(\w+/[\w.-]+/[\w.-]+)/revision/main", path):
            siblings = [{"rfilename": name} for name in self.hub.repos.get(found[1], {})]
            self._answer({"id": found[1].partition("/")[2], "sha": COMMIT, "siblings": siblings})
        elif found := re.fullmatch(r"/datasets/([\w.-]+/[\w.-]+)/resolve/\w+/(.+)", path):
            data = self.hub.repos.get(f"datasets/{found[1]}", {}).get(found[2])
            if data is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                self._send(data)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *arguments: object) -> None:
        pass

    def _create(self, asked: dict[str, object]) -> None:
        repo = f"{asked.get('type') or 'model'}s/{asked.get('organization', 'user')}/{asked['name']}"
        known = repo in self.hub.repos
        if not known:
            self.hub.repos[repo] = {}
            self.hub.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
        self._answer({"url": f"{self.hub.address}/{repo.removeprefix('models/')}"}, 409 if known else 200)

    def _mode(self, repo: str, asked: dict[str, str]) -> dict[str, object]:
        old = self.hub.repos[repo].get(asked["path"])
        mode = "regular" if asked["path"].endswith(_TEXT) else "lfs"
        oid = None if old is None else _oid(old) if mode == "regular" else hashlib.sha256(old).hexdigest()
        return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _upload(self, asked: dict[str, object]) -> dict[str, object]:
        if asked["oid"] in self.hub.uploads:
            return asked
        return asked | {"actions": {"upload": {"href": f"{self.hub.address}/upload/{asked['oid']}"}}}

    def _commit(self, repo: str, lines: list[dict[str, dict[str, str]]]) -> None:
        for line in lines:
            kind, value = str(line["key"]), line["value"]
            if kind == "header":
                self.hub.commits.append(value["summary"])
            elif kind == "file":
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            else:
                assert kind == "lfsFile"
                self.hub.repos[repo][value["path"]] = self.hub.uploads[value["oid"]]
        url = f"{self.hub.address}/{repo}/commit/{COMMIT}"
        self._answer({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, value: object, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status)

    def _send(self, data: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    """Return git's digest of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
