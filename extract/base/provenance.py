"""Provenance of a result: the revision of the code, and the processor or GPU that computed.

It is recorded beside results that only the report reads. A manifest or a student's folder holds no revision: later
stages depend on their bytes, and a commit without effect on them must not run these stages again.
"""

import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the code
# Written by `dvc repro` itself: a run does not change the code that it runs.
_WRITTEN = (":(exclude,glob)**/dvc.lock", ":(exclude,glob)**/metrics/**")


@dataclass(frozen=True, kw_only=True)
class Revision:
    """State of a git checkout."""

    commit: str  # sha, in full
    branch: str | None  # None for a detached HEAD, as in a temporary DVC experiment
    changed: tuple[str, ...]  # tracked files that differ from the commit

    def __str__(self) -> str:
        """Return the first characters of the commit; -dirty marks changes, as in `git describe`."""
        return self.commit[:12] + ("-dirty" if self.changed else "")


def read_revision(root: Path = ROOT) -> Revision | None:
    """Return the revision of the checkout at `root`; None without git, and for a folder that is not a checkout."""
    top = _git(root, "rev-parse", "--show-toplevel")
    # A release that was unpacked inside another repository does not have that repository's revision.
    if top is None or Path(top).resolve() != root.resolve() or (commit := _git(root, "rev-parse", "HEAD")) is None:
        return None
    status = _git(root, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=no", "--", ".", *_WRITTEN)
    lines = (status or "").split("\0")
    return Revision(
        commit=commit,
        branch=_git(root, "symbolic-ref", "--short", "--quiet", "HEAD"),
        changed=tuple(line[3:] for line in lines if line),  # two letters of state and a space before the path
    )


def _git(root: Path, *arguments: str) -> str | None:
    """Return the output of a git command in `root`, None if it fails or git is not installed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip("\n")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Code and device of one result."""

    revision: str | None  # None outside a git checkout
    device: str  # model of the processor or GPU

    @classmethod
    def of(cls, device: str) -> "Provenance":
        """Return the provenance of what the running code computes on a device of this model."""
        return cls(revision=_own_revision(), device=device)


@cache
def _own_revision() -> str | None:
    """Return the revision at the first call; a commit that is made while the process runs does not change its code."""
    return None if (revision := read_revision()) is None else str(revision)
