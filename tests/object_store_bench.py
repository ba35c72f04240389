"""`python -m tests.object_store_bench`: obstore, as extract/store/object_store.py uses it, beside s3fs.

s3fs is not a dependency of Retort: run `pip install s3fs` first. There are two servers, each in a process of its own:
moto, a full S3 API whose own speed is part of the result, and a minimal one that answers from memory. The clients are
run interleaved, each in a new process, and the medians are printed.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MB = 1_000_000
RANGES = {"64 KB": 64_000, "1 MB": MB, "8 MB": 8 * MB}
SMALL = 200  # requests of one small object each
LISTED = 2_000


class Obstore:
    """Client with the calls of extract/store/object_store.py."""

    def __init__(self, bucket: str) -> None:
        from extract.store.object_store import Objects

        self.objects = Objects(f"s3://{bucket}/bench")

    def put(self, file: Path, name: str) -> None:
        self.objects.put_file(name, file)

    def fetch(self, name: str, file: Path) -> None:
        digest = hashlib.sha256()
        with file.open("wb") as out:
            for piece in self.objects.chunks(name, self.objects.sizes().get(name, 256 * MB)):
                digest.update(piece)
                out.write(piece)

    def ranges(self, name: str, spans: list[tuple[int, int]]) -> int:
        import obstore

        starts, ends = zip(*spans, strict=True)
        parts = obstore.get_ranges(self.objects._connection, name, starts=starts, ends=ends, coalesce=0)
        return sum(map(len, parts))

    def put_small(self, name: str, data: bytes) -> None:
        self.objects.put(name, data)

    def get_small(self, name: str) -> bytes:
        return b"".join(self.objects.chunks(name))

    def list(self) -> int:
        return len(self.objects.sizes())


class S3fs:
    """Client with the calls of an earlier version, which used s3fs."""

    def __init__(self, bucket: str) -> None:
        import fsspec

        self.files, self.path = fsspec.url_to_fs(f"s3://{bucket}/bench")

    def put(self, file: Path, name: str) -> None:
        self.files.put_file(str(file), f"{self.path}/{name}")

    def fetch(self, name: str, file: Path) -> None:
        self.files.get_file(f"{self.path}/{name}", str(file))
        with file.open("rb") as copied:
            hashlib.file_digest(copied, "sha256")

    def ranges(self, name: str, spans: list[tuple[int, int]]) -> int:
        starts, ends = zip(*spans, strict=True)
        return sum(map(len, self.files.cat_ranges([f"{self.path}/{name}"] * len(spans), list(starts), list(ends))))

    def put_small(self, name: str, data: bytes) -> None:
        self.files.pipe_file(f"{self.path}/{name}", data)

    def get_small(self, name: str) -> bytes:
        data: bytes = self.files.cat_file(f"{self.path}/{name}")
        return data

    def list(self) -> int:
        self.files.invalidate_cache()
        return len(self.files.find(self.path, detail=True))


CLIENTS: dict[str, Callable[[str], Any]] = {"obstore": Obstore, "s3fs": S3fs}


class Bare(BaseHTTPRequestHandler):
    """The part of S3 that the clients use: objects of one size, all zeros; uploads are read and discarded."""

    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = 1 << 16, True  # head and body in one packet
    body = bytes(256 * MB)
    page = 1_000

    def do_GET(self) -> None:
        if "list-type" in self.path:
            second = "continuation-token" in self.path
            keys = range(self.page * second, self.page * (1 + second))
            entries = "".join(
                f"<Contents><Key>bench/few/{key}</Key><Size>1</Size><ETag>e</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                for key in keys
            )
            more = "" if second else "<NextContinuationToken>t</NextContinuationToken>"
            return self._xml(f"<ListBucketResult><IsTruncated>{str(not second).lower()}</IsTruncated>{more}{entries}")
        size = self._size()
        first, last, status = 0, size - 1, 200
        if asked := self.headers.get("Range"):
            start, _, end = asked.removeprefix("bytes=").partition("-")
            first, last, status = int(start), min(int(end or last), last), 206
        self._head(status, last + 1 - first, **{"Content-Range": f"bytes {first}-{last}/{size}"})
        return self._send(first, last + 1)

    def do_HEAD(self) -> None:
        self._head(200, self._size())

    def do_PUT(self) -> None:
        self._drain()
        self._head(200, 0)

    def do_POST(self) -> None:
        self._drain()
        started = "uploads" in self.path
        self._xml(
            "<InitiateMultipartUploadResult><UploadId>u</UploadId>" if started else "<CompleteMultipartUploadResult>"
        )

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def _size(self) -> int:
        return 10_000 if "/small" in self.path else len(self.body)

    def _send(self, start: int, end: int) -> None:
        self.wfile.write(memoryview(self.body)[start:end])

    def _drain(self) -> None:
        left = int(self.headers.get("Content-Length", 0))
        while left:
            left -= len(self.rfile.read(min(left, MB)))

    def _head(self, status: int, length: int, **more: str) -> None:
        self.send_response(status)
        fixed = {"ETag": '"e"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "Content-Length": str(length)}
        for name, value in (fixed | more).items():
            self.send_header(name, value)
        self.end_headers()

    def _xml(self, opened: str) -> None:
        name = opened[1 : opened.index(">")]
        extra = "<ETag>e</ETag><Bucket>b</Bucket><Key>k</Key><Location>l</Location>" if "Complete" in name else ""
        data = f'<?xml version="1.0"?>{opened}{extra}</{name}>'.encode()
        self._head(200, len(data))
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        return


class Slow(Bare):
    """The server with 60 MB/s per connection, as from an object store in a cloud."""

    def _send(self, start: int, end: int) -> None:
        for at in range(start, end, MB):
            began = time.perf_counter()
            self.wfile.write(memoryview(self.body)[at : min(end, at + MB)])
            time.sleep(max(0.0, 1 / 60 - (time.perf_counter() - began)))


SERVERS = {"bare": Bare, "slow": Slow}


@contextmanager
def running(server: str) -> Iterator[str]:
    """Start a server in a process of its own; yield its address."""
    command = [sys.executable, "-m", "tests.object_store_bench", "--serve", server]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def serve(server: str) -> None:
    """Serve until killed; print the address as the first line."""
    if server == "moto":
        from moto.server import ThreadedMotoServer

        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        host, port = moto.get_host_and_port()
    else:
        http = ThreadingHTTPServer(("127.0.0.1", 0), SERVERS[server])
        threading.Thread(target=http.serve_forever, daemon=True).start()
        host, port = http.server_address[:2]
    print(f"http://{host}:{port}", flush=True)
    threading.Event().wait()


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure(client_name: str, megabytes: int) -> dict[str, float]:
    """Measure one client in this process, with the server that the environment names."""
    found = {"import, s": timed(lambda: CLIENTS[client_name]("bench"))}
    client, size = CLIENTS[client_name]("bench"), megabytes * MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(prefix="object-store-") as folder:
        large, back = Path(folder) / "large", Path(folder) / "back"
        large.write_bytes(bytes(size))
        found["put, MB/s"] = megabytes / timed(lambda: client.put(large, "large"))
        found["memory of a put, MB"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
        found["fetch, MB/s"] = megabytes / timed(lambda: client.fetch("large", back))
        fetched = back.stat().st_size / MB
        found["fetch, MB/s"] *= fetched / megabytes
        with ThreadPoolExecutor(4) as pool:
            four = timed(lambda: list(pool.map(lambda n: client.fetch("large", Path(f"{back}{n}")), range(4))))
        found["four fetches at once, MB/s"] = 4 * fetched / four
    for label, length in RANGES.items():
        count = min(64, size // (2 * length))  # apart, so that none are joined
        spans = [(at * (size // count), at * (size // count) + length) for at in range(count)]
        took = timed(lambda spans=spans: client.ranges("large", spans))  # type: ignore[misc]
        found[f"{count} ranges of {label}, MB/s"] = count * length / MB / took
    data = bytes(10_000)
    found["put of 10 KB, ms"] = 1e3 * timed(lambda: [client.put_small("small", data) for _ in range(SMALL)]) / SMALL
    found["get of 10 KB, ms"] = 1e3 * timed(lambda: [client.get_small("small") for _ in range(SMALL)]) / SMALL
    if not json.loads(os.environ["BENCH_LISTED"]):
        for number in range(LISTED):
            client.put_small(f"few/{number}", b"1")
    found["listing of 2,000, s"] = timed(client.list)
    return found


def turn(client: str, address: str, megabytes: int, *, listed: bool) -> dict[str, float]:
    """Measure one client in a new process."""
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    environment = os.environ | keys | {"AWS_ENDPOINT_URL": address, "BENCH_LISTED": json.dumps(listed)}
    command = [sys.executable, "-m", "tests.object_store_bench", "--client", client, "--megabytes", str(megabytes)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=300)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def compare(server: str, megabytes: int, rounds: int) -> None:
    """Print a table of medians; the clients are run interleaved on one server."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CLIENTS}
    with running(server) as address:
        if server == "moto":
            urllib.request.urlopen(urllib.request.Request(f"{address}/bench", method="PUT")).close()
        for number in range(rounds):
            for client, turns in found.items():
                turns.append(
                    turn(client, address, megabytes, listed=server != "moto" or number > 0 or client != "obstore")
                )
    print(f"\n| {server}, {megabytes} MB | {' | '.join(found)} |\n|---|{'---:|' * len(found)}")
    for label in found["obstore"][0]:
        medians = [statistics.median(each[label] for each in turns) for turns in found.values()]
        print(f"| {label} | {' | '.join(f'{median:.3g}' for median in medians)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--serve", choices=("moto", *SERVERS))
    parser.add_argument("--client", choices=tuple(CLIENTS))
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
    elif given.client:
        print(json.dumps(measure(given.client, given.megabytes)))
    else:
        for server in ("moto", *SERVERS):
            compare(server, given.megabytes, given.rounds)


if __name__ == "__main__":
    main()
