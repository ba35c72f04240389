"""Files that outlive a stage: where they lie and how they are written.

Everything is written aside, flushed to the disk and renamed, so that a reader sees either the old file or the whole
new one, whatever kills the writer. Relative locations of bulky files (corpora, stores, checkpoints) mean the main
working tree, also from a temporary DVC experiment, which runs in a copy below `.dvc/tmp/exps`.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from extract.errors import RetortError


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it and rename it to `path`, on failure remove it.

    The body makes a file or a folder there. An existing folder at `path` is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.aside")
    try:
        yield aside
        if aside.is_dir():
            for file in aside.rglob("*"):
                if file.is_file():
                    _flush(file)
            if path.is_dir():
                shutil.rmtree(path)
        else:
            _flush(aside)
        aside.replace(path)
        _flush(path.parent)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON with sorted keys, atomically."""
    with written_aside(Path(path)) as aside:
        aside.write_text(json_text(value), encoding="utf-8")


def json_text(value: object) -> str:
    """A JSON value as our files have it."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises RetortError when the file is missing or is no JSON object."""
    try:
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise RetortError(f"{path} does not exist; run the stage that makes it (`dvc repro` runs all)") from None
    return parse_json(data, where=str(path))


def parse_json(data: bytes, *, where: str) -> dict[str, Any]:
    """Bytes as a JSON object. Raises RetortError, which names `where` they came from, when they are none."""
    try:
        value = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RetortError(f"{where} is not JSON ({error}); delete it and run the stage that makes it again") from None
    if not isinstance(value, dict):
        raise RetortError(f"{where} holds a JSON {type(value).__name__}, expected an object")
    return value


def in_main_tree(path: Path | str) -> Path:
    """Where a relative `path` lies: below the main working tree, also from a temporary DVC experiment."""
    path = Path(path).expanduser()
    if path.is_absolute():
        return path
    here = Path.cwd()
    for folder in (here, *here.parents):
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[2] / path
    return here / path


def sha256_json(value: object) -> str:
    """The sha256 (hex) of a JSON value, the same whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """The sha256 (hex) of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
