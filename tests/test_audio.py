"""Decoding and resampling: damage is reported, deviations are counted, samples equal those of the file."""

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from extract.audio import resample
from pipelines.readers.decode import Bad, Decoded, NotInParallel, decode, duration_s
from pipelines.readers.listing import ListedUtterance
from pipelines.readers.mpeg import _frame

RATE = 16_000
NOISE = (0.1 * np.random.default_rng(0).standard_normal(3 * RATE)).astype(np.float32)


def read(file: Path, **changes: Any) -> Decoded | Bad:
    return decode(ListedUtterance(file=file, id="a", split="train", speaker="s", **changes))


def good(file: Path, **changes: Any) -> Decoded:
    found = read(file, **changes)
    assert isinstance(found, Decoded), found
    return found


def reason(file: Path, **changes: Any) -> str:
    found = read(file, **changes)
    assert isinstance(found, Bad)
    return found.reason


def wav(path: Path, audio: np.ndarray = NOISE, rate: int = RATE, **options: Any) -> Path:
    soundfile.write(path, audio, rate, **options)
    return path


def edit(path: Path, place: int, value: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[place : place + len(value)] = value
    path.write_bytes(data)
    return path


def cut(path: Path, part: float = 0.5) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    return path


FORMATS = {
    "wav": {}, "rf64": {"format": "RF64", "subtype": "PCM_16"}, "aiff": {}, "au": {}, "caf": {}, "flac": {}, "w64": {},
    "sph": {"format": "NIST", "subtype": "PCM_16"}, "ogg": {}, "opus": {"format": "OGG", "subtype": "OPUS"}, "mp3": {},
    "wav24": {"format": "WAV", "subtype": "PCM_24"}, "wavex": {"format": "WAVEX", "subtype": "FLOAT"},
    "rifx": {"format": "WAV", "endian": "BIG"}, "adpcm": {"format": "WAV", "subtype": "IMA_ADPCM"},
    "aifc": {"format": "AIFF", "subtype": "FLOAT"}, "svx": {"format": "SVX", "subtype": "PCM_16"},
    "ulaw": {"format": "WAV", "subtype": "ULAW"}, "flac24": {"format": "FLAC", "subtype": "PCM_24"},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_read_to_its_end_and_a_truncated_one_is_refused(name: str, tmp_path: Path) -> None:
    file = wav(tmp_path / f"a.{name}", **FORMATS[name])
    with soundfile.SoundFile(file) as whole:
        expected = np.clip(np.rint(whole.read(-1, dtype="float32") * 32_768), -32_768, 32_767)
    np.testing.assert_array_equal(good(file).samples, expected)
    assert len(good(file).samples) >= len(NOISE)
    for part in (0.5, 0.97):
        whole_bytes = file.read_bytes()
        found = reason(cut(file, part))
        assert any(word in found for word in ("truncated", "lost sync", "malformed"))  # ours, or libsndfile's for FLAC
        file.write_bytes(whole_bytes)


def test_the_reason_of_a_truncated_wav_has_both_lengths(tmp_path: Path) -> None:
    file = wav(tmp_path / "a.wav", np.stack([NOISE, NOISE], 1))
    file.write_bytes(file.read_bytes()[: 44 + 4 * 12_345 + 1])
    assert reason(file) == "truncated: 12,345 of 48,000 samples"
    assert "12,345 of 48,000" in reason(file, crop_s=(0.0, 0.5))  # also for a crop that is present
    less = wav(tmp_path / "b.wav")
    less.write_bytes(less.read_bytes()[:-2])
    assert reason(less) == "truncated: 47,999 of 48,000 samples"
    assert "9,001 bytes" in reason(edit(wav(tmp_path / "c.wav"), 40, struct.pack("<I", 9_001)))


@pytest.mark.parametrize(
    ("form", "size"),
    [
        *(("RIFF", size) for size in (0, 0xFFFF_FFFF, 0x7FFF_F000, 0x8000_0000)),
        *((form, size) for form in ("RIFX", "RF64") for size in (0, 0xFFFF_FFFF)),
    ],
)
def test_a_streamed_wav_is_read_to_its_end(form: str, size: int, tmp_path: Path) -> None:
    options = {"RF64": {"format": "RF64", "subtype": "PCM_16"}, "RIFX": {"endian": "BIG"}}.get(form, {})
    file = wav(tmp_path / "a.wav", **options)
    samples = good(file).samples
    data = file.read_bytes().index(b"data")
    if form == "RF64":
        edit(file, file.read_bytes().index(b"ds64") + 8, struct.pack("<QQ", *2 * [size and 2**64 - 1]))
    else:
        value = struct.pack(">I" if form == "RIFX" else "<I", size)
        edit(edit(file, 4, value), data + 4, value)
    np.testing.assert_array_equal(good(file).samples, samples)
    assert duration_s(file) == 3.0
    file.write_bytes(file.read_bytes()[:-1])
    assert "truncated: ends inside a sample" in reason(file)


def test_an_empty_wav_is_refused_and_bytes_after_the_samples_are_noted(tmp_path: Path) -> None:
    assert reason(wav(tmp_path / "empty.wav", NOISE[:0])) == "empty"
    file = wav(tmp_path / "more.wav")
    file.write_bytes(file.read_bytes() + b"LIST\x04\0\0\0INFO")
    assert good(file).notes == ()
    file.write_bytes(file.read_bytes() + NOISE.tobytes())
    (note,) = good(file).notes
    assert "bytes after the samples" in note
    two = wav(tmp_path / "two.wav")
    two.write_bytes(two.read_bytes() + b"data\x04\0\0\0\1\2\3\4")
    assert "second chunk of audio" in reason(two)


@pytest.mark.parametrize("tail", [0.0, 0.4])
def test_a_flac_of_unknown_length_is_read_in_blocks(tail: float, tmp_path: Path) -> None:
    audio = np.tile(NOISE, 8)[: int((20 + tail) * RATE)]  # more than one block
    file = wav(tmp_path / "a.flac", audio)
    samples = good(file).samples
    edit(file, 21, bytes([file.read_bytes()[21] & 0xF0, 0, 0, 0, 0]))
    assert soundfile.info(file).frames > 2**60
    np.testing.assert_array_equal(good(file).samples, samples)
    np.testing.assert_array_equal(good(file, crop_s=(1.5, 1.0)).samples, samples[24_000:40_000])
    assert duration_s(file) == len(audio) / RATE
    assert "ends before 21.5 s" in reason(file, crop_s=(20.0, 1.5))
    assert "unreadable" in reason(cut(file))


def test_a_flac_that_declares_fewer_samples_is_refused_by_its_md5(tmp_path: Path) -> None:
    file = wav(tmp_path / "a.flac")
    edit(file, 22, struct.pack(">I", 24_000))
    assert soundfile.info(file).frames == 24_000
    assert "MD5" in reason(file)


def test_damage_inside_a_compressed_file_is_refused(tmp_path: Path) -> None:
    for name in ("flac", "ogg", "opus", "mp3"):
        file = wav(tmp_path / f"a.{name}", **FORMATS[name])
        middle = file.stat().st_size // 2
        damaged = bytes(300) if name == "mp3" else bytes([file.read_bytes()[middle] ^ 1])
        assert reason(edit(file, middle, damaged)).startswith(("unreadable", "damaged")), name


def without_xing(path: Path) -> Path:
    data = path.read_bytes()
    length, _ = _frame(data[:4])
    path.write_bytes(data[length:])
    return path


def test_an_mp3_without_its_length_is_read_to_its_end_or_refused(tmp_path: Path) -> None:
    steady = without_xing(wav(tmp_path / "steady.mp3", bitrate_mode="CONSTANT", compression_level=0.5))
    assert len(good(steady).samples) == pytest.approx(len(NOISE), abs=3 * 1_152)
    fading = np.concatenate(
        [NOISE, np.zeros(20 * RATE, np.float32)]
    )  # libsndfile assumes the first bit rate for the whole file
    file = without_xing(wav(tmp_path / "fading.mp3", fading, bitrate_mode="VARIABLE"))
    assert soundfile.info(file).frames < len(fading) // 2
    assert "lacks the length" in reason(file)
    assert good(cut(steady, 0.99)).notes == ("ends inside an MPEG frame",)


def test_a_crop_lies_within_the_file(tmp_path: Path) -> None:
    file = wav(tmp_path / "a.wav")
    np.testing.assert_array_equal(good(file, crop_s=(1.0, 2.0)).samples, good(file).samples[RATE:])
    assert "ends before 3.5 s" in reason(file, crop_s=(2.5, 1.0))
    assert "ends before 4 s" in reason(file, crop_s=(4.0, 1.0))


def test_levels_that_lose_information_are_noted_or_refused(tmp_path: Path) -> None:
    loud = np.clip(30 * NOISE, -1, 1)
    assert "clipped in the recording" in good(wav(tmp_path / "clipped.wav", loud)).notes[0]
    assert good(wav(tmp_path / "peak.wav", NOISE / np.abs(NOISE).max())).notes == ()  # one sample at full scale
    over = good(wav(tmp_path / "over.wav", NOISE / np.abs(NOISE).max() * 1.2, subtype="FLOAT"))
    assert over.notes == ("over full scale, clipped to it",) and over.samples.max() == 32_767
    assert "another scale" in reason(wav(tmp_path / "scale.wav", NOISE * 32_768, subtype="FLOAT"))
    assert good(wav(tmp_path / "silent.wav", 0 * NOISE)).notes == ("digital silence",)
    both = np.stack([NOISE, -NOISE], 1)
    assert "2 channels cancel" in reason(wav(tmp_path / "antiphase.wav", both))
    assert good(wav(tmp_path / "one-sided.wav", both * [1, 0])).changes == ("averaged 2 channels",)


def test_a_run_at_full_scale_is_found_across_blocks(tmp_path: Path) -> None:
    audio = 0.1 * np.ones(2**18 + 1_000, np.float32)
    audio[2**18 - 2 : 2**18 + 2] = 1.0
    assert "clipped" in good(wav(tmp_path / "a.wav", audio)).notes[0]
    audio[2**18 - 2] = 0.1
    assert good(wav(tmp_path / "b.wav", audio)).notes == ()


def test_many_channels_are_averaged_as_numpy_does(tmp_path: Path) -> None:
    audio = np.random.default_rng(1).uniform(-0.5, 0.5, (50_000, 12)).astype(np.float32)
    file = wav(tmp_path / "a.wav", audio, subtype="FLOAT")
    np.testing.assert_array_equal(good(file).samples, np.rint(audio.mean(axis=1) * 32_768).astype(np.int16))


@pytest.mark.parametrize("rate", [0, 1, 999, 768_001, 10_000_000, 0xFFFF_FFFF])
def test_an_impossible_rate_is_refused(rate: int, tmp_path: Path) -> None:
    found = reason(edit(wav(tmp_path / "a.wav"), 24, struct.pack("<I", rate)))
    assert "sampling rate" in found or "unreadable" in found


def test_a_file_beyond_the_limit_is_refused_and_a_long_one_raises(tmp_path: Path) -> None:
    file = wav(tmp_path / "a.flac", np.zeros(3_601 * 1_000, np.int16), 1_000)
    assert "longer than 1 h" in reason(file)
    edit(file, 21, bytes([file.read_bytes()[21] & 0xF0, 0, 0, 0, 0]))
    assert "longer than 1 h" in reason(file)
    utterance = ListedUtterance(file=wav(tmp_path / "b.wav"), id="a", split="train", speaker="s")
    with pytest.raises(NotInParallel):
        decode(utterance, longest_s=2.9)
    assert isinstance(decode(utterance, longest_s=3.0), Decoded)


def test_paths_that_are_not_readable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")
    (tmp_path / "nothing.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("RIFF of no kind")
    for name, expected in {
        "folder.wav": "it is a folder",
        "pipe.wav": "not a regular file",
        "loop.wav": "symbolic links",
        "nothing.wav": "unreadable",
        "text.wav": "unreadable",
        "none.wav": "does not exist",
        f"{'x' * 300}.wav": "name too long",
        "nul\0.wav": "null",
    }.items():
        assert expected in reason(tmp_path / name), name


def test_headers_of_noise_are_refused_without_a_traceback(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("wav", "aiff", "au", "sph", "flac", "ogg", "mp3"):
        file = wav(tmp_path / f"a.{name}", NOISE[:4_000], **FORMATS[name])
        whole = file.read_bytes()
        for _ in range(12):
            place = int(generator.integers(0, min(len(whole), 120)))
            edit(file, place, generator.bytes(4))
            assert isinstance(read(file), Decoded | Bad)
            file.write_bytes(whole)


@pytest.mark.parametrize("rate", [44_100, 8_000, 22_050, 48_000, 11_025, 192_000])
def test_common_rates_are_resampled_by_torchaudio_itself(rate: int) -> None:
    audio = NOISE[: rate // 3]
    expected = torchaudio.functional.resample(torch.from_numpy(audio), rate, RATE).numpy()
    np.testing.assert_array_equal(resample(audio, rate, RATE), expected)


@pytest.mark.parametrize("rate", [44_099, 47_999, 22_051, 8_001, 96_001, 5_513, 767_999, 16_001])
def test_any_rate_is_resampled_at_the_cost_of_its_audio(rate: int) -> None:
    hz = 440.0
    time = np.arange((rate + rate // 2 if rate < 100_000 else rate // 4) + 7) / rate
    found = resample(np.sin(2 * np.pi * hz * time).astype(np.float32), rate, RATE)
    assert found.dtype == np.float32 and len(found) == -(-len(time) * RATE // rate)
    expected = np.sin(2 * np.pi * hz * np.arange(len(found)) / RATE)
    inner = slice(200, -200)
    error = found[inner] - expected[inner]
    assert 10 * np.log10(np.mean(expected[inner] ** 2) / np.mean(error**2)) > 55
    high = 0.47 * RATE * 2 if rate > 40_000 else None  # above the new band
    if high:
        left = resample(np.sin(2 * np.pi * high * time).astype(np.float32), rate, RATE)
        assert 20 * np.log10(np.abs(left[inner]).max()) < -50


def test_both_ways_of_resampling_are_one_filter() -> None:
    # Just above the largest kernel that torchaudio itself computes.
    theirs = torchaudio.functional.resample(torch.from_numpy(NOISE[:5_000]), 2_003, 1_050).numpy()
    np.testing.assert_allclose(resample(NOISE[:5_000], 2_003, 1_050), theirs, atol=2e-4)
    assert resample(NOISE[:1], 5_513, RATE).shape == (3,)
    assert resample(NOISE[:0], 5_513, RATE).shape == (0,)
