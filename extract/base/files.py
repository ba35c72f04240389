"""Files that outlive a stage: where they lie and how they are written.

Everything is written aside, flushed to the disk and renamed, so that a reader sees either the old file or the whole
new one, whatever kills the writer; what a killed one left aside, the next one sweeps. Relative locations of bulky
files (corpora, stores, checkpoints) mean the main working tree, also from a temporary DVC experiment, which runs in a
copy below `.dvc/tmp/exps`.
"""

import fcntl
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it and rename it to `path`, on failure remove it.

    The body makes a file or a folder there. An existing folder at `path` is replaced. What killed writers of `path`
    left is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, f".{glob.escape(path.name)}.*.aside")
    aside, before = (path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.aside") for _ in range(2))
    with writing_in(path.parent):
        try:
            yield aside
            if aside.is_dir():
                for file in aside.rglob("*"):
                    if file.is_file():
                        _flush(file)
                if path.is_dir():
                    path.replace(before)  # a kill amid its removal would leave half a folder under its name
            else:
                _flush(aside)
            aside.replace(path)
            _flush(path.parent)
        finally:
            for left in (aside, before):
                _remove(left)


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Keep `sweep` out of a folder while something is written aside in it or below; ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks, where `sweep` does nothing
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def sweep(folder: Path, *patterns: str) -> None:
    """Remove what killed processes left in a folder, by its names; not while another one is `writing_in` it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # someone writes, or a file system without locks
        return
    else:
        for pattern in patterns:
            for left in list(folder.glob(pattern)):
                _remove(left)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_out(path: Path, option: str, *, folder_with: str | None = None) -> None:
    """Refuse a place that can't be written, or holds something else: told before the work, not after it.

    folder_with: a folder will stand at `path`; one that is there may be replaced if it is empty or holds this file.
    Raises RetortError, which names the `option`.
    """
    if folder_with is None and path.is_dir():
        raise RetortError(f"{option} {path} is a folder; give a file")
    if folder_with is not None and path.is_dir() and any(path.iterdir()) and not (path / folder_with).exists():
        raise RetortError(
            f"{option} {path} is a folder that holds something else (no {folder_with}), which would be replaced; give "
            "a new folder"
        )
    if folder_with is not None and path.exists() and not path.is_dir():
        raise RetortError(f"{option} {path} is a file; give a folder")
    above = path.absolute().parent
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise RetortError(f"{option} {path}: {above} is no folder, so nothing can be written below it")
    if not os.access(above, os.W_OK | os.X_OK):
        raise RetortError(f"{option} {path}: {above} is not writable; give another place")


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
    except IsADirectoryError:
        raise RetortError(f"{path} is a folder; give the JSON file") from None
    return parse_json(data, where=str(path))


def parse_json(data: bytes, *, where: str) -> dict[str, Any]:
    """Bytes as a JSON object. Raises RetortError, which names `where` they came from, when they are none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
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


def sha256_matching(root: Path, patterns: Iterable[str]) -> str:
    """The sha256 (hex) of the files below `root` that match any of the glob patterns: their paths and bytes."""
    files = sorted({path for pattern in patterns for path in root.glob(pattern)})
    return sha256_json({path.relative_to(root).as_posix(): sha256_file(path) for path in files})


def sha256_file(path: Path) -> str:
    """The sha256 (hex) of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
