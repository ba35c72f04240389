"""Readers of the published layouts: files, labels and samples, and errors for files that can't be used."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from torchaudio_readers import same_as_torchaudio

from extract.base.errors import RetortError
from extract.corpus import Corpus
from pipelines.readers import ReaderOptions, read_corpus


def tone(seconds: float = 0.5, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    audio = 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    return np.repeat(audio[:, None], channels, axis=1).astype(np.float32)


def write_audio(path: Path, audio: np.ndarray, rate: int = 16_000, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate, **options)


def folder_of(root: Path, files: dict[str, np.ndarray], rate: int = 16_000) -> Path:
    for name, audio in files.items():
        write_audio(root / name, audio, rate, subtype="FLOAT" if name.endswith(".wav") else None)
    (root / "metadata.csv").write_text("file,split,speaker,digit\n" + "".join(f"{n},train,s1,7\n" for n in files))
    return root


def test_librispeech(tmp_path: Path) -> None:
    base = tmp_path / "LibriSpeech"
    for part, speaker in (("train-clean-100", 19), ("dev-clean", 84), ("test-clean", 61), ("test-other", 99)):
        folder = base / part / str(speaker) / "198"
        write_audio(folder / f"{speaker}-198-0001.flac", tone())
        (folder / f"{speaker}-198.trans.txt").write_text(f"{speaker}-198-0001 NORTH WIND\n")
    (tmp_path / "librispeech-lexicon.txt").write_text("NORTH\tN AO1 R TH\nWIND\tW IH1 N D\nWIND\tW AY1 N D\n")
    read_corpus("librispeech", tmp_path, tmp_path / "c.h5")
    corpus = Corpus.open(tmp_path / "c.json")
    assert sorted(zip(corpus.ids, corpus.splits, corpus.speakers, strict=True)) == [
        ("19-198-0001", "train", "19"),
        ("61-198-0001", "test", "61"),
        ("84-198-0001", "dev", "84"),
    ]
    assert set(corpus.label("text")) == {"NORTH WIND"}
    assert set(corpus.label("phones")) == {"N AO1 R TH W IH1 N D"}  # the first pronunciation
    read_corpus("librispeech", tmp_path, tmp_path / "o.h5", options=ReaderOptions(parts=("test-other",)))
    assert Corpus.open(tmp_path / "o.h5").ids == ["99-198-0001"]
    (tmp_path / "librispeech-lexicon.txt").write_text("NORTH\tN AO1 R TH\n")
    with pytest.raises(RetortError, match=r"'WIND'.*lexicon"):
        read_corpus("librispeech", tmp_path, tmp_path / "c.h5")


def test_librispeech_agrees_with_torchaudio(tmp_path: Path) -> None:
    folder = tmp_path / "LibriSpeech" / "dev-clean" / "84" / "121123"
    for number in range(3):
        write_audio(folder / f"84-121123-{number:04d}.flac", tone(0.3 + number / 10))
    (folder / "84-121123.trans.txt").write_text("".join(f"84-121123-{n:04d} LINE {'ABC'[n]}\n" for n in range(3)))
    read_corpus("librispeech", tmp_path, tmp_path / "c.h5")
    ours = Corpus.open(tmp_path / "c.h5")
    theirs = torchaudio.datasets.LIBRISPEECH(tmp_path, url="dev-clean")
    for index in range(len(theirs)):
        path, _rate, text, speaker, _chapter, _number = theirs.get_metadata(index)
        assert (Path(path).stem, text, str(speaker)) == (
            ours.ids[index],
            ours.label("text")[index],
            ours.speakers[index],
        )
        np.testing.assert_array_equal(
            ours.samples(index), soundfile.read(tmp_path / "LibriSpeech" / path, dtype="int16")[0]
        )


def test_speech_commands(tmp_path: Path) -> None:
    base, test = tmp_path / "speech_commands_v0.01", tmp_path / "speech_commands_test_set_v0.01"
    for name in ("yes/aa_nohash_0", "yes/bb_nohash_0", "yes/cc_nohash_0", "bed/aa_nohash_0"):
        write_audio(base / f"{name}.wav", tone(1.0))
    write_audio(base / "_background_noise_" / "hum.wav", tone(12.5))
    (base / "validation_list.txt").write_text("yes/bb_nohash_0.wav\n")
    (base / "testing_list.txt").write_text("yes/cc_nohash_0.wav\n")
    for name in ("yes", "_silence_", "_unknown_"):
        write_audio(test / name / "dd_nohash_0.wav", tone(1.0))
    read_corpus("speech-commands", tmp_path, tmp_path / "c.h5")
    corpus = Corpus.open(tmp_path / "c.h5")
    found = set(zip(corpus.ids, corpus.splits, corpus.label("keyword"), strict=True))
    assert {
        ("train/yes/aa_nohash_0", "train", "yes"),
        ("dev/yes/bb_nohash_0", "dev", "yes"),
        ("train/bed/aa_nohash_0", "train", "_unknown_"),
        ("test/_silence_/dd_nohash_0", "test", "_silence_"),
        ("dev/_silence_/hum-0011", "dev", "_silence_"),
    } <= found
    assert not any("cc_nohash" in name for name, _, _ in found)  # its own testing list is not scored
    assert sum(label == "_silence_" for _, _, label in found) == 12 + 1
    # SUPERB's keyword spotting applies a gain of -3 dB.
    original = soundfile.read(base / "yes/aa_nohash_0.wav")[0]
    waveform = corpus.waveform(corpus.ids.index("train/yes/aa_nohash_0"))
    np.testing.assert_allclose(waveform, original * 10 ** (-3 / 20), atol=1e-4)


def test_voxceleb1(tmp_path: Path) -> None:
    for part, name in (
        ("dev", "id10001/abc/00001.wav"),
        ("dev", "id10001/xyz/00001.wav"),
        ("test", "id10270/q/00002.wav"),
    ):
        write_audio(tmp_path / part / "wav" / name, tone())
    (tmp_path / "iden_split.txt").write_text(
        "1 id10001/abc/00001.wav\n3 id10001/xyz/00001.wav\n2 id10270/q/00002.wav\n"
    )
    read_corpus("voxceleb1", tmp_path, tmp_path / "c.h5")
    corpus = Corpus.open(tmp_path / "c.h5")
    assert corpus.splits == ["train", "test", "dev"]
    assert corpus.label("speaker") == corpus.speakers == ["id10001", "id10001", "id10270"]


FLUENT_HEADER = ",path,speakerId,transcription,action,object,location\n"


def fluent_folder(root: Path) -> Path:
    """Write two speakers; one transcription has a comma, quoted as in the published tables."""
    base = root / "fluent_speech_commands_dataset"
    rows = {
        "train": [("ann", "a1", '"Turn the lights on, please"', "activate", "lights", "none")],
        "valid": [("bob", "b1", "Fetch my shoes", "bring", "shoes", "none")],
        "test": [
            ("bob", "b2", "Louder in the kitchen", "increase", "volume", "kitchen"),
            ("ann", "a2", "Use Chinese", "change language", "Chinese", "none"),
        ],
    }
    (base / "data").mkdir(parents=True)
    for part, some in rows.items():
        lines = [f"{n},wavs/speakers/{who}/{name}.wav,{who},{','.join(r)}" for n, (who, name, *r) in enumerate(some)]
        (base / "data" / f"{part}_data.csv").write_text(FLUENT_HEADER + "\n".join(lines) + "\n")
        for who, name, *_ in some:
            write_audio(base / "wavs" / "speakers" / who / f"{name}.wav", tone())
    return root


def test_fluent_speech_commands_agrees_with_torchaudio(tmp_path: Path) -> None:
    read_corpus("fluent", fluent_folder(tmp_path), tmp_path / "c.h5")
    assert Corpus.open(tmp_path / "c.h5").splits == ["train", "dev", "test", "test"]
    assert Corpus.open(tmp_path / "c.h5").label("text")[0] == "Turn the lights on, please"
    assert same_as_torchaudio("fluent", tmp_path) == 4
    read_corpus("fluent", tmp_path / "fluent_speech_commands_dataset", tmp_path / "inner.h5")
    assert Corpus.open(tmp_path / "inner.h5").digest == Corpus.open(tmp_path / "c.h5").digest


def test_a_table_of_fluent_speech_commands_without_a_column_is_named(tmp_path: Path) -> None:
    table = fluent_folder(tmp_path) / "fluent_speech_commands_dataset/data/valid_data.csv"
    table.write_text("path,speakerId,transcription,action,object\n")
    with pytest.raises(RetortError, match=r"valid_data\.csv: .*'location'.*path, speakerId"):
        read_corpus("fluent", tmp_path, tmp_path / "c.h5")
    table.unlink()
    with pytest.raises(RetortError, match=r"data/valid_data\.csv not found; .*fluent_speech_commands_dataset/\{data"):
        read_corpus("fluent", tmp_path, tmp_path / "c.h5")


def iemocap_folder(root: Path) -> Path:
    """Write five sessions, each with one dialog of a turn per emotion, two of which no class has."""
    for number in range(1, 6):
        base, dialog = root / "IEMOCAP" / f"Session{number}", f"Ses0{number}F_impro01"
        lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n", "\n"]
        for turn, emotion in enumerate(("neu", "hap", "exc", "ang", "sad", "fru", "xxx")):
            name = f"{dialog}_{'FM'[turn % 2]}{turn:03d}"
            write_audio(base / "sentences" / "wav" / dialog / f"{name}.wav", tone())
            lines.append(f"[{turn}.0000 - {turn}.5000]\t{name}\t{emotion}\t[2.5000, 2.5000, 2.5000]\n")
            lines.append("C-E1:\tNeutral;\t()\n")
        (base / "dialog" / "EmoEvaluation").mkdir(parents=True)
        (base / "dialog" / "EmoEvaluation" / f"{dialog}.txt").write_text("".join(lines))
    return root


def test_iemocap_agrees_with_torchaudio(tmp_path: Path) -> None:
    read_corpus("iemocap", iemocap_folder(tmp_path), tmp_path / "c.h5")
    corpus = Corpus.open(tmp_path / "c.h5")
    assert corpus.label("emotion") == ["neu", "hap", "hap", "ang", "sad"] * 5
    assert [corpus.splits.count(f"Session{number}") for number in range(1, 6)] == [5] * 5
    assert corpus.speakers[:2] == ["Ses01F", "Ses01M"]  # the speaker of the turn, not of the dialog's name
    assert same_as_torchaudio("iemocap", tmp_path) == 25


def test_iemocap_without_a_session_or_an_evaluation_shows_the_tree(tmp_path: Path) -> None:
    base = iemocap_folder(tmp_path) / "IEMOCAP"
    (base / "Session2/dialog/EmoEvaluation/Ses02F_impro01.txt").unlink()
    with pytest.raises(RetortError, match=r"Session2/dialog/EmoEvaluation/Ses02F_impro01\.txt not found"):
        read_corpus("iemocap", tmp_path, tmp_path / "c.h5")
    shutil.rmtree(base / "Session1/sentences")
    with pytest.raises(RetortError, match=r"Session1/sentences/wav/DIALOG/ not found; .*IEMOCAP/Session\{1"):
        read_corpus("iemocap", tmp_path, tmp_path / "c.h5")


def snips_folder(root: Path, audio: str = "wav") -> Path:
    """Write every speaker in every split, as published; two requests per split."""
    base, lines = root / "SNIPS", []
    requests = {
        "train": [("PLAY BLUE SKIES", "O track track PlayMusic"), ("STOP", "O PlayMusic")],
        "valid": [("RAIN IN ROME", "O O city GetWeather"), ("BOOK A TABLE", "O O O BookRestaurant")],
        "test": [("RATE IT FIVE", "O O rating_value RateBook"), ("RAIN", "O GetWeather")],
    }
    for part, some in requests.items():
        for speaker in torchaudio.datasets.snips._SPEAKERS:
            for number, (text, slots) in enumerate(some):
                name = f"{speaker}-snips-{part}-{number}"
                lines.append(f"{name} BOS {text} EOS\tO {slots}\n")
                write_audio(base / part / f"{name}.{audio}", tone(0.1))
    (base / "all.iob.snips.txt").write_text("".join(lines))
    return root


@pytest.mark.parametrize("audio", ["wav", "mp3"])
def test_snips_agrees_with_torchaudio_on_the_references_speakers(tmp_path: Path, audio: str) -> None:
    read_corpus("snips", snips_folder(tmp_path, audio), tmp_path / "c.h5")
    corpus = Corpus.open(tmp_path / "c.h5")
    assert {split: corpus.splits.count(split) for split in corpus.splits} == {"train": 16, "dev": 8, "test": 8}
    speakers = [{corpus.speakers[i] for i in corpus.select(split)} for split in ("train", "dev", "test")]
    assert sum(map(len, speakers)) == len(set.union(*speakers)) == 16
    assert same_as_torchaudio("snips", tmp_path) == 32


def test_snips_names_a_line_whose_slots_are_not_its_words(tmp_path: Path) -> None:
    table = snips_folder(tmp_path) / "SNIPS/all.iob.snips.txt"
    table.write_text(table.read_text() + "Ivy-snips-train-9 BOS PLAY IT EOS\tO O PlayMusic\n")
    with pytest.raises(RetortError, match=r"all\.iob\.snips\.txt: got line 'Ivy-snips-train-9 "):
        read_corpus("snips", tmp_path, tmp_path / "c.h5")


def test_snips_without_a_split_shows_the_tree_and_without_a_file_names_it(tmp_path: Path) -> None:
    base = snips_folder(tmp_path) / "SNIPS"
    (base / "train/Joey-snips-train-1.wav").unlink()
    with pytest.raises(RetortError, match=r"1 of 32 files can't be used: .*Joey-snips-train-1\.wav \(does not exist\)"):
        read_corpus("snips", tmp_path, tmp_path / "c.h5")
    shutil.rmtree(base / "test")
    with pytest.raises(RetortError, match=r"test/Brian-snips-test-\* not found; .*SNIPS/\{all\.iob"):
        read_corpus("snips", tmp_path, tmp_path / "c.h5")


def test_folder_renames_columns(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a/one.wav": tone(), "b/one.flac": tone()})
    read_corpus("folder", tmp_path, tmp_path / "c.h5", options=ReaderOptions(rename={"digit": "keyword"}))
    corpus = Corpus.open(tmp_path / "c.h5")
    assert corpus.ids == ["a/one", "b/one"]
    assert corpus.label("keyword") == ["7", "7"]
    with pytest.raises(RetortError, match=r"--rename number: .*file, split, speaker, digit"):
        read_corpus("folder", tmp_path, tmp_path / "c.h5", options=ReaderOptions(rename={"number": "keyword"}))


def test_other_rates_and_channels_are_converted_and_recorded(tmp_path: Path) -> None:
    folder_of(tmp_path, {"stereo.wav": tone(1.0, 8_000, channels=2)}, rate=8_000)
    card = read_corpus("folder", tmp_path, tmp_path / "c.h5")
    assert card["record"]["changed"] == {"averaged 2 channels": 1, "resampled 8000 Hz": 1}
    expected = torchaudio.functional.resample(torch.from_numpy(tone(1.0, 8_000)[:, 0]), 8_000, 16_000).numpy()
    np.testing.assert_allclose(Corpus.open(tmp_path / "c.h5").waveform(0), expected, atol=1 / 32_768)


def test_all_bad_files_are_in_one_error_or_dropped_and_recorded(tmp_path: Path) -> None:
    with_nan = tone()
    with_nan[100] = np.nan
    folder_of(tmp_path, {"good.wav": tone(), "nan.wav": with_nan, "empty.wav": tone(0.0), "short.wav": tone(0.02)})
    (tmp_path / "broken.wav").write_bytes(b"RIFF but no more")
    with (tmp_path / "metadata.csv").open("a") as table:
        table.write("broken.wav,train,s1,7\nmissing.wav,train,s1,7\n")
    with pytest.raises(RetortError) as caught:
        read_corpus("folder", tmp_path, tmp_path / "c.h5")
    message = str(caught.value)
    assert message.startswith("5 of 6 files can't be used")
    for name, why in (
        ("nan.wav", "NaN"),
        ("empty.wav", "empty"),
        ("short.wav", "320 samples at 16 kHz, one frame needs 400"),
        ("broken.wav", "unreadable"),
        ("missing.wav", "does not exist"),
    ):
        assert f"{tmp_path / name} (" in message
        assert why in message
    assert "--skip-bad" in message
    assert not (tmp_path / "c.h5").exists()
    assert not (tmp_path / "c.json").exists()
    card = read_corpus("folder", tmp_path, tmp_path / "c.h5", skip_bad=True)
    assert len(card["record"]["dropped"]) == 5
    assert Corpus.open(tmp_path / "c.json").ids == ["good"]
    assert json.loads((tmp_path / "c.json").read_text()) == card
