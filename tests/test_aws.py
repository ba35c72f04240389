"""Configuration of S3: keys, region and server, from the environment, from profiles and from Amazon."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from extract.base.errors import RetortError
from extract.store.aws import bucket_region
from extract.store.location import RemoteLocation
from tests.faulty_server import Server, reply, serving
from tests.s3_world import running_s3

DATA = b"some bytes"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    with serving(monkeypatch, tmp_path) as start:
        yield start


def test_a_public_bucket_needs_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_s3(tmp_path / "cache") as s3:
        RemoteLocation(s3.root).write("x", b"x")
        s3.client.put_object_acl(Bucket="features", Key="stores/x", ACL="public-read")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
        assert RemoteLocation(s3.root).read("x") == b"x"


def signer(server: Server) -> tuple[str, str]:
    """Return the key and the region that signed the last request."""
    found = re.search(r"Credential=([^/]+)/\d+/([^/]+)/s3", server.asked[-1].headers["authorization"])
    assert found
    return found[1], found[2]


def test_keys_and_region_come_from_the_environment_then_from_the_profile(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(lambda number, asked: (reply(DATA), True))
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = first\naws_secret_access_key = one%\n"
        "[far]\naws_access_key_id = second\naws_secret_access_key = two\naws_session_token = token\n"
    )
    (tmp_path / "config").write_text(
        "[profile far]\nregion = eu-west-1\nendpoint_url = http://nowhere.example\n[default]\nregion = eu-north-1\n"
        f"[profile command]\ncredential_process = {sys.executable} {tmp_path / 'keys.py'}\n"
    )
    keys = {"Version": 1, "AccessKeyId": "third", "SecretAccessKey": "three"}
    (tmp_path / "keys.py").write_text(f"print('''{json.dumps(keys)}''')")

    def signed() -> tuple[str, str]:
        RemoteLocation("s3://bucket/store").read("x")
        return signer(server)

    assert signed() == ("anybody", "us-east-1")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert signed() == ("anybody", "eu-north-1")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert signed() == ("first", "eu-north-1")
    monkeypatch.setenv("AWS_PROFILE", "far")
    assert signed() == ("second", "eu-west-1")
    assert server.asked[-1].headers["x-amz-security-token"] == "token"
    monkeypatch.setenv("AWS_PROFILE", "command")
    assert signed() == ("third", "us-east-1")
    monkeypatch.setenv("AWS_REGION", "eu-south-1")
    assert signed() == ("third", "eu-south-1")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"AWS_SECRET_ACCESS_KEY": ""}, "AWS_ACCESS_KEY_ID is set and AWS_SECRET_ACCESS_KEY is not; set both"),
        ({"AWS_PROFILE": "nobody"}, "AWS_PROFILE: 'nobody' is in neither .*; expected one of command, default"),
        ({"AWS_CONFIG_FILE": __file__}, r"test_aws.py: .*; correct it"),
        ({"AWS_ENDPOINT_URL": "s3.example.org"}, "AWS_ENDPOINT_URL: got 's3.example.org', expected an address"),
        ({"AWS_ENDPOINT_URL": "http://a b"}, "AWS_ENDPOINT_URL: got 'http://a b'"),
        ({"AWS_ENDPOINT_URL": "http://a:port"}, "AWS_ENDPOINT_URL: got 'http://a:port'"),
        ({"AWS_ENDPOINT_URL": "http://"}, "AWS_ENDPOINT_URL: got 'http://'"),
        ({"AWS_CA_BUNDLE": "nowhere.pem"}, "AWS_CA_BUNDLE: can't read nowhere.pem"),
        ({"AWS_CA_BUNDLE": __file__}, "s3://bucket/store: "),
        ({"AWS_MAX_ATTEMPTS": "many"}, "AWS_MAX_ATTEMPTS: got 'many'"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, r"Could not connect to http://127.0.0.1:9 \(Connection refused\)"),
        ({"AWS_ENDPOINT_URL": "https://127.0.0.1:9"}, r"Could not connect to https://127.0.0.1:9 \("),
        ({"AWS_ENDPOINT_URL": "http://no.invalid"}, r"Could not connect to http://no.invalid \(failed to look"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "Unable to locate credentials; set AWS_ACCESS_KEY_ID"),
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
            r"Unable to locate .*none from a metadata service",
        ),
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_EC2_METADATA_DISABLED": "true"},
            "Unable to locate credentials; set AWS_ACCESS_KEY_ID",
        ),
        ({"AWS_SKIP_SIGNATURE": "maybe"}, "maybe"),
        (
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None, "AWS_PROFILE": "command"},
            r"Unable to get credentials \(CredentialRetrievalError: ",
        ),
    ],
)
def test_a_server_or_keys_that_can_not_be_used_are_one_line(
    serve: Callable[..., Server],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str | None],
    expected: str,
) -> None:
    serve(lambda number, asked: (reply(DATA), True))
    (tmp_path / "config").write_text("[default]\nregion = us-east-1\n[profile command]\ncredential_process = false\n")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    for name, value in changes.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name)
    with pytest.raises(RetortError, match=expected) as refused:
        RemoteLocation("s3://bucket/store").size("x")
    assert "\n" not in str(refused.value) and "secret" not in str(refused.value)


def test_the_region_of_a_bucket_comes_from_amazon() -> None:
    for status in ("200 OK", "301 Moved", "403 Forbidden"):
        answer = reply(status=status, **{"x-amz-bucket-region": "eu-west-3"})
        server = Server(lambda number, asked, answer=answer: (answer, False))  # type: ignore[misc]
        assert bucket_region("some.bucket", server.address) == "eu-west-3"
        assert server.asked[0].line.startswith("HEAD /some.bucket ")
        server.socket.close()
    assert bucket_region("none", Server(lambda number, asked: (reply(status="404 No"), False)).address) == "us-east-1"
    assert bucket_region("none", "http://127.0.0.1:9") == "us-east-1"
