"""Objects at a URL (s3://, gs://, az://), through obstore: list, read as a stream, write.

Every failure of the server is a RetortError of one line. A connection may take 5 s. A failed request is repeated four
times with growing pauses, and a failed download continues at the byte where it stopped. A large object is transferred
in parts, several at once. An object becomes visible when all of its bytes have arrived.

obstore keeps its connections in threads, which do not survive a fork: a call in a forked process would wait forever. A
process that was forked after its parent's first request therefore runs each request in a new process,
`python -m extract.store.object_store`, at about 0.2 s each.
"""

import json
import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import obstore
from obstore.exceptions import BaseError, InvalidPathError, PermissionDeniedError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, S3Store

from extract.base.errors import RetortError
from extract.store.aws import metadata_endpoint, s3_options

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_KINDS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
_PART_BYTES = 8 << 20  # S3 requires at least 5 MB for all parts but the last
_MOST_PARTS = 10_000  # of one upload, a limit of S3
_AT_ONCE = 4  # concurrent parts of one object
_EXAMPLE = "expected a local folder or a URL such as s3://bucket/prefix"

_HINTS = {
    "s3": "check the address, the credentials (S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE), the "
    "region (AWS_REGION) and the server (S3 elsewhere than at Amazon: AWS_ENDPOINT_URL)",
    "gs": "check the address and the credentials (GOOGLE_APPLICATION_CREDENTIALS)",
    "az": "check the address and the credentials (AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY)",
}

_first_request_pid: int | None = None  # the process whose threads obstore's connections live in


@dataclass(frozen=True)
class Address:
    """The parts of an object store's URL."""

    kind: str  # s3, gs or az
    bucket: str
    prefix: str
    account: str | None = None  # Azure: abfss://container@account.dfs.core.windows.net/prefix

    @classmethod
    def of(cls, url: str) -> "Address":
        """Parse a URL literally, without escapes. Raises RetortError for an unknown scheme and for a missing bucket."""
        scheme, _, rest = url.partition("://")
        if scheme not in _KINDS:
            known = ", ".join(f"{name}://" for name in _KINDS)
            raise RetortError(f"{url}: Protocol not known: {scheme}; {_EXAMPLE} (known: {known})")
        host, _, prefix = rest.partition("/")
        bucket, _, account = host.partition("@")
        if not bucket:
            raise RetortError(f"{url} names no bucket; expected a URL such as {scheme}://bucket/prefix")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
            raise RetortError(f"{url}: Invalid bucket name {bucket!r}; expected letters, digits, dots and hyphens")
        if account and _KINDS[scheme] != "az":
            raise RetortError(f"{url}: {host!r} holds an @; put credentials into the environment, not into the URL")
        if odd := {"", ".", ".."} & set(prefix.rstrip("/").split("/") if prefix.rstrip("/") else ()):
            raise RetortError(f"{url}: the path has the segment {odd.pop()!r}; expected names between single slashes")
        return cls(_KINDS[scheme], bucket, prefix.rstrip("/"), account.partition(".")[0] or None)


@dataclass(frozen=True)
class Objects:
    """The objects below a URL, by their names relative to it."""

    url: str

    def check(self) -> None:
        """Raise RetortError for a URL of an unknown kind, or without a bucket; no request is sent."""
        Address.of(self.url)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every object by name, from one listing."""
        if _forked():
            sizes: dict[str, int] = json.loads(b"".join(self._elsewhere("sizes")))
            return sizes
        with self._in_one_line():
            found = obstore.list(self._connection).collect()
        return {entry["path"]: entry["size"] for entry in found}

    def chunks(self, name: str, num_bytes: int = 0) -> Iterator[bytes]:
        """Yield an object's bytes in pieces of a few MB.

        num_bytes: the approximate size. A large object is fetched in parts of one version, several at once: one
        connection to an object store is slower than the network.
        """
        if _forked():
            yield from self._elsewhere("chunks", name, str(num_bytes))
            return
        with self._in_one_line(name):
            whole = {} if num_bytes <= _PART_BYTES else {"range": (0, _PART_BYTES)}
            first = obstore.get(self._connection, name, options=whole)  # type: ignore[arg-type]
            size, tag, pieces = first.meta["size"], first.meta["e_tag"], iter(first.stream())
        starts = deque(range(first.range[1], size, _PART_BYTES))  # of the parts after the first request
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            coming: deque[Future[bytes]] = deque()
            try:
                while True:
                    while starts and len(coming) < _AT_ONCE:
                        coming.append(pool.submit(self._part, name, starts.popleft(), size, tag))
                    with self._in_one_line(name):
                        piece = next(pieces, None)
                    if piece is None:
                        if not coming:
                            return
                        piece = coming.popleft().result()
                    yield piece
            finally:
                pool.shutdown(cancel_futures=True)

    def _part(self, name: str, start: int, size: int, tag: str | None) -> bytes:
        with self._in_one_line(name):
            span = (start, min(start + _PART_BYTES, size))
            # if_match: all parts are of the version that the first request found.
            part = obstore.get(self._connection, name, options={"range": span, "if_match": tag})
            return bytes(part.bytes())

    def put(self, name: str, data: bytes) -> None:
        """Write a small object."""
        if _forked():
            b"".join(self._elsewhere("put", name, data=data))
            return
        with self._in_one_line(name):
            obstore.put(self._connection, name, data)

    def put_file(self, name: str, file: Path) -> int:
        """Write an object from a file, in parts if it is large; return its bytes. A failed upload is aborted."""
        num_bytes = file.stat().st_size
        if _forked():
            b"".join(self._elsewhere("put_file", name, str(file.absolute())))
            return num_bytes
        part_bytes = max(_PART_BYTES, -(-num_bytes // _MOST_PARTS))  # larger parts beyond 80 GB
        with file.open("rb") as source, self._in_one_line(name):
            data = source.read() if num_bytes <= part_bytes else _pieces(source, part_bytes)
            obstore.put(self._connection, name, data, chunk_size=part_bytes, max_concurrency=_AT_ONCE)
        return num_bytes

    @cached_property
    def _connection(self) -> "ObjectStore":
        global _first_request_pid
        address = Address.of(self.url)
        client = _client_options()
        common: Any = {
            "prefix": address.prefix or None,
            "client_options": client,
            "retry_config": _retry_options(),
        }
        _first_request_pid = os.getpid()
        with self._in_one_line():
            if address.kind == "s3":
                config, provider, certificates = s3_options(address.bucket)
                client |= {"allow_http": config.get("endpoint", "").startswith("http://")}
                if certificates:
                    client["root_certificate"] = certificates
                return S3Store(address.bucket, config=config, credential_provider=provider, **common)
            if address.kind == "gs":
                return GCSStore(address.bucket, **common)
            account: Any = {"account_name": address.account} if address.account else {}
            return AzureStore(address.bucket, **account, **common)

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url}  # connections and credentials stay in the process

    def _elsewhere(self, *arguments: str, data: bytes = b"") -> Iterator[bytes]:
        """Run a request in a new process and yield what it writes to stdout."""
        root = Path(__file__).parents[2]
        command = [sys.executable, "-m", "extract.store.object_store", self.url, *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, cwd=root, **pipes) as process:  # type: ignore[call-overload]
            try:
                with suppress(BrokenPipeError):  # the process ended early; its last line is the reason
                    process.stdin.write(data)
                    process.stdin.close()
                while piece := process.stdout.read(_PART_BYTES // 2):
                    yield piece
                error = process.stderr.read().decode().strip()
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise RetortError(error.splitlines()[-1] if error else f"{self.url}: a request's process was killed")

    @contextmanager
    def _in_one_line(self, name: str | None = None) -> Iterator[None]:
        """Convert what obstore raises for a failure or refusal of the server into a RetortError of one line."""
        try:
            yield
        except RetortError:
            raise
        except (BaseError, OSError, ValueError) as error:
            where = self.url if name is None else f"{self.url}/{name}"
            hint = _HINTS[_KINDS[self.url.partition("://")[0]]]
            if isinstance(error, FileNotFoundError) and not re.search("NoSuchBucket|ContainerNotFound", str(error)):
                hint = "it was deleted, or never written: run `python -m extract run` or `mirror` again"
            if "InvalidRange" in str(error):
                hint = "it is damaged: 0 bytes; delete it and run `python -m extract run` or `mirror` again"
            if isinstance(error, InvalidPathError):
                hint = "delete that object, or give another root"
            raise RetortError(f"{where}: {_reason(error)}; {hint}") from error


def _pieces(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    """Yield a file piece by piece. Running Python between pieces lets Ctrl-C interrupt an upload."""
    while piece := file.read(num_bytes):
        yield piece


def _forked() -> bool:
    return _first_request_pid not in (None, os.getpid())


def _client_options() -> "ClientConfig":
    """Return the limits of a request. A transfer may take a day; a stall of 30 s ends it."""
    return {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "1d"}


def _retry_options() -> "RetryConfig":
    attempts = os.environ.get("AWS_MAX_ATTEMPTS", "5")  # as other clients of S3 read it
    if not attempts.isdecimal() or int(attempts) < 1:
        raise RetortError(f"AWS_MAX_ATTEMPTS: got {attempts!r}, expected a number of attempts from 1 on")
    return {
        "max_retries": int(attempts) - 1,
        "retry_timeout": timedelta(minutes=2),
        "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=5), "base": 2},
    }


def _reason(error: Exception) -> str:
    """Return the cause in an error of obstore: the server's code and message, or the system's connection error."""
    text, _, debug = str(error).partition("\n\nDebug source:")
    if any(path in text for path in (f"{metadata_endpoint()}/latest/", "/computeMetadata/", "/metadata/identity/")):
        return "Unable to locate credentials (none in the environment, none from a metadata service)"
    if provider := re.search(r"credential provider: (.*)", text, re.DOTALL):
        text = f"Unable to get credentials ({provider[1].strip()})"
    elif answer := re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", text, re.DOTALL):
        text = f"{answer[1]}: {answer[2]}"
    elif isinstance(error, PermissionDeniedError | UnauthenticatedError):
        text = f"Access denied ({text})"
    if "kind: Connect" in debug or "ConnectError" in debug:
        causes = re.findall(r'(?:message|error): "([^"]+)"', debug)
        address = re.search(r"https?://[^/?\s]+", text)
        server = address[0] if address else "the server"
        text = f"Could not connect to {server} ({causes[-1] if causes else 'no answer in 5 s'})"
    elif "TimedOut" in debug:
        text = f"{text} (no answer in 30 s)"
    text = re.sub(r" in [\d.]+(?:[mµn]?s)\b|, max_retries: \d+, retry_timeout: \w+", "", " ".join(text.split()))
    return text[:300] or type(error).__name__


def _main(url: str, method: str, *arguments: str) -> None:
    """Run one request for a forked process; its result goes to stdout."""
    objects, out = Objects(url), sys.stdout.buffer
    if method == "sizes":
        out.write(json.dumps(objects.sizes()).encode())
    elif method == "chunks":
        for piece in objects.chunks(arguments[0], int(arguments[1])):
            out.write(piece)
    elif method == "put":
        objects.put(arguments[0], sys.stdin.buffer.read())
    elif method == "put_file":
        objects.put_file(arguments[0], Path(arguments[1]))
    out.flush()


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except RetortError as error:
        sys.exit(str(error))
