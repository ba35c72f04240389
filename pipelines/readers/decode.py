"""Decoding of one listed utterance to int16 samples at 16 kHz, mono, with a record of changes and oddities.

Rules, in the order of their checks:

- The file is a regular file, and its header declares no more audio than the file has (headers.py).
- Its sampling rate is between 1 kHz and 768 kHz. An utterance lasts an hour at most: it is held in memory, and one pack
  of features has to hold it.
- Files are read in blocks. A file of unknown length (0 samples in FLAC, unknown sizes in WAV) is read to its end.
- A part of a file is read without the rest of it where the format allows (audio_file.py).
- All samples are finite, and none exceeds 2 (+6 dB): a larger one means another scale, such as int16 values in a file
  of floats. Samples beyond 1 after averaging, resampling and gain are clipped to 1 and noted.
- Channels are averaged. Channels that cancel each other (by 40 dB and more) are refused.
- A crop is within the file; its end may exceed the file's by one frame, since times in tables are rounded. A file
  whose table gives its duration has that duration.
- Noted, not refused: runs of 4 and more samples at full scale (clipped in the recording), digital silence.
"""

import errno
import hashlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.corpus import SAMPLE_RATE_HZ
from pipelines.readers.audio_file import (
    Forward,
    Stream,
    blocks,
    known_length,
    open_audio,
    read_header_of,
    seeks_exactly,
)
from pipelines.readers.headers import Header
from pipelines.readers.listing import ListedUtterance
from pipelines.readers.silence import without_silence

MIN_SAMPLES = 400  # the receptive field of one frame
LONGEST_S = 3600.0
RATES_HZ = (1_000, 768_000)
LARGEST_SAMPLE = 2.0
CANCELLED = 1e-4  # energy of the average relative to that of the channels: -40 dB
CLIPPED_RUN = 4  # consecutive samples at full scale
FRAME_S = 0.02  # times in tables are rounded: a crop may end so much after its file
DURATION_TOLERANCE_S = 0.25  # MP3 encoders add up to 0.15 s, which tools count or not
_FIRST_BUFFER = 1 << 18  # samples, of a file of unknown length
_MPEG_FRAME = 1152  # samples
_LENGTH_IN_LOG = ("W64", "CAF", "HTK", "SVX")  # formats whose wrong sizes libsndfile itself logs or refuses
# The largest sample of an encoding, relative to 1; 32,767 / 32,768 for all others
_FULL_SCALE = {"PCM_S8": 127 / 128, "PCM_U8": 127 / 128, "ULAW": 32_124 / 32_768, "ALAW": 32_256 / 32_768}
# Errors of a path. Others, such as too many open files, concern the machine and must not drop a file.
_OF_THE_FILE = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EIO,
)  # fmt: skip


@dataclass(frozen=True)
class Decoded:
    """Samples int16 (n,), the changes that were made, and notes on oddities that were kept."""

    samples: NDArray[np.int16]
    changes: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Bad:
    """A file that can't be used, with the reason."""

    reason: str


class _Refused(Exception):
    """Raised while a file is read, with the reason why it can't be used."""


class NotInParallel(Exception):
    """The audio is longer than the caller's `longest_s`, or a part of a file that is decoded once for all parts."""


def decode(
    utterance: ListedUtterance, *, longest_s: float = LONGEST_S, forward: Forward | None = None
) -> Decoded | Bad:
    """Decode one utterance. `forward`: the open file of the parts before, where parts can't be read by a seek.

    Raises NotInParallel if `longest_s` is less than the limit of an utterance and the audio is longer, or needs
    `forward`. Raises RetortError for errors of the machine rather than of the file.
    """
    try:
        data = None if utterance.data is None else utterance.data()
        header = _check_file(utterance, data)
        audio_T, rate_hz, changes, notes = _read(utterance, data, header, longest_s, forward or Forward())
        return _convert(utterance, audio_T, rate_hz, changes, notes)
    except (RetortError, NotInParallel):
        raise
    except _Refused as error:
        return Bad(str(error))
    except soundfile.LibsndfileError as error:
        # libsndfile reports "does not exist" for an existing file of unknown format.
        text = str(error.error_string).removeprefix("Error : ")
        return Bad(f"unreadable: {'no known audio format' if text.startswith('File does not exist') else text}")
    except OSError as error:
        if error.errno is not None and error.errno not in _OF_THE_FILE:
            raise RetortError(
                f"{utterance.file}: can't be read now ({error.strerror}); run the command again"
            ) from None
        return Bad("does not exist" if isinstance(error, FileNotFoundError) else f"unreadable: {error.strerror}")
    except (soundfile.SoundFileError, ValueError, TypeError, ArithmeticError, MemoryError, RuntimeError) as error:
        return Bad(f"unreadable: {' '.join(str(error).split())[:200] or type(error).__name__}")


def duration_s(path: Path) -> float:
    """Return the length of a file in seconds, 0 if it can't be opened; a file of unknown length is decoded."""
    try:
        if not path.is_file():
            return 0.0
        header = read_header_of(path, None, has_parts=False)
        with open_audio(path, None, header) as file:
            length = known_length(file, header)
            length = sum(len(block_TC) for block_TC in blocks(file, None)) if length is None else length
            return length / float(file.samplerate)
    except (soundfile.SoundFileError, OSError, ValueError, RuntimeError):
        return 0.0


def _check_file(utterance: ListedUtterance, data: bytes | None) -> Header:
    """Return the header of a file. Refuse one that is not a regular file, or declares more audio than it has."""
    if data is None and not stat.S_ISREG(mode := utterance.file.stat().st_mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise _Refused(f"unreadable: it is {kind}")
    header = read_header_of(utterance.file, data, has_parts=utterance.crop_s is not None)
    if header.damage:
        raise _Refused(header.damage)
    return header


def _read(
    utterance: ListedUtterance, data: bytes | None, header: Header, longest_s: float, forward: Forward
) -> tuple[NDArray[np.float32], int, list[str], list[str]]:
    """Read the average over channels, float32 (samples,), the rate in Hz, and the changes and notes so far."""
    with open_audio(utterance.file, data, header) as file:
        rate, length = int(file.samplerate), known_length(file, header)
        if not RATES_HZ[0] <= rate <= RATES_HZ[1]:
            raise _Refused(f"sampling rate {rate:,} Hz, expected {RATES_HZ[0]:,} to {RATES_HZ[1]:,}")
        if not header.checked and "(should be" in file.extra_info:
            raise _Refused("truncated: the sizes in its header differ from those of the file")
        if utterance.channel is not None and utterance.channel >= file.channels:
            raise _Refused(
                f"has {file.channels} channels, utterance {utterance.id!r} is of channel {utterance.channel}"
            )
        crop_s = _crop(utterance, length, rate)
        wanted = length if crop_s is None else round(crop_s[1] * rate)
        _check_length((wanted or header.counted or 0) / rate, longest_s)
        found = blocks(file, wanted) if crop_s is None else _part(utterance, file, header, longest_s, forward)
        if not header.checked and file.format not in _LENGTH_IN_LOG:
            header = replace(header, notes=(f"{file.format}: its length is not checked",))
        levels = _Levels(_FULL_SCALE.get(file.subtype, 32_767 / 32_768))
        md5 = _Md5(*header.flac_md5) if header.flac_md5 and crop_s is None else None
        audio_T = np.empty(_FIRST_BUFFER if wanted is None else wanted, np.float32)
        for block_TC in found:
            if md5:
                md5.add(block_TC)
            if utterance.channel is not None:
                block_TC = block_TC[:, utterance.channel : utterance.channel + 1]
            levels.add(block_TC)
            _check_length(levels.count / rate, longest_s)
            if levels.count > len(audio_T):  # of unknown length: double the buffer
                audio_T = np.concatenate([audio_T, np.empty_like(audio_T)])
            audio_T[levels.count - len(block_TC) : levels.count] = block_TC.mean(axis=1)
        _check_count(utterance, levels.count, wanted, header.counted, rate)
        if md5 and not md5.agrees:
            raise _Refused("damaged: the MD5 of its samples differs from the one in its header")
        if not levels.count:
            raise _Refused("empty")
        return audio_T[: levels.count], rate, _mixed(utterance, file), [*header.notes, *levels.check(file.channels)]


def _check_length(seconds: float, longest_s: float) -> None:
    if seconds > LONGEST_S:
        raise _Refused(f"longer than {LONGEST_S / 3600:g} h, the limit of one utterance; split it into utterances")
    if seconds > longest_s:
        raise NotInParallel


def _check_count(utterance: ListedUtterance, count: int, wanted: int | None, counted: int | None, rate_hz: int) -> None:
    """Refuse a file with fewer samples than it declares, a crop that ends after it, and another duration."""
    crop_s = utterance.crop_s
    if crop_s is not None:
        if wanted is not None and count + round(FRAME_S * rate_hz) < wanted:
            end_s = crop_s[0] + count / rate_hz
            raise _Refused(
                f"ends before {sum(crop_s):g} s, the end of utterance {utterance.id!r}: it has {end_s:.6g} s"
            )
    elif wanted is not None and count < wanted:
        raise _Refused(f"truncated: {count:,} of {wanted:,} samples")
    elif counted is not None and count + _MPEG_FRAME < counted:  # libsndfile estimates the end from the first frames
        raise _Refused(f"only {count:,} of {counted:,} samples are decoded: its header lacks the length; convert it")
    if utterance.expected_s is not None and abs(count / rate_hz - utterance.expected_s) > DURATION_TOLERANCE_S:
        raise _Refused(f"lasts {count / rate_hz:.6g} s, its table gives {utterance.expected_s:g} s")


def _crop(utterance: ListedUtterance, length: int | None, rate_hz: int) -> tuple[float, float] | None:
    """Return the part that is read, None for a whole file: also where the part is all of it, but for a frame."""
    crop_s = utterance.crop_s
    if crop_s is not None and crop_s[0] == 0 and length is not None and abs(length / rate_hz - crop_s[1]) <= FRAME_S:
        return None
    return crop_s


def _part(
    utterance: ListedUtterance, file: Stream, header: Header, longest_s: float, forward: Forward
) -> Iterator[NDArray[np.float32]]:
    """Return the blocks of a part of a file, float32 (frames, channels)."""
    assert utterance.crop_s is not None
    begin, count = (round(seconds * file.samplerate) for seconds in utterance.crop_s)
    length = known_length(file, header)
    if length is not None and begin > length:
        raise _Refused(
            f"ends before {utterance.crop_s[0]:g} s, the beginning of utterance {utterance.id!r}: it has "
            f"{length / file.samplerate:.6g} s"
        )
    if seeks_exactly(file, header):
        file.seek(begin)
        return blocks(file, count)
    if longest_s < LONGEST_S:
        raise NotInParallel
    part_TC = forward.part(utterance.file, header, begin, count)
    return iter([part_TC] if len(part_TC) else [])


def _mixed(utterance: ListedUtterance, file: Stream) -> list[str]:
    """Return the change of a file with several channels to one."""
    if file.channels == 1:
        return []
    if utterance.channel is not None:
        return [f"channel {utterance.channel} of {file.channels}"]
    return [f"averaged {file.channels} channels"]


@dataclass
class _Levels:
    """Levels of the audio as recorded, over its blocks, before anything is changed.

    tail_TC: whether each of the last samples of the previous block is at full scale: a run may span two blocks.
    """

    full_scale: float
    count: int = 0
    peak: float = 0.0
    clipped: bool = False
    energy: float = 0.0
    average_energy: float = 0.0
    tail_TC: NDArray[np.bool_] | None = None

    def add(self, block_TC: NDArray[np.float32]) -> None:
        if not np.isfinite(block_TC).all():
            raise _Refused("holds NaN or infinite samples")
        self.count += len(block_TC)
        size_TC = np.abs(block_TC)
        self.peak = max(self.peak, float(size_TC.max()))
        if self.peak > LARGEST_SAMPLE:
            raise _Refused(f"samples up to {self.peak:,.6g}, expected -1 to 1 (another scale); divide them")
        full_TC = size_TC >= self.full_scale
        if self.tail_TC is not None:
            full_TC = np.concatenate([self.tail_TC, full_TC])
        if len(full_TC) >= CLIPPED_RUN and full_TC.any():
            runs_TC = np.lib.stride_tricks.sliding_window_view(full_TC, CLIPPED_RUN, axis=0).all(-1)
            self.clipped |= bool(runs_TC.any())
        self.tail_TC = full_TC[-(CLIPPED_RUN - 1) :]
        if block_TC.shape[1] > 1:
            self.energy += float(np.square(block_TC, dtype=np.float64).mean(1).sum())
            self.average_energy += float(np.square(block_TC.mean(1), dtype=np.float64).sum())

    def check(self, channels: int) -> list[str]:
        """Return the notes on the whole file. Refuse channels that cancel each other."""
        if channels > 1 and self.average_energy < CANCELLED * self.energy:
            raise _Refused(f"its {channels} channels cancel each other in the average; keep one of them")
        return [
            *(["digital silence"] if self.peak == 0 else []),
            *([f"clipped in the recording ({CLIPPED_RUN} and more samples at full scale)"] if self.clipped else []),
        ]


class _Md5:
    """The MD5 of a FLAC's samples: little-endian integers of the file's own width, channels interleaved."""

    def __init__(self, declared: bytes, bits: int) -> None:
        self.declared, self.bits = declared, bits
        self.digest = hashlib.md5(usedforsecurity=False)

    def add(self, block_TC: NDArray[np.float32]) -> None:
        scaled_TC = block_TC * np.float32(1 << (self.bits - 1))  # integers: exact up to 24 bits
        if self.bits in (8, 16):
            self.digest.update(scaled_TC.astype(f"<i{self.bits // 8}").data)
        else:
            self.digest.update(scaled_TC.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes())

    @property
    def agrees(self) -> bool:
        return self.digest.digest() == self.declared


def _convert(
    utterance: ListedUtterance, audio_T: NDArray[np.float32], rate_hz: int, changes: list[str], notes: list[str]
) -> Decoded:
    """Resample, apply gain, remove silence and round, in this order."""
    if rate_hz != SAMPLE_RATE_HZ:
        from extract.audio import resample  # late: most data sets are 16 kHz, and the import of torch takes seconds

        audio_T = resample(audio_T, rate_hz, SAMPLE_RATE_HZ)
        changes.append(f"resampled {rate_hz} Hz")
    if utterance.gain_db:
        audio_T = audio_T * np.float32(10 ** (utterance.gain_db / 20))
        changes.append(f"gain {utterance.gain_db:g} dB")
    if utterance.trim_silence and len(kept_T := without_silence(audio_T, SAMPLE_RATE_HZ)) < len(audio_T):
        audio_T = kept_T
        changes.append("cut silence")
    if len(audio_T) < MIN_SAMPLES and not utterance.shortest_s:
        raise _Refused(f"{len(audio_T)} samples at 16 kHz, one frame needs {MIN_SAMPLES}")
    if (np.abs(audio_T) > 1).any():
        notes.append("over full scale, clipped to it")
    samples_T = np.clip(np.rint(audio_T * 32_768), -32_768, 32_767).astype(np.int16)
    return Decoded(samples_T, tuple(changes), tuple(notes))
