"""espeak-ng through its C API, voices, room acoustics, sentences and the lexicon."""

from functools import cache
from itertools import islice, pairwise
from pathlib import Path

import espeakng_loader
import numpy as np
import pytest
from scipy.signal import correlate

from extract.base.errors import RetortError
from pipelines.demo.espeak import Synthesiser
from pipelines.demo.lexicon import VOWEL_PHONES, arpabet, lexicon_text
from pipelines.demo.process_pool import ProcessPool
from pipelines.demo.room_acoustics import (
    MICROPHONE_HZ,
    NOISE_EXPONENTS,
    SAMPLE_RATE_HZ,
    Room,
    apply_microphone,
    apply_room,
    coloured_noise,
    draw_room,
    impulse_response,
)
from pipelines.demo.sentences import PARTS, VOCABULARY, part_of, sentences
from pipelines.demo.voices import SCORED_VARIANTS, TEACHER_VARIANTS, Voice, draw_voices

TEXT = "the red fox jumped over seven little houses"
ARPABET_VOWELS = {"AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"}
ARPABET_CONSONANTS = {
    "B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N", "NG", "P", "R", "S", "SH", "T", "TH", "V", "W", "Y",
    "Z", "ZH",
}  # fmt: skip


@cache
def synthesiser() -> Synthesiser:
    return Synthesiser()


def test_phones_cover_the_speech_in_order() -> None:
    speech = synthesiser().synthesise(TEXT, Voice("f4"))
    assert 1.5 < len(speech.samples) / SAMPLE_RATE_HZ < 5
    assert np.abs(speech.samples).max() <= 1.1
    assert speech.samples.dtype == np.float32
    assert all(phone.start < phone.end for phone in speech.phones)
    assert all(left.end == right.start for left, right in pairwise(speech.phones))
    assert speech.phones[-1].end == len(speech.samples)
    names = [phone.name.lstrip("',") for phone in speech.phones]
    assert "".join(names).startswith("D@2rEdf0ks")


def test_pauses_are_silent() -> None:
    """Compare the times of the phones with the waveform: vowels are loud, the last pause is silent."""
    speech = synthesiser().synthesise(TEXT, Voice("m3"))
    pause = next(phone for phone in reversed(speech.phones) if phone.name.startswith("_"))
    vowels = [phone for phone in speech.phones if phone.name.startswith("'")]
    loudness = [np.sqrt(np.mean(speech.samples[phone.start : phone.end] ** 2)) for phone in vowels]
    assert np.sqrt(np.mean(speech.samples[pause.start : pause.end] ** 2)) < 0.05 * min(loudness)


def test_rate_and_pitch_change_length_and_period() -> None:
    slow = synthesiser().synthesise(TEXT, Voice("f4", rate=130))
    fast = synthesiser().synthesise(TEXT, Voice("f4", rate=220))
    assert len(slow.samples) > 1.3 * len(fast.samples)
    low = synthesiser().synthesise("a", Voice("m3", pitch=10, range=0))
    high = synthesiser().synthesise("a", Voice("m3", pitch=90, range=0))
    assert _period(low.samples) > 1.3 * _period(high.samples)


def _period(samples: np.ndarray) -> int:
    loud = samples[int(np.argmax(np.abs(samples))) :][:3200]
    correlation = correlate(loud, loud)[len(loud) - 1 :]
    return 40 + int(np.argmax(correlation[40:400]))


def test_an_unknown_variant_is_named() -> None:
    with pytest.raises(RetortError, match="nobody"):
        synthesiser().synthesise("hello", Voice("nobody"))


def test_a_second_synthesiser_in_one_process_is_refused() -> None:
    synthesiser()
    with pytest.raises(RetortError, match="Synthesiser already"):
        Synthesiser()


def test_every_variant_exists_and_no_family_is_in_both_lists() -> None:
    there = {path.name for path in (Path(str(espeakng_loader.get_data_path())) / "voices" / "!v").iterdir()}
    assert set(TEACHER_VARIANTS) | set(SCORED_VARIANTS) <= there
    families = [{name.rstrip("0123456789") for name in names} for names in (TEACHER_VARIANTS, SCORED_VARIANTS)]
    assert families[0] & families[1] == {"f", "m"}  # f1 and f4 are two voices; steph and steph2 are nearly one
    assert not set(TEACHER_VARIANTS) & set(SCORED_VARIANTS)


def _synthesise(voice: Voice) -> bytes:
    """Synthesise in a fresh process: espeak-ng keeps state between utterances."""
    fresh = Synthesiser()
    return b"".join(fresh.synthesise(text, voice).samples.tobytes() for text in (TEXT, "stop"))


def test_every_variant_gives_the_same_samples_in_every_process() -> None:
    variants = [*TEACHER_VARIANTS, *SCORED_VARIANTS]
    with ProcessPool(workers=2) as pool:
        results = list(pool.map(_synthesise, [Voice(variant) for variant in variants for _ in range(4)]))
    samples_of = {variant: set(results[4 * index : 4 * index + 4]) for index, variant in enumerate(variants)}
    assert [variant for variant, different in samples_of.items() if len(different) > 1] == []
    assert len({samples for different in samples_of.values() for samples in different}) == len(variants)


def test_voices_differ_and_those_of_one_variant_in_pitch() -> None:
    voices = draw_voices(SCORED_VARIANTS, 60, np.random.default_rng(0))
    assert len(set(voices)) == 60
    assert voices == draw_voices(SCORED_VARIANTS, 60, np.random.default_rng(0))
    assert len({voice.variant for voice in voices[: len(SCORED_VARIANTS)]}) == len(SCORED_VARIANTS)
    for variant in SCORED_VARIANTS:
        pitches = sorted(voice.pitch for voice in voices if voice.variant == variant)
        assert all(right - left >= 20 for left, right in pairwise(pitches))


def test_a_room_gives_its_level_and_signal_to_noise_ratio() -> None:
    generator = np.random.default_rng(0)
    speech = generator.standard_normal(32_000).astype(np.float32) * 0.1
    room = Room(decay_s=0.3, direct_to_tail_db=100, colour="white", snr_db=6, level_db=-30, seed=1)
    recorded = apply_room(speech, room, generator)
    assert recorded.shape == speech.shape
    assert 20 * np.log10(np.sqrt(np.mean(recorded**2))) == pytest.approx(-30, abs=0.1)
    gain = recorded @ speech / (speech @ speech)
    noise = recorded - gain * speech
    assert 10 * np.log10((gain * speech) @ (gain * speech) / (noise @ noise)) == pytest.approx(6, abs=0.3)


def test_the_tail_of_a_room_falls_by_its_decay_time() -> None:
    response = impulse_response(Room(0.4, 0.0, "pink", 20, -20, seed=3))
    energy_left = np.cumsum(response[:0:-1] ** 2)[::-1]
    half_way = energy_left[int(0.2 * SAMPLE_RATE_HZ)] / energy_left[0]
    assert 10 * np.log10(half_way) == pytest.approx(-30, abs=3)


@pytest.mark.parametrize(("colour", "exponent"), NOISE_EXPONENTS.items())
def test_noise_has_its_colour(colour: str, exponent: float) -> None:
    power = np.abs(np.fft.rfft(coloured_noise(160_000, colour, np.random.default_rng(0)))) ** 2
    low, high = power[2_000:4_000].mean(), power[20_000:40_000].mean()  # ten times the frequency
    assert np.log10(low / high) == pytest.approx(exponent, abs=0.1)


def test_a_microphone_colours_and_keeps_the_level() -> None:
    """Compare the response to white noise with the gains, around every frequency point."""
    noise = np.random.default_rng(0).standard_normal(320_000).astype(np.float32) * 0.1
    gains_db = np.array([0.0, 0.0, -6.0, 0.0, 6.0, 6.0, 0.0, -12.0])
    recorded = apply_microphone(noise, gains_db)
    assert recorded.shape == noise.shape
    assert np.sqrt(np.mean(recorded**2)) == pytest.approx(np.sqrt(np.mean(noise**2)), rel=1e-3)
    ratio = np.abs(np.fft.rfft(recorded)) / np.abs(np.fft.rfft(noise))
    measured_db = [
        20 * np.log10(ratio[int(hertz * 20) - 5 : int(hertz * 20) + 5].mean()) for hertz in MICROPHONE_HZ[:-1]
    ]
    assert np.diff(measured_db) == pytest.approx(np.diff(gains_db[:-1]), abs=0.1)


def test_one_seed_gives_one_room() -> None:
    speech = np.sin(np.arange(8_000, dtype=np.float32))
    results = []
    for _ in range(2):
        generator = np.random.default_rng(5)
        results.append(apply_room(speech, draw_room(generator, (0, 20)), generator))
    assert np.array_equal(*results)


def test_parts_of_the_sentences_are_disjoint() -> None:
    drawn = {part: set(islice(sentences(part, np.random.default_rng(0)), 200)) for part in PARTS}
    for part, some in drawn.items():
        assert len(some) == 200
        assert {part_of(sentence) for sentence in some} == {part}
        assert {word for sentence in some for word in sentence.split()} <= set(VOCABULARY)


def test_every_word_is_spelled_in_arpabet_with_one_stress_digit_a_vowel() -> None:
    assert VOWEL_PHONES == ARPABET_VOWELS
    for word in VOCABULARY:
        for phone in arpabet(word, synthesiser().pronounce(word)).split():
            if phone[-1].isdigit():
                assert phone[:-1] in ARPABET_VOWELS, word
                assert phone[-1] in "012", word
            else:
                assert phone in ARPABET_CONSONANTS, word


@pytest.mark.parametrize(
    ("word", "phones"),
    [  # as the CMU dictionary has them
        ("teacher", "T IY1 CH ER0"),
        ("yellow", "Y EH1 L OW0"),
        ("bear", "B EH1 R"),
        ("bottle", "B AA1 T AH0 L"),
        ("measure", "M EH1 ZH ER0"),
        ("judge", "JH AH1 JH"),
        ("quickly", "K W IH1 K L IY0"),
        ("stories", "S T AO1 R IY0 Z"),
        ("the", "DH AH0"),
        ("a", "AH0"),
        ("but", "B AH1 T"),
        ("tomorrow", "T AH0 M AA1 R OW0"),
    ],
)
def test_pronunciations_are_those_of_the_cmu_dictionary(word: str, phones: str) -> None:
    assert arpabet(word, synthesiser().pronounce(word)) == phones


def test_an_unknown_phone_is_named() -> None:
    with pytest.raises(RetortError, match=r"'Q'.*'word'.*lexicon\.py"):
        arpabet("word", ["Q"])


def test_the_lexicon_has_the_published_form() -> None:
    assert lexicon_text({"wide": "W AY1 D", "the": "DH AH0"}) == "THE\tDH AH0\nWIDE\tW AY1 D\n"
