"""Speech from espeak-ng, with the time of every phone and word, through its C API (speak_lib.h).

The shared library and its data come from the `espeakng-loader` wheel. espeak-ng keeps one state a process, so there is
one `Speaker` a process; several processes do no harm. It speaks 22,050 Hz; what leaves this file has 16,000 Hz.

    Speaker().speak("the red fox", Voice("f2")).phones
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

SAMPLE_RATE_HZ = 16_000
ESPEAK_RATE_HZ = 22_050
RESAMPLE_UP, RESAMPLE_DOWN = 320, 441  # 16,000 / 22,050 in lowest terms
RESAMPLE_FILTER = firwin(20 * RESAMPLE_DOWN + 1, 1 / RESAMPLE_DOWN, window=("kaiser", 5.0))  # scipy's own, made once

# speak_lib.h
AUDIO_OUTPUT_SYNCHRONOUS = 2
INITIALIZE_PHONEME_EVENTS = 0x0001
CHARS_UTF8 = 1
EVENT_LIST_TERMINATED, EVENT_WORD, EVENT_END, EVENT_PHONEME = 0, 1, 5, 7
RATE, VOLUME, PITCH, RANGE, WORD_GAP = 1, 2, 3, 4, 7
PHONEME_SEPARATOR_BIT = 8


@dataclass(frozen=True)
class Phone:
    """One phone in espeak's own notation; `start` and `end` in samples at 16 kHz. A pause is named `_`."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Word:
    """One word as it stands in the text, and the sample at 16 kHz at which it begins."""

    text: str
    start: int


@dataclass(frozen=True)
class Speech:
    """What was said: float32 samples (n,) in [-1, 1) at 16 kHz, phones that cover them, words in order."""

    samples: np.ndarray
    phones: tuple[Phone, ...]
    words: tuple[Word, ...]


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


class Speaker:
    """The one espeak-ng of this process. Make it once and keep it: a second one would share its state."""

    _process_id: int | None = None

    def __init__(self) -> None:
        if Speaker._process_id == os.getpid():
            raise RetortError("espeak-ng: a second Speaker in one process: it has one state; pass the first one on")
        Speaker._process_id = os.getpid()
        self._library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        self._library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        data_path = str(Path(espeakng_loader.get_data_path()).parent).encode()
        rate_hz = self._library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, INITIALIZE_PHONEME_EVENTS)
        if rate_hz != ESPEAK_RATE_HZ:
            raise RetortError(
                f"espeak-ng: started with {rate_hz} Hz, expected {ESPEAK_RATE_HZ}: reinstall espeakng-loader"
            )
        self._chunks: list[np.ndarray] = []
        self._events: list[tuple[int, int, int, int, str]] = []
        self._callback = _Callback(self._collect)  # kept: ctypes does not own it
        self._library.espeak_SetSynthCallback(self._callback)
        self._voice: Voice | None = None

    def speak(self, text: str, voice: Voice) -> Speech:
        """Say `text` (ASCII words) in `voice`."""
        self._choose(voice)
        self._chunks, self._events = [], []
        encoded = text.encode("ascii")
        status = self._library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 1, 0, CHARS_UTF8, None, None)
        if status != 0:
            raise RetortError(f"espeak-ng: could not say {text!r} in voice {voice.variant!r} (status {status})")
        samples_22k = np.concatenate(self._chunks).astype(np.float32) / 32768
        samples = resample_poly(samples_22k, RESAMPLE_UP, RESAMPLE_DOWN, window=RESAMPLE_FILTER)
        return Speech(samples.astype(np.float32), self._phones(len(samples)), self._words(text))

    def pronounce(self, word: str) -> list[str]:
        """espeak's phones of a word said by itself, with the marks `'` (primary) and `,` (secondary stress)."""
        self._choose(Voice("f2"))
        text = ctypes.c_char_p(word.lower().encode("ascii"))
        phones: bytes = self._library.espeak_TextToPhonemes(
            ctypes.byref(text), CHARS_UTF8, ord("|") << PHONEME_SEPARATOR_BIT
        )
        return phones.decode("ascii").strip().split("|")

    def _choose(self, voice: Voice) -> None:
        if voice == self._voice:
            return
        variants = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
        if not (variants / voice.variant).is_file():  # espeak-ng itself would speak on in its default voice
            raise RetortError(f"espeak-ng: no voice variant {voice.variant!r} in {variants}")
        if self._library.espeak_SetVoiceByName(f"en-us+{voice.variant}".encode()) != 0:
            raise RetortError(f"espeak-ng: cannot load voice variant {voice.variant!r} from {variants}")
        for parameter, value in (
            (RATE, voice.rate),
            (PITCH, voice.pitch),
            (RANGE, voice.range),
            (VOLUME, 80),
            (WORD_GAP, 0),
        ):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._voice = voice

    def _collect(self, wave: ctypes._Pointer[ctypes.c_short], count: int, events: ctypes._Pointer[_Event]) -> int:
        if wave and count > 0:
            self._chunks.append(np.ctypeslib.as_array(wave, shape=(count,)).copy())
        index = 0
        while events[index].type != EVENT_LIST_TERMINATED:
            event = events[index]
            if event.type in (EVENT_WORD, EVENT_PHONEME):
                name = event.id.string.decode("utf-8") if event.type == EVENT_PHONEME else ""
                self._events.append((event.type, event.sample, event.text_position, event.length, name))
            index += 1
        return 0

    def _phones(self, num_samples: int) -> tuple[Phone, ...]:
        marks = [(name or "_", _to_16k(sample)) for kind, sample, _, _, name in self._events if kind == EVENT_PHONEME]
        ends = [start for _, start in marks[1:]] + [num_samples]
        return tuple(
            Phone(name, start, min(end, num_samples))
            for (name, start), end in zip(marks, ends, strict=True)
            if start < min(end, num_samples)
        )

    def _words(self, text: str) -> tuple[Word, ...]:
        return tuple(
            Word(text[position - 1 : position - 1 + length], _to_16k(sample))
            for kind, sample, position, length, _ in self._events
            if kind == EVENT_WORD
        )


def _to_16k(sample: int) -> int:
    return sample * RESAMPLE_UP // RESAMPLE_DOWN
