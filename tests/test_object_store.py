"""Failing object stores, with a real server: broken bodies, refusals, lost uploads, forks."""

import hashlib
import multiprocessing
import pickle
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from extract.base.errors import RetortError
from extract.store.location import LocalLocation, RemoteLocation, location_of, root_text
from extract.store.object_store import Address, Objects
from tests.faulty_server import Asked, Server, reply, serving
from tests.s3_world import S3, running_s3

DATA = np.random.default_rng(0).bytes(9_000_000)
PART = 8 << 20  # of an object that comes in several
EXPECTED = [len(DATA), hashlib.sha256(DATA).hexdigest()]


def whole(asked: Asked, data: bytes = DATA, **headers: str) -> bytes:
    """Return the requests for an object."""
    start, end = asked.span
    if "range" not in asked.headers:
        return reply(data, **headers)
    end = min(end or len(data), len(data))
    return reply(
        data[start:end], "206 Partial Content", Content_Range=f"bytes {start}-{end - 1}/{len(data)}", **headers
    )


def cut(data: bytes) -> bytes:
    return data[: min(len(data) - 1, 5_000_000)]


SLOW_DOWN = reply(b"<Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>", "503 Slow Down")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    with serving(monkeypatch, tmp_path) as start:
        yield start


@pytest.mark.parametrize(
    ("answer", "starts"),
    [
        (lambda number, asked: (whole(asked), True), [0, PART]),
        (lambda number, asked: (cut(whole(asked)) if number == 1 else whole(asked), number > 1), None),
        (lambda number, asked: (SLOW_DOWN if number < 3 else whole(asked), True), [0, 0, 0, PART]),
        (lambda number, asked: (reply(b"", "500 Oh") if number < 3 else whole(asked), True), [0, 0, 0, PART]),
    ],
    ids=["well", "cut once", "slow down", "500"],
)
def test_a_read_outlives_a_fault(
    serve: Callable[..., Server], tmp_path: Path, answer: object, starts: list[int] | None
) -> None:
    server = serve(answer)
    RemoteLocation("s3://bucket/store").fetch("x", tmp_path / "x", EXPECTED)
    assert (tmp_path / "x").read_bytes() == DATA
    asked = sorted(request.span[0] for request in server.asked)
    # Bytes that have arrived are not requested again.
    assert asked == starts if starts else len(asked) == 3 and 0 < asked[1] < asked[2] == PART


@pytest.mark.parametrize(
    ("answer", "most", "expected"),
    [
        (lambda number, asked: (SLOW_DOWN, True), 3, "SlowDown: Reduce your rate"),
        (lambda number, asked: (reply(status="500 Oh"), True), 3, "500 Internal Server Error"),
        (lambda number, asked: (b"hello\r\n\r\n", False), 3, "s3://bucket/store/x: "),
        (lambda number, asked: (b"", False), 3, "s3://bucket/store/x: "),
        (lambda number, asked: (reply(DATA)[:300], False), 3, "s3://bucket/store/x: "),
        (lambda number, asked: (cut(whole(asked)), False), 6, "s3://bucket/store/x: "),
        (lambda number, asked: (cut(whole(asked, ETag=f'"{number}"')), False), 6, "s3://bucket/store/x: "),
        (
            lambda number, asked: (whole(asked, DATA[:-7]), True),
            2,
            f"is damaged: {len(DATA) - 7} bytes, expected {len(DATA)}",
        ),
        (lambda number, asked: (whole(asked, bytes(len(DATA))), True), 2, r"is damaged: sha256 \w+, expected"),
        (
            lambda number, asked: (
                reply(b"<Error><Code>NoSuchKey</Code><Message>No</Message></Error>", "404 No"),
                True,
            ),
            1,
            "NoSuchKey: No; it was deleted, or never written",
        ),
        (lambda number, asked: (reply(status="403 Forbidden"), True), 1, "Access denied .*AWS_ACCESS_KEY_ID"),
        (lambda number, asked: (reply(status="301 Moved"), True), 1, r"region.*\(AWS_REGION\)"),
    ],
    ids=[
        "slow",
        "500",
        "not http",
        "hung up",
        "no body",
        "cut",
        "replaced",
        "short",
        "other",
        "gone",
        "denied",
        "region",
    ],
)
def test_a_read_that_can_not_be_right_is_one_line_and_leaves_nothing(
    serve: Callable[..., Server], tmp_path: Path, answer: object, most: int, expected: str
) -> None:
    server = serve(answer)
    with pytest.raises(RetortError, match=expected) as refused:
        RemoteLocation("s3://bucket/store").fetch("x", tmp_path / "x", EXPECTED)
    assert len(server.asked) <= most
    assert str(refused.value).startswith("s3://bucket/store/x") and "\n" not in str(refused.value)
    assert len(str(refused.value)) < 700
    assert not list(tmp_path.iterdir())


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt, as in a command; workers of pytest-xdist may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("interrupted", [False, True])
def test_an_upload_that_fails_or_is_interrupted_is_taken_back(
    serve: Callable[..., Server], tmp_path: Path, interrupted: bool
) -> None:
    signalled = threading.Event()

    def answer(number: int, asked: Asked) -> tuple[bytes, bool]:
        if "uploads" in asked.line:
            return reply(b"<InitiateMultipartUploadResult><UploadId>7</UploadId></InitiateMultipartUploadResult>"), True
        second = "partNumber=2" in asked.line
        if interrupted and second:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C during the upload, delivered to the main thread
            signalled.set()
        elif interrupted and "partNumber" in asked.line:
            signalled.wait(30)  # otherwise all parts could finish before the second signal
        return reply(status="403 Forbidden" if second and not interrupted else "200 OK"), True

    server = serve(answer)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(12 * PART)
    place = RemoteLocation("s3://bucket/store")
    with pytest.raises(KeyboardInterrupt if interrupted else RetortError) as stopped:
        place.put(tmp_path / "large", "x")
    assert interrupted or re.match("s3://bucket/store/x: .*403 Forbidden", str(stopped.value))
    asked = [request.line.split()[:2] for request in server.asked]
    parts = [request for request in server.asked if "partNumber" in request.line]
    digest = hashlib.sha256(bytes(PART)).hexdigest()  # the server compares it with the bytes received
    assert {request.headers["x-amz-content-sha256"] for request in parts} == {digest}
    assert ["DELETE", "/bucket/store/x?uploadId=7"] in asked
    assert ["POST", "/bucket/store/x?uploadId=7"] not in asked, "never completed, so never visible"
    assert not interrupted or len(asked) < 14, "not after all parts"


def test_a_listing_of_several_pages_is_whole(serve: Callable[..., Server]) -> None:
    entry = (
        "<Contents><Key>store/{}</Key><Size>{}</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
    )

    def answer(number: int, asked: Asked) -> tuple[bytes, bool]:
        more = "<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>" * (number == 1)
        page = "".join(entry.format(key, key) for key in range(10 * number, 10 * number + 10))
        return reply(f"<ListBucketResult>{more}{page}</ListBucketResult>".encode()), True

    serve(answer)
    assert Objects("s3://bucket/store").sizes() == {str(key): key for key in range(10, 30)}


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[S3]:
    with running_s3(tmp_path / "cache") as running:
        yield running


def test_large_and_empty_and_odd_objects_arrive_bit_for_bit(s3: S3, tmp_path: Path) -> None:
    place = RemoteLocation(f"{s3.root}/a b%20+ü")
    contents = {"large": DATA * 2, "empty": b"", "odd name/%41 ü+&?": b"odd", "small": DATA[:10]}
    for name, data in contents.items():
        (tmp_path / "file").write_bytes(data)
        place.put(tmp_path / "file", name)
    assert s3.objects() == {f"a b%20+ü/{name}": data for name, data in contents.items()}
    assert len(s3.requests("PUT", "partNumber")) == 3
    again = RemoteLocation(place.url)
    with ThreadPoolExecutor(16) as pool:  # one connection, many threads
        read = list(pool.map(again.read, [*contents] * 3))
    assert read == [*contents.values()] * 3
    assert {name: again.size(name) for name in contents} == {name: len(data) for name, data in contents.items()}
    with pytest.raises(RetortError, match=r"empty: InvalidRange: .*; it is damaged: 0 bytes"):
        again.fetch("empty", tmp_path / "back", EXPECTED)
    assert again.sha256("large") == hashlib.sha256(DATA * 2).hexdigest()


def in_a_fork(work: Callable[[], object]) -> object:
    """Return the result of `work` in a forked process, or the text of its RetortError if it raises one."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        try:
            sender.send(work())
        except RetortError as error:
            sender.send(str(error))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    try:
        assert receiver.poll(60), "the forked process waits forever"
        return receiver.recv()
    finally:
        process.kill()
        process.join()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_reads_and_writes_after_its_parent_did(s3: S3, tmp_path: Path) -> None:
    place = RemoteLocation(s3.root)
    place.write("small", b"small")
    (tmp_path / "large").write_bytes(DATA)
    place.put(tmp_path / "large", "large")
    assert place.read("small") == b"small"

    def work() -> object:
        place.write("new", b"new")
        place.put(tmp_path / "large", "other")
        place.fetch("large", tmp_path / "back", EXPECTED)
        return place.read("small"), RemoteLocation(place.url).size("other"), place.sha256("other")

    assert in_a_fork(work) == (b"small", *EXPECTED)
    assert (tmp_path / "back").read_bytes() == DATA == s3.objects()["other"]
    assert s3.objects()["new"] == b"new"
    gone = in_a_fork(lambda: place.read("nothing"))
    assert re.match(rf"{s3.root}/nothing: NoSuchKey.*; it was deleted", str(gone))


def test_a_place_in_another_process_holds_no_credentials(s3: S3) -> None:
    place = RemoteLocation(s3.root)
    place.write("x", b"x")
    pickled = pickle.dumps(place)
    assert b"secret" not in pickled and b"anybody" not in pickled
    again = pickle.loads(pickled)  # noqa: S301
    assert again.read("x") == b"x"


@pytest.mark.parametrize(
    ("url", "kind", "bucket", "prefix", "account"),
    [
        ("s3://bucket", "s3", "bucket", "", None),
        ("s3a://my.bucket-1/a/b/", "s3", "my.bucket-1", "a/b", None),
        ("s3://bucket/a b%20?c#d", "s3", "bucket", "a b%20?c#d", None),
        ("gcs://bucket/a", "gs", "bucket", "a", None),
        ("az://container/a", "az", "container", "a", None),
        ("abfss://container@account.dfs.core.windows.net/a", "az", "container", "a", "account"),
    ],
)
def test_a_url_is_taken_literally(url: str, kind: str, bucket: str, prefix: str, account: str | None) -> None:
    assert Address.of(url) == Address(kind, bucket, prefix, account)


@pytest.mark.parametrize(
    "url",
    ["s3://a//b", "s3://a/./b", "s3://a/../b", "s3://key:secret@a/b", "http://a/b", "memory://a", "s3:///a"],
)
def test_a_url_that_names_no_place_is_refused(url: str) -> None:
    with pytest.raises(RetortError, match=r"expected|into the environment"):
        RemoteLocation(url).size("x")


def test_a_file_url_is_a_folder_and_a_root_names_a_bucket(tmp_path: Path) -> None:
    assert root_text(f"file://{tmp_path}/stores/") == f"{tmp_path}/stores"
    assert location_of(f"file://{tmp_path}", "a/b") == LocalLocation(tmp_path / "a/b")
    for root in ("s3://", "s3:/bucket/x", "s3:bucket", "file://", ""):
        with pytest.raises(RetortError, match="ROOT of all stores"):
            root_text(root)


def test_azure_without_an_account_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(
        RetortError, match=r"az://container/a: .*Account must be specified; .*AZURE_STORAGE_ACCOUNT_NAME"
    ):
        RemoteLocation("az://container/a").size("x")
