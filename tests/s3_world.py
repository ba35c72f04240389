"""A local S3 server (moto), configured through the environment as a user's server is."""

import logging
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "features"


@dataclass(frozen=True)
class S3:
    """A running server with one empty bucket, and its request lines."""

    server: ThreadedMotoServer
    seen: list[str]

    @property
    def endpoint(self) -> str:
        host, port = self.server.get_host_and_port()
        return f"http://{host}:{port}"

    @property
    def root(self) -> str:
        return f"s3://{BUCKET}/stores"

    def requests(self, method: str, part: str = "") -> list[str]:
        """Requested paths, such as `/features/stores/…/hidden/c/0/0/0/0`."""
        return [line.split()[1] for line in self.seen if line.startswith(method) and part in line]

    @cached_property
    def client(self) -> Any:
        """An independent client of the server."""
        keys = {"aws_access_key_id": "anybody", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.endpoint, **keys)

    def objects(self) -> dict[str, bytes]:
        """Return the bytes of every object by name below the root."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="stores/")
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        found = {key: self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}
        return {key.removeprefix("stores/"): data for key, data in found.items()}

    def replace(self, name: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=f"stores/{name}", Body=data)

    def remove(self, name: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=f"stores/{name}")

    def ask_for_signatures(self, actions: float) -> None:
        """From the `actions`-th request on, refuse every key."""
        plain = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{self.endpoint}/moto-api/reset-auth", str(actions).encode(), plain)
        urllib.request.urlopen(request).close()


class _Seen(logging.Handler):
    """Collector of the server's request lines, such as `PUT /bucket/key HTTP/1.1`."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().split('"')[1])


@contextmanager
def running_s3(cache: Path) -> Iterator[S3]:
    """Run a server with an empty bucket; set the environment for it and for an empty cache."""
    seen: list[str] = []
    log, handler = logging.getLogger("werkzeug"), _Seen(seen)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    s3 = S3(server, seen)
    log.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "anybody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setenv("RETORT_CACHE", str(cache))
        urllib.request.urlopen(f"{s3.endpoint}/moto-api/reset", b"").close()
        urllib.request.urlopen(urllib.request.Request(f"{s3.endpoint}/{BUCKET}", method="PUT")).close()
        try:
            yield s3
        finally:
            log.removeHandler(handler)
            server.stop()
