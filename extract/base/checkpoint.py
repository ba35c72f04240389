"""Files that a killed run goes on from: written whole or not at all, and known by their own digest.

torch.load takes a file with a flipped byte for a good one (59 of 60 flips, torch 2.11), so the digest of all
before it stands at the end. Values are dicts of tensors and plain values.
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
    """Write a checkpoint; the one before stays until this one is whole."""
    buffer = io.BytesIO()
    torch.save({"format_version": format_version, **value}, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    with written_aside(path) as aside:
        aside.write_bytes(buffer.getbuffer())  # torch hides a full disk in a RuntimeError; Python's own write does not


def read_checkpoint(path: Path, *, format_version: int) -> dict[str, Any] | None:
    """The checkpoint at `path`, its tensors on the CPU, or None. Raises RetortError for a damaged or other file."""
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
        raise RetortError(f"checkpoint {path} is of another format; delete it to start anew")
    return value
