"""Repositories of the Hugging Face Hub: one commit of files, with every failure as one line.

huggingface_hub does the transfer. It takes the address from HF_ENDPOINT and the token from `hf auth login` or HF_TOKEN.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from extract.base.errors import RetortError

Kind = Literal["model", "dataset"]


def commit_files(repo: str, files: Mapping[str, Path | bytes], *, kind: Kind, message: str, private: bool) -> None:
    """Commit files, by their paths in the repository; files there with the same content are not sent again.

    A repository that does not exist is made, `private` or public. Raises RetortError if the Hub refuses or is not
    reached: then nothing is committed.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with in_one_line(repo):
        api = HfApi()
        api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        additions = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        api.create_commit(repo, additions, repo_type=kind, commit_message=message)


@contextmanager
def in_one_line(repo: str) -> Iterator[None]:
    """Convert what huggingface_hub raises for a refusal or failure of the Hub into a RetortError of one line."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined, unused-ignore]
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # of the HTTP client, which differs between versions of huggingface_hub
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except HFValidationError as error:
        raise RetortError(f"{repo!r} is not a name of a repository ({_first_line(error)}); give USER/NAME") from None
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise RetortError(
            f"{repo}: the Hub refused ({_first_line(error)}); check the name, log in with `hf auth login`, or set "
            "HF_TOKEN to a token that may write there"
        ) from None
    except OfflineModeIsEnabled:
        raise RetortError(f"{repo}: HF_HUB_OFFLINE is set, so the Hub is not asked; unset it") from None
    except (HTTPError, LocalEntryNotFoundError) as error:  # the latter of a download
        raise RetortError(
            f"{repo}: the Hub was not reached ({_first_line(error)}); check the network and HF_ENDPOINT, then run the "
            "command again"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].strip() if str(error).strip() else type(error).__name__
