"""Checks of the frame headers of MPEG audio (MP3): after damage, the decoder continues without an error."""

from typing import BinaryIO

# (version, layer) -> bit rates in kbit/s by index 1 to 14 (ISO 11172-3, 13818-3)
_KBITS = {
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES_HZ = (44_100, 48_000, 32_000)  # of version 1; half of them in version 2, a quarter in 2.5
_TAGS = (b"TAG", b"APETAGEX", b"LYRICSBEGIN", b"ID3")  # that may follow the last frame
_XING_FRAMES = 1  # flag: the number of frames is present


def walk_mpeg(file: BinaryIO, start: int, size: int) -> tuple[str, tuple[str, ...], int | None]:
    """Walk all frames of layers II and III; return the damage (or ""), notes, and a number of samples.

    The first frame may hold the number of the frames that follow (Xing, Info), which reveals a truncation. Without it
    the samples are counted here: the decoder only estimates the length of such a file.
    """
    place, frames, samples, declared, counted = start, 0, 0, None, 0
    while place < size:
        file.seek(place)
        head = file.read(4)
        length, in_frame = _frame(head)
        if not length:
            if frames == 0:
                return "", (), None  # layer I, a free bit rate, or not MPEG audio: left to the decoder
            file.seek(place)
            rest = file.read(1 << 16)
            if rest.startswith(_TAGS) or not rest.strip(b"\0"):
                break
            return f"damaged: no MPEG frame at byte {place:,}", (), None
        if frames == 0:
            declared = _declared_frames(head + file.read(length - 4))
        if place + length > size:
            break
        frames, samples, counted = frames + 1, in_frame, counted + in_frame
        place += length
    present = frames - (declared is not None)  # the frame with the number has no audio
    if declared is not None and present + 1 < declared:  # some encoders count that frame too
        return f"truncated: {present * samples:,} of {declared * samples:,} samples", (), None
    notes = ("ends inside an MPEG frame",) if place < size and length else ()
    return "", notes, counted if declared is None else None


def _frame(head: bytes) -> tuple[int, int]:
    """Return the bytes and the samples of the frame with this header of 4 bytes; 0 bytes for an unknown one."""
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:  # the sync word: 11 bits
        return 0, 0
    version, layer = {3: 1, 2: 2, 0: 4}.get(head[1] >> 3 & 3, 0), 4 - (head[1] >> 1 & 3)  # 4 is MPEG 2.5
    kbits, rate = head[2] >> 4, head[2] >> 2 & 3
    if not version or layer not in (2, 3) or kbits in (0, 15) or rate == 3:
        return 0, 0
    samples = 576 if layer == 3 and version > 1 else 1152
    bit_rate = 1000 * _KBITS[min(version, 2), layer][kbits - 1]
    padding = head[2] >> 1 & 1  # bytes
    return samples // 8 * bit_rate // (_RATES_HZ[rate] // version) + padding, samples


def _declared_frames(frame: bytes) -> int | None:
    """Return the number of frames that the first one declares, or None."""
    for name in (b"Xing", b"Info"):
        place = frame.find(name, 0, 64)
        if 0 <= place <= len(frame) - 12 and frame[place + 7] & _XING_FRAMES:
            return int.from_bytes(frame[place + 8 : place + 12], "big")
    return None
