"""Room acoustics, noise, level and microphones, which make the tasks of the demo neither trivial nor hopeless.

A room is an impulse response (a direct path and an exponential tail of noise), a noise of one colour and a
signal-to-noise ratio. Everything is drawn from an explicit generator, so one seed gives one waveform.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft
from scipy.signal import oaconvolve

SAMPLE_RATE_HZ = 16_000  # of the whole demo
NOISE_EXPONENTS = {"white": 0.0, "pink": 1.0, "brown": 2.0}  # power ~ 1 / frequency ** exponent
MAX_PEAK = 0.98  # of full scale: a louder waveform is attenuated, never clipped
MICROPHONE_HZ = np.array([62.5, 125.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0, 8000.0])  # octaves
MICROPHONE_DB = 5.0  # standard deviation of the gain at each
_NEPERS_PER_60_DB = 6.908  # ln(1000): amplitude falls by 60 dB within the decay time
_SILENCE_RMS = 1e-9  # avoids a division by zero for digital silence


@dataclass(frozen=True)
class Room:
    """A room and its noise.

    Arguments:
        decay_s: RT60, the time in which the tail falls by 60 dB.
        direct_to_tail_db: energy of the direct path relative to that of the tail.
        colour: a key of NOISE_EXPONENTS.
        snr_db: speech relative to noise, both over the whole utterance.
        level_db: RMS of the output relative to full scale.
        seed: of the tail's noise; it fixes the impulse response of the room.
    """

    decay_s: float
    direct_to_tail_db: float
    colour: str
    snr_db: float
    level_db: float
    seed: int


def draw_room(generator: np.random.Generator, snr_db: tuple[float, float]) -> Room:
    """Draw a room; its signal-to-noise ratio is uniform in `snr_db` (low, high)."""
    return Room(
        decay_s=float(generator.uniform(0.1, 0.5)),
        direct_to_tail_db=float(generator.uniform(0, 14)),
        colour=str(generator.choice(list(NOISE_EXPONENTS))),
        snr_db=float(generator.uniform(*snr_db)),
        level_db=float(generator.uniform(-34, -16)),
        seed=int(generator.integers(2**31)),
    )


def apply_room(samples: np.ndarray, room: Room, generator: np.random.Generator) -> np.ndarray:
    """Return float32 (n,) speech as recorded in `room`: float32 (n,) in (-1, 1), aligned with the input."""
    reverberant = oaconvolve(samples, impulse_response(room))[: len(samples)]
    noise = coloured_noise(len(samples), room.colour, generator) * rms(reverberant) * 10 ** (-room.snr_db / 20)
    mixed = reverberant + noise
    mixed *= 10 ** (room.level_db / 20) / max(rms(mixed), _SILENCE_RMS)
    return limit_peak(mixed)


def apply_random_room(samples: np.ndarray, snr_db: tuple[float, float], generator: np.random.Generator) -> np.ndarray:
    """Draw a room (`draw_room`) and apply it (`apply_room`)."""
    return apply_room(samples, draw_room(generator, snr_db), generator)


def draw_microphone(generator: np.random.Generator) -> np.ndarray:
    """Draw the frequency response of a microphone: gains in dB, float64 (8,), at MICROPHONE_HZ."""
    return generator.normal(0, MICROPHONE_DB, len(MICROPHONE_HZ))


def apply_microphone(samples: np.ndarray, gains_db: np.ndarray) -> np.ndarray:
    """Filter float32 (n,) samples by gains interpolated linearly in dB over log frequency; the RMS stays the same."""
    padded = next_fast_len(len(samples), real=True)
    # Below the first point the gain is constant; this also avoids the logarithm of 0 Hz.
    frequencies_hz = np.maximum(np.fft.rfftfreq(padded, 1 / SAMPLE_RATE_HZ), MICROPHONE_HZ[0])
    gains = 10 ** (np.interp(np.log(frequencies_hz), np.log(MICROPHONE_HZ), gains_db) / 20)
    coloured = irfft(rfft(samples, padded) * gains.astype(np.float32), padded)[: len(samples)]
    coloured *= rms(samples) / max(rms(coloured), _SILENCE_RMS)
    return limit_peak(coloured)


def impulse_response(room: Room) -> np.ndarray:
    """Polack's model: white noise under an exponential; the direct path is sample 0 and has energy 1."""
    times_s = np.arange(int(room.decay_s * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    envelope = np.exp(-_NEPERS_PER_60_DB * times_s / room.decay_s)
    tail = np.random.default_rng(room.seed).standard_normal(len(times_s)) * envelope
    tail[: SAMPLE_RATE_HZ // 500] = 0  # the first reflection arrives 2 ms after the direct path
    tail *= 10 ** (-room.direct_to_tail_db / 20) / np.sqrt((tail**2).sum())
    tail[0] = 1.0
    return tail


def coloured_noise(num_samples: int, colour: str, generator: np.random.Generator) -> np.ndarray:
    """Return float32 (num_samples,) noise of RMS 1; its power falls with frequency above 50 Hz."""
    padded = next_fast_len(num_samples, real=True)
    white = rfft(generator.standard_normal(padded, dtype=np.float32))
    frequencies_hz = np.maximum(np.fft.rfftfreq(padded, 1 / SAMPLE_RATE_HZ), 50).astype(np.float32)
    shaped = irfft(white * frequencies_hz ** (-NOISE_EXPONENTS[colour] / 2), padded)[:num_samples]  # amplitude: half
    return np.asarray(shaped / rms(shaped))


def rms(samples: np.ndarray) -> float:
    """Return the root mean square of float (n,) samples."""
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))


def limit_peak(samples: np.ndarray) -> np.ndarray:
    """Attenuate float (n,) samples whose peak exceeds MAX_PEAK to that peak; returns float32 (n,)."""
    peak = max(float(np.abs(samples).max()), _SILENCE_RMS)
    return np.asarray(samples * min(1.0, MAX_PEAK / peak), dtype=np.float32)
