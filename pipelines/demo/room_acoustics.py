"""Rooms, noise and level: what makes spoken corpora neither trivial nor hopeless.

A place is an impulse response (an exponential tail of noise after a direct path), a noise of one colour and a
signal-to-noise ratio. Everything is drawn from an explicit generator, so one seed gives one waveform.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.signal import oaconvolve

SAMPLE_RATE_HZ = 16_000
NOISE_EXPONENTS = {"white": 0.0, "pink": 1.0, "brown": 2.0}  # power falls with frequency to this power
MAX_PEAK = 0.98
MICROPHONE_HZ = np.array([62.5, 125.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0, 8000.0])
MICROPHONE_DB = 5.0  # standard deviation of the gain at each


@dataclass(frozen=True)
class Place:
    """A room and its noise.

    Arguments:
        decay_s: RT60, the time in which the tail falls by 60 dB.
        direct_to_tail_db: energy of the direct path against that of the tail.
        colour: a key of NOISE_EXPONENTS.
        snr_db: speech against noise, both over the whole utterance.
        level_db: RMS of what is written, against full scale.
        seed: of the tail's noise, so that one place keeps one impulse response.
    """

    decay_s: float
    direct_to_tail_db: float
    colour: str
    snr_db: float
    level_db: float
    seed: int


def draw_place(generator: np.random.Generator, snr_db: tuple[float, float]) -> Place:
    """A place with its ratio of signal to noise drawn evenly from `snr_db` (low, high)."""
    return Place(
        decay_s=float(generator.uniform(0.1, 0.5)),
        direct_to_tail_db=float(generator.uniform(0, 14)),
        colour=str(generator.choice(list(NOISE_EXPONENTS))),
        snr_db=float(generator.uniform(*snr_db)),
        level_db=float(generator.uniform(-34, -16)),
        seed=int(generator.integers(2**31)),
    )


def heard_in(samples: np.ndarray, place: Place, generator: np.random.Generator) -> np.ndarray:
    """float32 (n,) speech as a microphone in `place` takes it, float32 (n,) in (-1, 1), no sample later or earlier."""
    reverberant = oaconvolve(samples, impulse_response(place))[: len(samples)]
    speech_rms = _rms(reverberant)
    noise = coloured_noise(len(samples), place.colour, generator) * speech_rms * 10 ** (-place.snr_db / 20)
    mixed = reverberant + noise
    mixed *= 10 ** (place.level_db / 20) / max(_rms(mixed), 1e-9)
    return np.asarray(mixed * min(1.0, MAX_PEAK / max(float(np.abs(mixed).max()), 1e-9)), dtype=np.float32)


def draw_microphone(generator: np.random.Generator) -> np.ndarray:
    """A microphone's colouring: gain in dB, float64 (8,), at MICROPHONE_HZ."""
    return generator.normal(0, MICROPHONE_DB, len(MICROPHONE_HZ))


def through_microphone(samples: np.ndarray, gains_db: np.ndarray) -> np.ndarray:
    """float32 (n,) samples, every frequency at its gain (linear in dB over log frequency), at the level they had."""
    padded = next_fast_len(len(samples), real=True)
    frequencies_hz = np.maximum(np.fft.rfftfreq(padded, 1 / SAMPLE_RATE_HZ), MICROPHONE_HZ[0])
    gains = 10 ** (np.interp(np.log(frequencies_hz), np.log(MICROPHONE_HZ), gains_db) / 20)
    coloured = irfft(rfft(samples, padded) * gains.astype(np.float32), padded)[: len(samples)]
    coloured *= _rms(samples) / max(_rms(coloured), 1e-9)
    return np.asarray(coloured * min(1.0, MAX_PEAK / max(float(np.abs(coloured).max()), 1e-9)), dtype=np.float32)


def impulse_response(place: Place) -> np.ndarray:
    """Polack's model: white noise under an exponential; the direct path is sample 0 and has energy 1."""
    times_s = np.arange(int(place.decay_s * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    tail = np.random.default_rng(place.seed).standard_normal(len(times_s)) * np.exp(-6.908 * times_s / place.decay_s)
    tail[: SAMPLE_RATE_HZ // 500] = 0  # the first reflection comes 2 ms after the direct path
    tail *= 10 ** (-place.direct_to_tail_db / 20) / np.sqrt((tail**2).sum())
    tail[0] = 1.0
    return tail


def coloured_noise(num_samples: int, colour: str, generator: np.random.Generator) -> np.ndarray:
    """float32 (num_samples,) noise of RMS 1; its power falls with frequency above 50 Hz."""
    padded = next_fast_len(num_samples, real=True)
    white = rfft(generator.standard_normal(padded, dtype=np.float32))
    frequencies_hz = np.maximum(np.fft.rfftfreq(padded, 1 / SAMPLE_RATE_HZ), 50).astype(np.float32)
    shaped = irfft(white * frequencies_hz ** (-NOISE_EXPONENTS[colour] / 2), padded)[:num_samples]
    return np.asarray(shaped / _rms(shaped))


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
