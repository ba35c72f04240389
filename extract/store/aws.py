"""Configuration of S3: server, region and credentials, from the environment and the folder `~/.aws`.

obstore reads AWS_* variables and uses the metadata service of Amazon's machines. This module adds the sources that
other clients of S3 use: profiles, the bucket's region, certificates. Order of credentials: AWS_SKIP_SIGNATURE=true (a
public bucket), AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a role of a container or a pod, the profile (AWS_PROFILE or
`default`), the metadata service.
"""

import configparser
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from extract.base.errors import RetortError

if TYPE_CHECKING:
    from obstore.store import S3Config, S3Credential

_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_OF_ROLES = (  # variables of roles, which obstore reads itself
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_BY_OTHERS = ("credential_process", "role_arn", "sso_session", "sso_start_url", "login_session")  # need boto3
_TRUE = ("1", "true", "yes", "on")

Provider = Callable[[], "S3Credential"]


def s3_options(bucket: str) -> tuple["S3Config", Provider | None, bytes | None]:
    """Return server, region and keys for a bucket, a provider of credentials if one is needed, and certificates.

    Raises RetortError for an invalid address, profile or file of certificates, and if there are no credentials.
    """
    profile = _profile()
    config: S3Config = {}
    endpoint = _first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT") or profile.get("endpoint_url")
    if endpoint:
        config["endpoint"] = _checked_endpoint(endpoint)
    region = _first("AWS_REGION", "AWS_DEFAULT_REGION") or profile.get("region")
    config["region"] = region or ("us-east-1" if endpoint else bucket_region(bucket))
    provider = _add_credentials(config, profile)
    return config, provider, _certificates()


def metadata_endpoint() -> str:
    """Return the address of the metadata service of Amazon's machines."""
    return os.environ.get("AWS_METADATA_ENDPOINT") or "http://169.254.169.254"


def bucket_region(bucket: str, server: str = "https://s3.amazonaws.com") -> str:
    """Return the region of a bucket, which needs no credentials; Amazon's default region without an answer."""
    request = urllib.request.Request(f"{server}/{bucket}", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as refused:  # a refusal has the region in its headers, too
        headers = refused.headers
    except (OSError, ValueError):
        return "us-east-1"
    return headers.get("x-amz-bucket-region") or "us-east-1"


def _add_credentials(config: "S3Config", profile: dict[str, str]) -> Provider | None:
    """Add a profile's keys to `config`, or return its provider; neither if obstore finds the credentials itself."""
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in _TRUE:
        return None
    given = [name for name in _KEYS if os.environ.get(name)]
    if len(given) == 1:
        missing = next(name for name in _KEYS if name not in given)
        raise RetortError(f"{given[0]} is set and {missing} is not; set both")
    if given or _first(*_OF_ROLES):
        return None
    if "aws_access_key_id" in profile and "aws_secret_access_key" in profile:
        config["access_key_id"] = profile["aws_access_key_id"]
        config["secret_access_key"] = profile["aws_secret_access_key"]
        if token := profile.get("aws_session_token"):
            config["session_token"] = token
        return None
    if any(key in profile for key in _BY_OTHERS):
        return _Boto3(_profile_name())
    emptied = any(name in os.environ for name in _KEYS)  # obstore would sign with an empty key
    if emptied or os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() in _TRUE:
        raise RetortError(
            f"Unable to locate credentials; set {' and '.join(_KEYS)}, or AWS_PROFILE to a profile that has them; "
            "AWS_SKIP_SIGNATURE=true reads a public bucket without any"
        )
    return None


@dataclass(frozen=True)
class _Boto3:
    """Credentials of a profile that takes them from a command, a role or a login, by boto3 if it is installed."""

    profile: str

    def __post_init__(self) -> None:
        try:
            import boto3  # noqa: F401
        except ImportError:
            raise RetortError(
                f"profile {self.profile} takes its credentials from a command, a role or a login; pip install boto3, "
                f'or: eval "$(aws configure export-credentials --profile {self.profile} --format env)"'
            ) from None

    def __call__(self) -> "S3Credential":
        import boto3

        found = boto3.Session(profile_name=self.profile).get_credentials()
        if found is None:
            raise RetortError(f"profile {self.profile} gives no credentials")
        keys = found.get_frozen_credentials()
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": datetime.now(UTC) + timedelta(minutes=10),  # boto3 renews credentials that expire sooner
        }


def _profile_name() -> str:
    return _first("AWS_PROFILE", "AWS_DEFAULT_PROFILE") or "default"


def _profile() -> dict[str, str]:
    """Return the entries of the profile in both of Amazon's files. Raises RetortError for a name that neither has."""
    name, names = _profile_name(), set()
    found: dict[str, str] = {}
    config = Path(os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config").expanduser()
    shared = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials").expanduser()
    for file in (config, shared):  # the second file overrides the first, as in Amazon's clients
        for section, entries in _sections(file).items():
            own = section.removeprefix("profile ").strip() if file == config else section
            names.add(own)
            if own == name:
                found |= entries
    if name not in names and _first("AWS_PROFILE", "AWS_DEFAULT_PROFILE"):
        listed = ", ".join(sorted(names)) or "(none)"
        raise RetortError(f"AWS_PROFILE: {name!r} is in neither {config} nor {shared}; expected one of {listed}")
    return found


def _sections(file: Path) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(interpolation=None, default_section="", strict=False)
    try:
        parser.read_string(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, configparser.Error) as error:
        raise RetortError(f"{file}: {' '.join(str(error).split())}; correct it, or unset AWS_PROFILE") from None
    return {name: dict(parser[name]) for name in parser.sections()}


def _checked_endpoint(endpoint: str) -> str:
    wrong = RetortError(f"AWS_ENDPOINT_URL: got {endpoint!r}, expected an address such as https://s3.example.org")
    try:
        parts = urlsplit(endpoint)
        _ = parts.port  # raises ValueError for a port that is not a number
    except ValueError:
        raise wrong from None
    plain = endpoint.isascii() and endpoint.isprintable() and " " not in endpoint
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or not plain:
        raise wrong
    return endpoint.rstrip("/")


def _certificates() -> bytes | None:
    file = os.environ.get("AWS_CA_BUNDLE")
    try:
        return Path(file).read_bytes() if file else None
    except OSError as error:
        raise RetortError(f"AWS_CA_BUNDLE: can't read {file} ({error.strerror}); give a PEM file") from None


def _first(*names: str) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)
