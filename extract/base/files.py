"""Atomic writing, JSON and digests of the files that stages leave behind.

Every file is written under a temporary name beside its final one, flushed to the disk and renamed. A reader therefore
sees either the old file or the complete new one, even if the writer is killed. Temporary files of killed writers are
removed by the next writer.

Relative paths of large files (corpora, stores, checkpoints) are relative to the main working tree. A temporary DVC
experiment runs in a copy of the tracked files below `.dvc/tmp/exps`, which does not hold them. Inputs that may be in
git or not (data sets, upstreams) are looked for in both (`find_input`).
"""

import fcntl
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from extract.base.errors import RetortError

ASIDES = ".*.aside"  # temporary files of `written_aside`, as a pattern for `sweep`


@contextmanager
def written_aside(path: Path, *, swept: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it and rename it to `path`, on failure remove it.

    The body makes a file or a folder there. An existing folder at `path` is replaced. Temporary files of killed
    writers of `path` are removed first, unless the caller has `swept` the folder: that lists all of its files, which
    would be quadratic for the many files of a store.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not swept:
        sweep(path.parent, f".{glob.escape(path.name)}.*.aside")
    aside, before = (path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.aside") for _ in range(2))
    with writing_in(path.parent):
        try:
            yield aside
            if aside.is_dir():
                for file in aside.rglob("*"):
                    if file.is_file():
                        flush(file)
                if path.is_dir():
                    path.replace(before)  # rename() needs an empty target; removing it could be killed half-way
            else:
                flush(aside)
            aside.replace(path)
            flush(path.parent)  # the rename itself survives a power failure
        finally:
            for left in (aside, before):
                _remove(left)


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Keep `sweep` out of a folder while files are written aside in it or below; the lock ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # the file system has no locks: `sweep` does nothing there
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def sweep(folder: Path, *patterns: str) -> None:
    """Remove what killed processes left: files that match the patterns, unless a process is `writing_in` the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process writes, or the file system has no locks
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


def flush(path: Path) -> None:
    """Write a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share(path: Path) -> None:
    """Give a file mode 0644. safetensors makes files that only their owner can read, which fails on a shared disk."""
    path.chmod(0o644)


def check_out(path: Path, option: str, *, folder_with: str | None = None) -> None:
    """Check before the work that the result can be written to `path`. Raises RetortError that names the `option`.

    folder_with: the result is a folder. An existing one is replaced if it is empty or holds a file of this name.
    """
    if folder_with is None and path.is_dir():
        raise RetortError(f"{option} {path} is a folder; give a file")
    if folder_with is not None and path.is_dir() and any(path.iterdir()) and not (path / folder_with).exists():
        raise RetortError(
            f"{option} {path} is a folder without {folder_with}, whose content would be replaced; give a new folder"
        )
    if folder_with is not None and path.exists() and not path.is_dir():
        raise RetortError(f"{option} {path} is a file; give a folder")
    above = path.absolute().parent
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise RetortError(f"{option} {path}: {above} is not a folder; give another path")
    if not os.access(above, os.W_OK | os.X_OK):
        raise RetortError(f"{option} {path}: {above} is not writable; give another path")


def write_parts(path: Path, parts: Sequence[Any], *, swept: bool = False) -> list[Any]:
    """Write buffers of bytes end to end, atomically; return [bytes, sha256] of the file, which is not read again.

    swept: as for `written_aside`.
    """
    digest = hashlib.sha256()
    # sha256 runs without the interpreter's lock and takes longer than the copy to the system's cache: beside it.
    with (
        written_aside(path, swept=swept) as aside,
        ThreadPoolExecutor(1, "sha256") as hashing,
        aside.open("wb") as file,
    ):
        hashed = [hashing.submit(digest.update, part) for part in parts]
        for part in parts:
            file.write(part)
        for future in hashed:
            future.result()
        return [file.tell(), digest.hexdigest()]


def write_json(path: Path, value: object, *, swept: bool = False) -> None:
    """Write `value` as indented JSON with sorted keys, atomically; `swept` as for `written_aside`."""
    with written_aside(Path(path), swept=swept) as aside:
        aside.write_text(json_text(value), encoding="utf-8")


def json_text(value: object) -> str:
    """Return a JSON value as text: sorted keys, so that equal values give equal bytes."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises RetortError if the file is missing or does not hold one."""
    try:
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise RetortError(f"{path} does not exist; run the stage that makes it (`dvc repro` runs all)") from None
    except IsADirectoryError:
        raise RetortError(f"{path} is a folder; give the JSON file") from None
    return parse_json(data, where=str(path))


def parse_json(data: bytes, *, where: str) -> dict[str, Any]:
    """Parse bytes as a JSON object. Raises RetortError that names `where` they came from if they are not one."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RetortError(f"{where} is not JSON ({error}); delete it and run the stage that makes it again") from None
    if not isinstance(value, dict):
        raise RetortError(f"{where} holds a JSON {type(value).__name__}, expected an object")
    return value


def in_main_tree(path: Path | str) -> Path:
    """Return a relative `path` as a path below the main working tree, also from a temporary DVC experiment."""
    path = Path(path).expanduser()
    if path.is_absolute():
        return path
    here = Path.cwd()
    for folder in (here, *here.parents):
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):  # the current folder is inside a temporary experiment
            return folder.parents[2] / path
    return here / path


def find_input(path: Path | str) -> Path:
    """Return a relative `path` as it is if it exists here, else below the main working tree."""
    path = Path(path)
    return path if path.exists() or not in_main_tree(path).exists() else in_main_tree(path)


def sha256_json(value: object) -> str:
    """Return the sha256 (hex) of a JSON value; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sha256_matching(root: Path, patterns: Iterable[str]) -> str:
    """Return the sha256 (hex) of the paths and bytes of the files below `root` that match any of the glob patterns."""
    files = sorted({path for pattern in patterns for path in root.glob(pattern)})
    return sha256_json({path.relative_to(root).as_posix(): sha256_file(path) for path in files})


def sha256_file(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_at(descriptor: int, into: memoryview, offset: int) -> int:
    """Fill bytes from a byte of a file on; return how many of them the file ends too early."""
    while len(into) and (num_read := os.preadv(descriptor, [into], offset)):  # a read may return fewer than asked
        into, offset = into[num_read:], offset + num_read
    return len(into)
