"""Checkpoints from which a killed run continues: written atomically, verified by a digest when they are read.

Layout: a `torch.save` archive of a dict of tensors and plain values, then its sha256 (32 bytes). The digest is needed
because torch.load accepts a file with a flipped byte (59 of 60 flips, torch 2.11).
"""

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch

from extract.base.errors import RetortError
from extract.base.files import written_aside

_DIGEST_BYTES = hashlib.sha256().digest_size


def write_checkpoint(path: Path, value: dict[str, Any], *, format_version: int) -> None:
    """Write a checkpoint; the previous one is replaced once this one is complete."""
    buffer = io.BytesIO()
    torch.save({"format_version": format_version, **value}, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    with written_aside(path) as aside:
        aside.write_bytes(buffer.getbuffer())  # torch.save would turn a full disk into a RuntimeError


def read_checkpoint(path: Path, *, format_version: int) -> dict[str, Any] | None:
    """Read the checkpoint at `path` with its tensors on the CPU; None if there is none.

    Raises RetortError for a damaged file and for one of another format version.
    """
    try:
        content = memoryview(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        value_bytes, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        if hashlib.sha256(value_bytes).digest() != digest:
            raise EOFError
        value: dict[str, Any] = torch.load(io.BytesIO(value_bytes), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        raise RetortError(f"checkpoint {path} cannot be read; delete it to start anew") from None
    if value.pop("format_version", None) != format_version:
        raise RetortError(
            f"checkpoint {path} has another format, expected version {format_version}; delete it to start anew"
        )
    return value
