"""Decoding of one listed utterance to int16 samples at 16 kHz, mono, with a record of changes and oddities.

Rules, in the order of their checks:

- The file is a regular file, and its header declares no more audio than the file has (headers.py).
- Its sampling rate is between 1 kHz and 768 kHz. An utterance lasts an hour at most: it is held in memory, and one pack
  of features has to hold it.
- Files are read in blocks. A file of unknown length (0 samples in FLAC, unknown sizes in WAV) is read to its end.
- All samples are finite, and none exceeds 2 (+6 dB): a larger one means another scale, such as int16 values in a file
  of floats. Samples beyond 1 after averaging, resampling and gain are clipped to 1 and noted.
- Channels are averaged. Channels that cancel each other (by 40 dB and more) are refused.
- A crop is within the file.
- Noted, not refused: runs of 4 and more samples at full scale (clipped in the recording), digital silence.
"""

import errno
import hashlib
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from extract.base.errors import RetortError
from extract.corpus import SAMPLE_RATE_HZ
from pipelines.readers.headers import Header, Patched, read_header
from pipelines.readers.listing import ListedUtterance
from pipelines.readers.silence import without_silence

MIN_SAMPLES = 400  # the receptive field of one frame
LONGEST_S = 3600.0
RATES_HZ = (1_000, 768_000)
LARGEST_SAMPLE = 2.0
CANCELLED = 1e-4  # energy of the average relative to that of the channels: -40 dB
CLIPPED_RUN = 4  # consecutive samples at full scale
_BLOCK_VALUES = 1 << 18  # 1 MB of float32 over all channels
_MPEG_FRAME = 1152  # samples
_LENGTH_IN_LOG = ("W64", "CAF", "HTK", "SVX")  # formats whose wrong sizes libsndfile itself logs or refuses
_UNKNOWN_LENGTH = 1 << 62  # libsndfile gives 2^63 - 1
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


class TooLong(Exception):
    """The audio is longer than the caller's `longest_s`."""


class _Stream(soundfile.SoundFile):  # type: ignore[misc]
    """A file that is read sequentially.

    soundfile otherwise seeks after every block, which fails for a FLAC of unknown length and changes the samples of
    lossy decoders.
    """

    def seekable(self) -> bool:
        return False


def decode(utterance: ListedUtterance, *, longest_s: float = LONGEST_S) -> Decoded | Bad:
    """Decode one utterance.

    Raises TooLong beyond `longest_s` (where that is less than the limit of an utterance), and RetortError for errors of
    the machine rather than of the file.
    """
    try:
        header = _check_file(utterance.file)
        audio_T, rate_hz, changes, notes = _read(utterance, header, longest_s)
        return _convert(utterance, audio_T, rate_hz, changes, notes)
    except (RetortError, TooLong):
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
        header = read_header(path)
        with _open(path, header) as file:
            if file.frames < _UNKNOWN_LENGTH and header.counted is None:
                return float(file.frames / file.samplerate)
            return sum(len(block_TC) for block_TC in _blocks(file, None)) / float(file.samplerate)
    except (soundfile.SoundFileError, OSError, ValueError, RuntimeError):
        return 0.0


def _check_file(path: Path) -> Header:
    """Return the header of a file. Refuse one that is not a regular file, or declares more audio than it has."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise _Refused(f"unreadable: it is {kind}")
    header = read_header(path)
    if header.damage:
        raise _Refused(header.damage)
    return header


@contextmanager
def _open(path: Path, header: Header) -> Iterator[_Stream]:
    """Open a file with the patches of its header."""
    with ExitStack() as stack:
        patched = stack.enter_context(Patched(path, header.patches)) if header.patches else None
        yield stack.enter_context(_Stream(patched or path))


def _read(
    utterance: ListedUtterance, header: Header, longest_s: float
) -> tuple[NDArray[np.float32], int, list[str], list[str]]:
    """Read the average over channels, float32 (samples,), the rate in Hz, and the changes and notes so far."""
    crop_s = utterance.crop_s
    with _open(utterance.file, header) as file:
        rate, known = int(file.samplerate), file.frames < _UNKNOWN_LENGTH and header.counted is None
        if not RATES_HZ[0] <= rate <= RATES_HZ[1]:
            raise _Refused(f"sampling rate {rate:,} Hz, expected {RATES_HZ[0]:,} to {RATES_HZ[1]:,}")
        if not header.checked and "(should be" in file.extra_info:
            raise _Refused("truncated: the sizes in its header differ from those of the file")
        wanted = int(file.frames) if known else None
        if crop_s is not None:
            wanted = round(crop_s[1] * rate)
        _check_length((wanted or header.counted or 0) / rate, longest_s)
        if crop_s is not None:
            _skip(file, round(crop_s[0] * rate), known)
        if not header.checked and file.format not in _LENGTH_IN_LOG:
            header = replace(header, notes=(f"{file.format}: its length is not checked",))
        levels = _Levels(_FULL_SCALE.get(file.subtype, 32_767 / 32_768))
        md5 = _Md5(*header.flac_md5) if header.flac_md5 and crop_s is None else None
        audio_T = np.empty(_BLOCK_VALUES if wanted is None else wanted, np.float32)
        for block_TC in _blocks(file, wanted):
            levels.add(block_TC)
            if md5:
                md5.add(block_TC)
            _check_length(levels.count / rate, longest_s)
            if levels.count > len(audio_T):  # of unknown length: double the buffer
                audio_T = np.concatenate([audio_T, np.empty_like(audio_T)])
            audio_T[levels.count - len(block_TC) : levels.count] = block_TC.mean(axis=1)
        _check_count(crop_s, levels.count, wanted, header.counted)
        if md5 and not md5.agrees:
            raise _Refused("damaged: the MD5 of its samples differs from the one in its header")
        if not levels.count:
            raise _Refused("empty")
        changes = [f"averaged {file.channels} channels"] if file.channels > 1 else []
        return audio_T[: levels.count], rate, changes, [*header.notes, *levels.check(file.channels)]


def _check_length(seconds: float, longest_s: float) -> None:
    if seconds > LONGEST_S:
        raise _Refused(f"longer than {LONGEST_S / 3600:g} h, the limit of one utterance; split it into utterances")
    if seconds > longest_s:
        raise TooLong


def _check_count(crop_s: tuple[float, float] | None, count: int, wanted: int | None, counted: int | None) -> None:
    """Refuse a file with fewer samples than it declares, and a crop that ends after the file."""
    if crop_s is not None:
        if wanted is not None and count < wanted:
            raise _Refused(f"ends before {sum(crop_s):g} s, the end of the crop")
    elif wanted is not None and count < wanted:
        raise _Refused(f"truncated: {count:,} of {wanted:,} samples")
    elif counted is not None and count + _MPEG_FRAME < counted:  # libsndfile estimates the end from the first frames
        raise _Refused(f"only {count:,} of {counted:,} samples are decoded: its header lacks the length; convert it")


def _skip(file: _Stream, frames: int, known: bool) -> None:
    """Move to a sample: by a seek, or by decoding where the length of the file is unknown."""
    if not known:
        for _ in _blocks(file, frames):
            pass
    elif frames <= file.frames:
        file.seek(frames)
    else:
        raise _Refused(f"ends before {frames / file.samplerate:g} s, the beginning of the crop")


def _blocks(file: _Stream, wanted: int | None) -> Iterator[NDArray[np.float32]]:
    """Yield blocks of float32 (frames, channels) to the end, or until there are `wanted` frames."""
    size, left = max(1, _BLOCK_VALUES // file.channels), wanted
    while left is None or left > 0:
        block_TC = file.read(size if left is None else min(size, left), dtype="float32", always_2d=True)
        if not len(block_TC):
            return
        yield block_TC
        left = None if left is None else left - len(block_TC)


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
