"""Checkpoint files: a round trip, and errors for damaged files."""

from pathlib import Path

import pytest
import torch

from extract.base.checkpoint import read_checkpoint, write_checkpoint
from extract.base.errors import RetortError


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "run" / "checkpoint.pt"
    assert read_checkpoint(path, format_version=1) is None
    weights = torch.randn(3, 2)
    for step in (1, 2):
        write_checkpoint(path, {"step": step, "model": {"weight": weights}}, format_version=1)
    found = read_checkpoint(path, format_version=1)
    assert found is not None and found.keys() == {"step", "model"}
    assert found["step"] == 2 and torch.equal(found["model"]["weight"], weights)
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


def test_a_flipped_byte_and_a_missing_end_are_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, {"weight": torch.randn(2_000)}, format_version=1)
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(RetortError, match=r"checkpoint.pt cannot be read"):
            read_checkpoint(path, format_version=1)
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RetortError, match="cannot be read"):
            read_checkpoint(path, format_version=1)


def test_another_format_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint.pt", {}, format_version=1)
    with pytest.raises(RetortError, match="another format, expected version 2"):
        read_checkpoint(tmp_path / "checkpoint.pt", format_version=2)
