"""Checks of the length that the header of an audio file declares against the bytes of the file.

libsndfile reads a truncated WAV, AIFF, AU, NIST, MP3 or Ogg file to its end without an error. `read_header` finds such
damage without decoding: by the chunk sizes of RIFF, RF64 and AIFF, the byte count of AU, the sample count of NIST, the
page checksums of Ogg and the frame headers of MPEG audio. libsndfile verifies the checksums of FLAC, and decode.py its
MD5 of all samples (`Header.flac_md5`).
"""

import io
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.readers.mpeg import walk_mpeg


@dataclass(frozen=True)
class Header:
    """Findings about one file.

    damage: the reason why the file can't be used; empty without damage.
    notes: oddities that do not change the samples.
    patches: (offset, bytes) that replace bytes of the file, where libsndfile does not support a streamed header.
    flac_md5: the MD5 of all samples and the bits per sample of a FLAC file that has it.
    counted: the number of samples of an MP3 that does not declare it, from its frames; libsndfile estimates it.
    checked: whether this module supports the format; for others there is only libsndfile's log.
    """

    damage: str = ""
    notes: tuple[str, ...] = ()
    patches: tuple[tuple[int, bytes], ...] = ()
    flac_md5: tuple[bytes, int] | None = None
    counted: int | None = None
    checked: bool = True


def read_header(file: BinaryIO) -> Header:
    """Compare the header of an opened file with its bytes. Raises OSError where it can't be read."""
    size = file.seek(0, io.SEEK_END)
    start = _id3_bytes(file)
    magic = _at(file, start, 4)
    if magic in _FORMATS:
        return _FORMATS[magic](file, start, size)
    if magic[:2] >= b"\xff\xe0":  # the sync word of MPEG audio
        damage, notes, counted = walk_mpeg(file, start, size)
        return Header(damage=damage, notes=notes, counted=counted)
    return Header(checked=False)


class Patched(io.FileIO):
    """A file opened for reading with some of its bytes replaced."""

    def __init__(self, path: Path, patches: tuple[tuple[int, bytes], ...]) -> None:
        super().__init__(path, "rb")
        self.patches = patches

    def readinto(self, buffer: Any) -> int:
        begin = self.tell()
        count = super().readinto(buffer) or 0
        patch_bytes(memoryview(buffer)[:count], self.patches, begin)
        return count


def patch_bytes(view: Any, patches: tuple[tuple[int, bytes], ...], begin: int = 0) -> None:
    """Replace bytes of a file in a buffer that holds it from the offset `begin` on."""
    for offset, patch in patches:
        for place, value in enumerate(patch, offset):
            if begin <= place < begin + len(view):
                view[place - begin : place - begin + 1] = bytes([value])


def _at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


def _id3_bytes(file: BinaryIO) -> int:
    """Return the length of an ID3v2 tag at the beginning: 4 x 7 bits, without its own header of 10 bytes."""
    tag = _at(file, 0, 10)
    if len(tag) < 10 or tag[:3] != b"ID3":
        return 0
    return 10 + sum((byte & 127) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))


def _truncated(present: int, declared: int, frame_bytes: int) -> str:
    """Return the damage of a file with `present` of `declared` bytes of audio; frame_bytes is 0 if compressed."""
    if frame_bytes:
        return f"truncated: {present // frame_bytes:,} of {declared // frame_bytes:,} samples"
    return f"truncated: {present:,} of {declared:,} bytes of audio"


def _is_unknown(length: int, bits: int = 32) -> bool:
    """Return whether a size is one that a writer leaves when it can't seek back to its header.

    Such sizes are all ones (ffmpeg), the largest of 31 bits less a header (sox) and 2^31 (arecord). 0 is ambiguous.
    """
    return length >= (1 << bits) - 256 or 0x7FFF_F000 <= length <= 0x8000_0000


_LINEAR_WAV = (1, 3, 6, 7)  # PCM, float, A-law, mu-law: a fixed number of bytes per sample
_MOST_BYTES = 0xFFFF_FFFF  # in RF64: the size is in the chunk ds64


def _riff(file: BinaryIO, start: int, size: int) -> Header:
    """Check WAV, RIFX and RF64: the size of the chunk `data` (in RF64, in `ds64`), and the chunks after it."""
    magic = _at(file, start, 4)
    order: Any = "big" if magic == b"RIFX" else "little"
    form_bytes = int.from_bytes(_at(file, start + 4, 4), order)
    place, frame_bytes, long_size = start + 12, 0, None
    while len(head := _at(file, place, 8)) == 8:
        name, length = head[:4], int.from_bytes(head[4:], order)
        if name == b"data":
            break
        if name == b"ds64":
            form_bytes, long_length = (int.from_bytes(_at(file, place + at, 8), order) for at in (8, 16))
            long_size = place + 16, long_length
        if name == b"fmt ":
            frame_bytes = _wav_frame_bytes(_at(file, place + 8, min(length, 40)), order)
        place += 8 + length + length % 2
    else:
        return Header(checked=False)
    begin, present, bits = place + 8, size - place - 8, 32
    sizes = [(start + 4, 4), (place + 4, 4)]
    if magic == b"RF64" and long_size is not None and length == _MOST_BYTES:
        length, bits, sizes = long_size[1], 64, [(long_size[0], 8)]
    # A size of 0 is that of an empty file, unless the file has bytes that neither of its two sizes counts.
    if _is_unknown(length, bits) or (length == 0 and present > 1 and start + 8 + form_bytes < size):
        return _streamed_riff(file, present, size, frame_bytes, sizes, order)
    if present < length:
        return Header(_truncated(present, length, frame_bytes))
    if frame_bytes and length % frame_bytes:
        return Header(f"its {length:,} bytes of audio are not a multiple of {frame_bytes}, the bytes per sample")
    return _chunks_after(file, begin + length + length % 2, size, order)


def _streamed_riff(
    file: BinaryIO, present: int, size: int, frame_bytes: int, sizes: list[tuple[int, int]], order: Any
) -> Header:
    """Patch the sizes of a WAV whose length its writer did not know, so that libsndfile reads the rest of the file."""
    over = present % frame_bytes if frame_bytes else 0
    if over > 1 or (over and _at(file, size - 1, 1) != b"\0"):  # one zero byte is padding
        return Header(f"truncated: ends inside a sample, {over} bytes of {frame_bytes}")
    values = [present - over] if len(sizes) == 1 else [size - 8, present - over]
    patches = [
        (place, min(value, _MOST_BYTES - 1).to_bytes(count, order))
        for (place, count), value in zip(sizes, values, strict=True)
    ]
    return Header(patches=tuple(patches))


def _wav_frame_bytes(fields: bytes, order: Any) -> int:
    """Return the bytes of one sample of all channels, or 0 for a compressed format."""
    tag = int.from_bytes(fields[:2], order)
    if tag == 0xFFFE:  # WAVE_FORMAT_EXTENSIBLE: the sub-format begins with the tag
        tag = int.from_bytes(fields[24:26], order)
    return int.from_bytes(fields[12:14], order) if tag in _LINEAR_WAV else 0


def _chunks_after(file: BinaryIO, place: int, size: int, order: Any) -> Header:
    """Check the end of the file after the audio: more chunks, or bytes that no size counts."""
    while place + 8 <= size:
        head = _at(file, place, 8)
        length = int.from_bytes(head[4:], order)
        if head[:4] == b"data":
            return Header("has a second chunk of audio, which decoders ignore; join the two")
        if not head[:4].isascii() or not head[:4].decode().isprintable() or place + 8 + length > size:
            break
        place += 8 + length + length % 2
    if left := _at(file, place, 1 << 16).strip(b"\0"):
        return Header(notes=("bytes after the samples that belong to no chunk",) if len(left) > 1 else ())
    return Header()


# Encoding of AIFF-C -> bytes per sample; 0: from the bits in COMM
_AIFF_BYTES = {
    b"NONE": 0, b"twos": 0, b"sowt": 0, b"in24": 3, b"in32": 4, b"fl32": 4, b"FL32": 4, b"fl64": 8, b"FL64": 8,
    b"raw ": 1, b"ulaw": 1, b"ULAW": 1, b"alaw": 1, b"ALAW": 1,
}  # fmt: skip


def _aiff(file: BinaryIO, start: int, size: int) -> Header:
    """Check AIFF and AIFF-C: the frames of `COMM` and the size of `SSND` against the bytes."""
    kind, place, declared, frame_bytes, audio = _at(file, start + 8, 4), start + 12, 0, 0, None
    if kind not in (b"AIFF", b"AIFC"):  # such as 8SVX
        return Header(checked=False)
    while len(head := _at(file, place, 8)) == 8:
        name, length = head[:4], int.from_bytes(head[4:], "big")
        if name == b"COMM":
            fields = _at(file, place + 8, 22)
            channels, declared, bits = (int.from_bytes(fields[a:b], "big") for a, b in ((0, 2), (2, 6), (6, 8)))
            code = fields[18:22] if kind == b"AIFC" else b"NONE"
            frame_bytes = channels * (_AIFF_BYTES.get(code, 0) or -(-bits // 8)) if code in _AIFF_BYTES else 0
        if name == b"SSND":
            skipped = 8 + int.from_bytes(_at(file, place + 8, 4), "big")
            audio = (length - skipped, size - place - 8 - skipped)
        place += 8 + length + length % 2
    if audio is None or audio[0] < 0:
        return Header(checked=False)
    if audio[1] < audio[0] and not _is_unknown(audio[0] + 8):
        return Header(_truncated(max(audio[1], 0), audio[0], frame_bytes))
    if frame_bytes and declared and audio[1] < declared * frame_bytes:
        return Header(_truncated(max(audio[1], 0), declared * frame_bytes, frame_bytes))
    return Header()


_AU_BYTES = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}  # encoding -> bytes per sample


def _au(file: BinaryIO, start: int, size: int) -> Header:
    """Check Sun's AU: the offset and the byte count of its header."""
    order: Any = "big" if _at(file, start, 4) == b".snd" else "little"
    fields = _at(file, start, 24)
    offset, declared, encoding, _, channels = (int.from_bytes(fields[at : at + 4], order) for at in range(4, 24, 4))
    present = max(size - start - offset, 0)
    if declared < _MOST_BYTES and present < declared:  # all ones: unknown
        return Header(_truncated(present, declared, channels * _AU_BYTES.get(encoding, 0)))
    return Header()


def _nist(file: BinaryIO, start: int, size: int) -> Header:
    """Check NIST SPHERE: `sample_count` of its header."""
    text = _at(file, start, 1 << 16).decode("latin-1")
    fields = dict(re.findall(r"^(\w+) -i (\d+)\s*$", text.partition("end_head")[0], re.MULTILINE))
    lines = text.split("\n", 2)
    if "sample_count" not in fields or len(lines) < 2 or not lines[1].strip().isdigit():
        return Header(checked=False)
    frame_bytes = int(fields.get("sample_n_bytes", 2)) * int(fields.get("channel_count", 1))
    present, declared = size - start - int(lines[1]), int(fields["sample_count"]) * frame_bytes
    return Header(_truncated(max(present, 0), declared, frame_bytes)) if present < declared else Header()


def _flac(file: BinaryIO, start: int, size: int) -> Header:
    """Read STREAMINFO's MD5 of all samples, which is 0 where the encoder omitted it."""
    info = _at(file, start + 8, 34)
    bits = ((info[12] & 1) << 4 | info[13] >> 4) + 1 if len(info) == 34 else 0
    return Header(flac_md5=(info[18:], bits) if bits in (8, 16, 24) and any(info[18:]) else None)


# Bytes with their bits in reverse order
_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


def _ogg(file: BinaryIO, start: int, size: int) -> Header:
    """Check every Ogg page by its checksum and number, and that the last one is marked as such (RFC 3533)."""
    place = start
    number_of: dict[bytes, int] = {}
    ended: set[bytes] = set()
    while place < size:
        head = _at(file, place, 27)
        lacing = file.read(head[26]) if len(head) == 27 else b""
        page = bytearray(head + lacing + file.read(sum(lacing)))
        if head[:4] == b"OggS"[: len(head)] and (len(head) < 27 or len(page) < 27 + head[26] + sum(lacing)):
            return Header(f"truncated: ends inside an Ogg page at byte {place:,}")
        if head[:4] != b"OggS":
            return Header(f"damaged: no Ogg page at byte {place:,}")
        page[22:26] = bytes(4)  # the checksum is computed with its own field set to 0
        # Ogg's checksum processes the highest bit first, zlib's the lowest; both start at 0 here.
        crc = zlib.crc32(bytes(page).translate(_REVERSED), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
        if int(f"{crc:032b}"[::-1], 2) != int.from_bytes(head[22:26], "little"):
            return Header(f"damaged: wrong checksum of the Ogg page at byte {place:,}")
        stream, number = head[14:18], int.from_bytes(head[18:22], "little")
        if number != number_of.get(stream, number - 1) + 1:
            return Header(f"damaged: Ogg pages are missing before byte {place:,}")
        number_of[stream] = number
        if head[5] & 4:
            ended.add(stream)
        place += len(page)
    return Header() if number_of.keys() == ended else Header("truncated: its last Ogg page does not end the stream")


_FORMATS: dict[bytes, Callable[[BinaryIO, int, int], Header]] = {
    b"RIFF": _riff, b"RIFX": _riff, b"RF64": _riff, b"FORM": _aiff, b".snd": _au, b"dns.": _au, b"NIST": _nist,
    b"fLaC": _flac, b"OggS": _ogg,
}  # fmt: skip
