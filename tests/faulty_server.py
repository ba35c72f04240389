"""A server on a raw socket, which can violate HTTP, and the environment for its clients."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Asked:
    """One request as received."""

    line: str
    headers: dict[str, str]

    @property
    def span(self) -> tuple[int, int | None]:
        """Return the requested range: first byte, and the byte after the last one or None."""
        start, _, end = self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")
        return int(start), int(end) + 1 if end else None


@dataclass
class Server:
    """Server on a raw socket. `answer` returns the bytes for the n-th request (from 1) and whether to continue."""

    answer: Callable[[int, Asked], tuple[bytes, bool]]
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return "http://{}:{}".format(*self.socket.getsockname())

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as file:
            while line := file.readline().decode().strip():
                headers = {}
                while entry := file.readline().decode().strip():
                    name, _, value = entry.partition(":")
                    headers[name.lower()] = value.strip()
                file.read(int(headers.get("content-length", 0)))
                self.asked.append(asked := Asked(line, headers))
                data, more = self.answer(len(self.asked), asked)
                try:
                    connection.sendall(data)
                except OSError:
                    return
                if not more:
                    return


def reply(data: bytes = b"", status: str = "200 OK", **headers: str) -> bytes:
    fixed = {"Content-Length": str(len(data)), "ETag": '"one"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in (fixed | headers).items())]
    return "\r\n".join([*lines, "", ""]).encode() + data


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Yield a function that starts a server; the environment names it, keys, and three attempts."""
    servers = []
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "anybody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "3",
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
    }.items():
        monkeypatch.setenv(name, value)

    def start(answer: Callable[[int, Asked], tuple[bytes, bool]]) -> Server:
        servers.append(server := Server(answer))
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
        return server

    yield start
    for server in servers:
        server.socket.close()
