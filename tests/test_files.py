"""Atomic writing: complete files or none if the writer is killed, and no temporary files left."""

import shutil
from pathlib import Path

import pytest

from extract.base.files import check_out, read_json, write_json, written_aside


class Killed(BaseException):
    """Stands for a kill of the process at a chosen moment; Retort never catches it."""


def make_folder(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.mkdir()
        for name in ("made_from.json", "weights"):
            (aside / name).write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_kill_while_a_folder_is_replaced_leaves_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "student"
    make_folder(out, "old")

    def killed_amid(folder: Path, **_: object) -> None:
        (folder / "made_from.json").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed_amid)
        with pytest.raises(Killed):
            make_folder(out, "new")
    assert names(out) == ["made_from.json", "weights"]
    check_out(out, "--out", folder_with="made_from.json")  # the same command is not refused
    make_folder(out, "newer")
    assert {file.read_text() for file in out.iterdir()} == {"newer"}
    assert names(tmp_path) == ["student"]


def test_what_a_killed_writer_left_is_swept_by_the_next_of_the_same_file(tmp_path: Path) -> None:
    for name in (".score[1].json.01234567.aside", ".score1.json.01234567.aside"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".score[1].json.89abcdef.aside").mkdir()
    write_json(tmp_path / "score[1].json", {"test": 1})
    assert names(tmp_path) == [".score1.json.01234567.aside", "score[1].json"]


def test_a_living_writer_is_not_swept(tmp_path: Path) -> None:
    path = tmp_path / "score.json"
    with written_aside(path) as slow:
        slow.write_text('{"writer": "slow"}')
        write_json(path, {"writer": "quick"})
        assert slow.exists() and read_json(path) == {"writer": "quick"}
    assert read_json(path) == {"writer": "slow"}
    assert names(tmp_path) == ["score.json"]
