"""Opened audio files: sequential reading in blocks, and parts of long files without decoding all of them.

Parts are read by a seek where it is exact: WAV, FLAC, AIFF, Ogg and others give the same samples after a seek as when
they are read from the beginning. In MP3 a frame depends on those before it (libsndfile's samples after a seek differ,
and mpg123 prints errors), GSM can't seek, and a file of unknown length has no place to seek to. `Forward` decodes those
once, from the beginning, for all of their parts.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from pipelines.readers.headers import Header, Patched, patch_bytes, read_header

_BLOCK_VALUES = 1 << 18  # 1 MB of float32 over all channels
_UNKNOWN_LENGTH = 1 << 62  # libsndfile gives 2^63 - 1
_HEADERS = 64  # of files with parts: more than are decoded at a time


class Stream(soundfile.SoundFile):  # type: ignore[misc]
    """A file that is read sequentially.

    soundfile otherwise seeks after every block, which fails for a FLAC of unknown length and changes the samples of
    lossy decoders.
    """

    def seekable(self) -> bool:
        return False


@contextmanager
def open_audio(path: Path, data: bytes | None, header: Header) -> Iterator[Stream]:
    """Open a file, or the bytes of one, with the patches of its header."""
    with ExitStack() as stack:
        if data is not None:
            patched = bytearray(data) if header.patches else data
            patch_bytes(patched, header.patches)
            source: io.BytesIO | Patched | Path = io.BytesIO(patched)
        else:
            source = stack.enter_context(Patched(path, header.patches)) if header.patches else path
        yield stack.enter_context(Stream(source))


def read_header_of(path: Path, data: bytes | None, *, has_parts: bool) -> Header:
    """Return the header of a file, or of the bytes of one.

    Checks of MP3 and Ogg read the whole file. The parts of a file share one check.
    """
    if data is not None:
        return read_header(io.BytesIO(data))
    if not has_parts:
        with path.open("rb") as file:
            return read_header(file)
    found = path.stat()
    with _ONE_CHECK:  # threads that decode parts of one file wait for the first of them
        return _cached_header(path, found.st_size, found.st_mtime_ns)


_ONE_CHECK = threading.Lock()


@lru_cache(maxsize=_HEADERS)
def _cached_header(path: Path, size: int, mtime_ns: int) -> Header:
    return read_header_of(path, None, has_parts=False)


def known_length(file: Stream, header: Header) -> int | None:
    """Return the samples of a file, None where its header lacks them (libsndfile estimates those of an MP3)."""
    return int(file.frames) if file.frames < _UNKNOWN_LENGTH and header.counted is None else None


def seeks_exactly(file: Stream, header: Header) -> bool:
    """Return whether the samples after a seek are those of a file that is read from its beginning."""
    can_seek = soundfile.SoundFile.seekable(file)
    return can_seek and file.format != "MP3" and known_length(file, header) is not None


def blocks(file: Stream, wanted: int | None) -> Iterator[NDArray[np.float32]]:
    """Yield blocks of float32 (frames, channels) to the end, or until there are `wanted` frames."""
    size, left = max(1, _BLOCK_VALUES // file.channels), wanted
    while left is None or left > 0:
        block_TC = file.read(size if left is None else min(size, left), dtype="float32", always_2d=True)
        if not len(block_TC):
            return
        yield block_TC
        left = None if left is None else left - len(block_TC)


class Forward:
    """Parts of a file that can't seek exactly, in order of their start: the file is decoded once and stays open.

    The samples from the start of the last part on are kept, since the next part may overlap it. A part that starts
    before them, or is of another file, opens its file again.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._stack = ExitStack()
        self._first = 0  # sample at which the kept ones begin
        self._kept_TC = np.zeros((0, 1), np.float32)

    def __enter__(self) -> "Forward":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def part(self, path: Path, header: Header, begin: int, count: int) -> NDArray[np.float32]:
        """Return float32 (count, channels) from the sample `begin` on, fewer at the end of the file."""
        if path != self._path or begin < self._first:
            self._stack.close()
            self._first = 0
            self._file = self._stack.enter_context(open_audio(path, None, header))
            self._kept_TC = np.zeros((0, self._file.channels), np.float32)
        self._path = None  # after an error in this method the position is not known: the next part opens the file again
        self._drop_before(begin)
        found = [self._kept_TC]
        missing = begin + count - self._first - len(self._kept_TC)
        for block_TC in blocks(self._file, max(missing, 0)):
            if self._first + len(block_TC) <= begin and not sum(map(len, found)):
                self._first += len(block_TC)  # before the part
            else:
                found.append(block_TC)
        self._kept_TC, self._path = np.concatenate(found), path
        self._drop_before(begin)
        return self._kept_TC[:count]

    def _drop_before(self, begin: int) -> None:
        dropped = min(begin - self._first, len(self._kept_TC))
        self._kept_TC = self._kept_TC[dropped:].copy()  # a view would keep what it is a view of
        self._first += dropped
