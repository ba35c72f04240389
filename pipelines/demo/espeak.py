"""Speech synthesis by espeak-ng through its C API (speak_lib.h), with the time of every phone.

The shared library and its data come from the `espeakng-loader` wheel. espeak-ng keeps one state per process, so there
is one `Synthesiser` per process. espeak-ng produces 22,050 Hz; this module returns 16,000 Hz.

    Synthesiser().synthesise("the red fox", Voice("f2")).phones
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import espeakng_loader
import numpy as np
from scipy.signal import firwin, resample_poly

from extract.base.errors import RetortError
from pipelines.demo.voices import Voice

ESPEAK_RATE_HZ = 22_050
RESAMPLE_UP, RESAMPLE_DOWN = 320, 441  # 16,000 / 22,050 in lowest terms
# The default filter of resample_poly, computed once instead of for every utterance.
RESAMPLE_FILTER = firwin(20 * RESAMPLE_DOWN + 1, 1 / RESAMPLE_DOWN, window=("kaiser", 5.0))

# Constants of speak_lib.h
AUDIO_OUTPUT_SYNCHRONOUS = 2
INITIALIZE_PHONEME_EVENTS = 0x0001
CHARS_UTF8 = 1
EVENT_LIST_TERMINATED, EVENT_PHONEME = 0, 7
RATE, VOLUME, PITCH, RANGE, WORD_GAP = 1, 2, 3, 4, 7
PHONEME_SEPARATOR_BIT = 8


@dataclass(frozen=True)
class Phone:
    """One phone in espeak-ng's notation; `start`, `end` in samples at 16 kHz. The name of a pause begins with `_`."""

    name: str
    start: int
    end: int

    @property
    def is_pause(self) -> bool:
        """Return whether the phone is silent."""
        return self.name.startswith("_")


@dataclass(frozen=True)
class Speech:
    """Synthesised speech: float32 samples (n,) in [-1, 1) at 16 kHz, and consecutive phones that cover them."""

    samples: np.ndarray
    phones: tuple[Phone, ...]


class _EventName(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventName),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class Synthesiser:
    """The espeak-ng of this process. A second instance would share its state and is refused.

    Raises RetortError where espeak-ng does not start, for an unknown voice variant and for a failed synthesis.
    """

    _process_id: int | None = None

    def __init__(self) -> None:
        if Synthesiser._process_id == os.getpid():
            raise RetortError(
                "espeak-ng: this process has a Synthesiser already, and espeak-ng has one state per process; "
                "use the first one, or another process"
            )
        Synthesiser._process_id = os.getpid()
        self._library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        self._library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        data_path = str(Path(espeakng_loader.get_data_path()).parent).encode()
        rate_hz = self._library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, INITIALIZE_PHONEME_EVENTS)
        if rate_hz != ESPEAK_RATE_HZ:
            raise RetortError(
                f"espeak-ng: started with {rate_hz} Hz, expected {ESPEAK_RATE_HZ}: reinstall espeakng-loader"
            )
        self._chunks: list[np.ndarray] = []  # int16 (n,) at 22,050 Hz, of the utterance under way
        self._marks: list[tuple[str, int]] = []  # phone and its first sample at 16 kHz
        self._callback = _Callback(self._collect)  # a reference must be kept: ctypes does not hold one
        self._library.espeak_SetSynthCallback(self._callback)
        self._voice: Voice | None = None

    def synthesise(self, text: str, voice: Voice) -> Speech:
        """Synthesise `text` (ASCII words) in `voice`."""
        self._set_voice(voice)
        self._chunks, self._marks = [], []
        encoded = text.encode("ascii")
        # text, bytes with the final zero, first position, unit of positions, end position (0: none), flags
        status = self._library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, CHARS_UTF8, None, None)
        if status != 0:
            raise RetortError(
                f"espeak-ng: synthesis of {text!r} in voice {voice.variant!r} failed (status {status}): "
                "reinstall espeakng-loader"
            )
        samples_22k = np.concatenate(self._chunks).astype(np.float32) / 32768
        samples = resample_poly(samples_22k, RESAMPLE_UP, RESAMPLE_DOWN, window=RESAMPLE_FILTER)
        return Speech(samples.astype(np.float32), self._phones(len(samples)))

    def pronounce(self, word: str) -> list[str]:
        """Return the phones of an isolated word, with the marks `'` (primary) and `,` (secondary stress)."""
        self._set_voice(Voice("f2"))
        text = ctypes.c_char_p(word.lower().encode("ascii"))
        phones: bytes = self._library.espeak_TextToPhonemes(
            ctypes.byref(text), CHARS_UTF8, ord("|") << PHONEME_SEPARATOR_BIT
        )
        return phones.decode("ascii").strip().split("|")

    def _set_voice(self, voice: Voice) -> None:
        if voice == self._voice:
            return
        variants = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
        # espeak-ng itself continues in its default voice when a variant is missing.
        if not (variants / voice.variant).is_file():
            raise RetortError(
                f"espeak-ng: no voice variant {voice.variant!r} in {variants}; give the name of a file there"
            )
        if self._library.espeak_SetVoiceByName(f"en-us+{voice.variant}".encode()) != 0:
            raise RetortError(
                f"espeak-ng: voice variant {voice.variant!r} of {variants} does not load: reinstall espeakng-loader"
            )
        settings = {RATE: voice.rate, PITCH: voice.pitch, RANGE: voice.range, VOLUME: 80, WORD_GAP: 0}
        for parameter, value in settings.items():
            self._library.espeak_SetParameter(parameter, value, 0)
        self._voice = voice

    def _collect(self, wave: ctypes._Pointer[ctypes.c_short], count: int, events: ctypes._Pointer[_Event]) -> int:
        """Collect audio and phone events; espeak-ng calls this during the synthesis. 0 means: continue."""
        if wave and count > 0:
            self._chunks.append(np.ctypeslib.as_array(wave, shape=(count,)).copy())  # the buffer is used again
        index = 0
        while events[index].type != EVENT_LIST_TERMINATED:
            event = events[index]
            if event.type == EVENT_PHONEME:
                name = event.id.string.decode("utf-8") or "_"
                self._marks.append((name, event.sample * RESAMPLE_UP // RESAMPLE_DOWN))
            index += 1
        return 0

    def _phones(self, num_samples: int) -> tuple[Phone, ...]:
        """Turn the collected marks into phones: each ends where the next begins, empty ones are dropped."""
        ends = [min(start, num_samples) for _, start in self._marks[1:]] + [num_samples]
        return tuple(
            Phone(name, start, end) for (name, start), end in zip(self._marks, ends, strict=True) if start < end
        )
