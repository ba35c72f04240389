"""Uniform behaviour of the readers of folders for the same oddities of lists, tables and folders."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from test_readers import fluent_folder, iemocap_folder, snips_folder, tone, write_audio

from extract.base.errors import RetortError
from extract.corpus import Corpus
from pipelines.__main__ import main
from pipelines.readers import ReaderOptions, read_corpus


def folder(root: Path) -> Path:
    for name in ("a/one.wav", "a/two.wav", "three.wav", "four.flac"):
        write_audio(root / name, tone())
    (root / "metadata.csv").write_text("file,split\na/one.wav,train\na/two.wav,dev\nthree.wav,test\nfour.flac,test\n")
    return root


def librispeech(root: Path) -> Path:
    for part, speaker in (("train-clean-100", 19), ("dev-clean", 84)):
        chapter = root / "LibriSpeech" / part / str(speaker) / "198"
        for number in range(3):
            write_audio(chapter / f"{speaker}-198-{number:04d}.flac", tone())
        lines = "".join(f"{speaker}-198-{number:04d} NORTH WIND\n" for number in range(3))
        (chapter / f"{speaker}-198.trans.txt").write_text(lines)
    return root


def speech_commands(root: Path) -> Path:
    base = root / "speech_commands_v0.01"
    for name in ("yes/a_nohash_0", "yes/b_nohash_0", "no/c_nohash_0", "yes/d_nohash_0", "_background_noise_/hum"):
        write_audio(base / f"{name}.wav", tone(1.0))
    (base / "validation_list.txt").write_text("yes/b_nohash_0.wav\nno/c_nohash_0.wav\n")
    (base / "testing_list.txt").write_text("yes/d_nohash_0.wav\n")
    write_audio(root / "speech_commands_test_set_v0.01" / "yes" / "e_nohash_0.wav", tone(1.0))
    return root


def voxceleb(root: Path) -> Path:
    names = [f"id1000{speaker}/x/0000{number}.wav" for speaker in range(2) for number in range(2)]
    for name in names:
        write_audio(root / "dev" / "wav" / name, tone(2.5))
    for number in range(3):
        write_audio(root / "test" / "wav" / f"id10270/y/0000{number}.wav", tone())
    (root / "iden_split.txt").write_text("".join(f"{1 + at % 3} {name}\n" for at, name in enumerate(names)))
    pairs = ((0, 1), (0, 2), (1, 2))
    trials = (f"1 id10270/y/0000{left}.wav id10270/y/0000{right}.wav\n" for left, right in pairs)
    (root / "veri_test2.txt").write_text("".join(trials))
    return root


def librimix(root: Path) -> Path:
    for split in ("train", "dev", "test"):
        data = root / "data" / split
        data.mkdir(parents=True)
        names = [f"{split}{number}" for number in range(3)]
        for name in names:
            write_audio(root / "Libri2Mix" / f"{name}.wav", tone(2.0))
        (data / "wav.scp").write_text("".join(f"{name} /else/Libri2Mix/{name}.wav\n" for name in names))
        (data / "reco2dur").write_text("".join(f"{name} 2.0\n" for name in names))
        (data / "segments").write_text("".join(f"{name}_u {name} 0.1 1.5\n" for name in names))
        (data / "utt2spk").write_text("".join(f"{name}_u s\n" for name in names))
        (data / "rttm").write_text("".join(f"SPEAKER {name} 1 0.1 1.4 <NA> <NA> s <NA>\n" for name in names))
    return root


def kaldi(root: Path) -> Path:
    for split in ("train", "dev"):
        (root / split).mkdir(parents=True)
        names = [f"{split}{number}" for number in range(3)]
        for name in names:
            write_audio(root / "audio" / f"{name}.flac", tone())
        (root / split / "wav.scp").write_text("".join(f"{name} audio/{name}.flac\n" for name in names))
        (root / split / "utt2spk").write_text("".join(f"{name} s\n" for name in names))
        (root / split / "text").write_text("".join(f"{name} NORTH WIND\n" for name in names))
    return root


def quesst(root: Path) -> Path:
    base, scoring = root / "quesst14Database", root / "quesst14Database" / "scoring"
    for key, kind in (("utterances", "Audio"), ("dev", "dev_queries"), ("eval", "eval_queries")):
        names = [f"{kind}/{key}{number}.wav" for number in range(3)]
        for name in names:
            write_audio(base / name, tone())
        scoring.mkdir(exist_ok=True)
        lines = "".join(f"quesst14Database/{name} nnenglish\n" for name in names)
        (scoring / f"language_key_{key}.lst").write_text(lines)
    for split in ("dev", "eval"):
        truth = scoring / f"groundtruth_quesst14_{split}"
        truth.mkdir()
        (truth / "x.rttm").write_text(f"LEXEME utterances0 1 0.0 0.5 {split}0 lex unknown <NA>\n")
        (truth / "x.tlist.xml").write_text("<termlist/>")
    return root


# Reader -> writer of its files, one of its lists, and two files that a list (for trials, the trial list) names.
WORLDS: dict[str, tuple[Callable[[Path], Path], str, tuple[str, str]]] = {
    "folder": (folder, "metadata.csv", ("a/two.wav", "four.flac")),
    "kaldi": (kaldi, "dev/wav.scp", ("audio/dev1.flac", "audio/train0.flac")),
    "librispeech": (librispeech, "LibriSpeech/dev-clean/84/198/84-198.trans.txt", (
        "LibriSpeech/dev-clean/84/198/84-198-0000.flac", "LibriSpeech/train-clean-100/19/198/19-198-0002.flac",
    )),
    "speech-commands": (speech_commands, "speech_commands_v0.01/validation_list.txt", (
        "speech_commands_v0.01/no/c_nohash_0.wav", "speech_commands_v0.01/yes/b_nohash_0.wav",
    )),
    "voxceleb1": (voxceleb, "iden_split.txt", ("dev/wav/id10000/x/00001.wav", "dev/wav/id10001/x/00000.wav")),
    "voxceleb1-trials": (voxceleb, "veri_test2.txt", ("test/wav/id10270/y/00002.wav",) * 2),
    "fluent": (fluent_folder, "fluent_speech_commands_dataset/data/test_data.csv", (
        "fluent_speech_commands_dataset/wavs/speakers/bob/b1.wav",
        "fluent_speech_commands_dataset/wavs/speakers/bob/b2.wav",
    )),
    "iemocap": (iemocap_folder, "IEMOCAP/Session1/dialog/EmoEvaluation/Ses01F_impro01.txt", (
        "IEMOCAP/Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav",
        "IEMOCAP/Session3/sentences/wav/Ses03F_impro01/Ses03F_impro01_M001.wav",
    )),
    "snips": (snips_folder, "SNIPS/all.iob.snips.txt", (
        "SNIPS/train/Ivy-snips-train-1.wav", "SNIPS/test/Emma-snips-test-0.wav",
    )),
    "librimix": (librimix, "data/dev/wav.scp", ("Libri2Mix/dev1.wav", "Libri2Mix/train0.wav")),
    "quesst14": (quesst, "quesst14Database/scoring/language_key_dev.lst", (
        "quesst14Database/Audio/utterances1.wav", "quesst14Database/dev_queries/dev0.wav",
    )),
}  # fmt: skip
AUDIO = (".wav", ".flac", ".mp3")


@pytest.fixture(params=WORLDS)
def reader(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def root(reader: str, tmp_path: Path) -> Path:
    return WORLDS[reader][0](tmp_path / "set")


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def test_marks_blank_lines_and_hidden_files_change_nothing(reader: str, root: Path, tmp_path: Path) -> None:
    plain = read_corpus(reader, root, tmp_path / "c.h5")
    for path in files(root):
        if path.suffix not in (*AUDIO, ".xml"):
            lines = path.read_bytes().replace(b"\n", b"\r\n \r\n\r\n")
            path.write_bytes(b"\xef\xbb\xbf\r\n" + lines)
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7 of another file system")
        (path.parent / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    shutil.copytree(root, tmp_path / "hidden")
    for folder_of_words in [path for path in root.rglob("*") if path.is_dir()]:
        shutil.copytree(tmp_path / "hidden", folder_of_words / ".Trash")
    odd = read_corpus(reader, root, tmp_path / "c.h5")
    assert odd == plain
    assert Corpus.open(tmp_path / "c.json").labels_digest == plain["labels_digest"]


def test_absent_files_are_all_named_and_can_be_dropped(reader: str, root: Path, tmp_path: Path) -> None:
    whole = read_corpus(reader, root, tmp_path / "c.h5")
    lost = {root / name for name in WORLDS[reader][2]}
    for path in lost:
        path.unlink()
    with pytest.raises(RetortError) as caught:
        read_corpus(reader, root, tmp_path / "d.h5")
    assert str(caught.value).startswith(f"{len(lost)} of ")
    assert all(f"{path} (does not exist)" in str(caught.value) for path in lost)
    assert not (tmp_path / "d.h5").exists()
    card = read_corpus(reader, root, tmp_path / "d.h5", skip_bad=True)
    assert sorted(card["record"]["dropped"]) == sorted(f"{path} (does not exist)" for path in lost)
    assert card["num_utterances"] == whole["num_utterances"] - len(lost)


def test_a_list_of_another_encoding_is_named_with_it(reader: str, root: Path, tmp_path: Path) -> None:
    path = root / WORLDS[reader][1]
    text = path.read_text()
    path.write_text(text, encoding="utf-16")
    with pytest.raises(RetortError, match=rf"{path.name}: not text in UTF-8: .*mark of UTF-16"):
        read_corpus(reader, root, tmp_path / "c.h5")
    path.write_text(text, encoding="utf-16-le")  # without a mark
    with pytest.raises(RetortError, match=rf"{path.name}: not text in UTF-8: .*UTF-16"):
        read_corpus(reader, root, tmp_path / "c.h5")
    path.write_bytes(text.encode() + b"caf\xe9\n")
    with pytest.raises(RetortError, match=rf"{path.name}: not text in UTF-8: byte 0xe9 at {len(text) + 3:,}"):
        read_corpus(reader, root, tmp_path / "c.h5")


def test_trials_of_dropped_utterances_are_left_out_and_counted(tmp_path: Path) -> None:
    root = voxceleb(tmp_path / "set")
    (root / "test/wav/id10270/y/00002.wav").write_bytes(b"no audio")
    out = tmp_path / "c.h5"
    done = CliRunner().invoke(main, ["corpus", "voxceleb1-trials", str(root), "--out", str(out), "--skip-bad"])
    assert done.exit_code == 0 and "1 files dropped, 2 trials left out" in done.output
    assert Corpus.open(out).metadata == {"trials": [[1, "id10270/y/00000", "id10270/y/00001"]], "trials_left_out": 2}
    assert json.loads(out.with_suffix(".json").read_text())["record"]["trials_left_out"] == 2
    (root / "test/wav/id10270/y/00001.wav").write_bytes(b"no audio")
    with pytest.raises(RetortError, match="every trial"):
        read_corpus("voxceleb1-trials", root, out, skip_bad=True)


def test_dropped_queries_and_documents_are_counted(tmp_path: Path) -> None:
    root = quesst(tmp_path / "set")
    for name in WORLDS["quesst14"][2]:
        (root / name).unlink()
    read_corpus("quesst14", root, tmp_path / "c.h5", skip_bad=True)
    assert Corpus.open(tmp_path / "c.h5").metadata["dropped"] == {"docs": 1, "dev": 1}


def test_librispeech_names_the_parts_that_are_there(tmp_path: Path) -> None:
    root = librispeech(tmp_path / "set")
    base = root / "LibriSpeech"
    shutil.rmtree(base / "train-clean-100")
    (base / "dev-clean").rename(base / "dev-other")
    with pytest.raises(RetortError, match=r"train-clean-100/ not found; .*--part dev-other"):
        read_corpus("librispeech", root, tmp_path / "c.h5")
    with pytest.raises(RetortError, match=r"test-clean/ not found; .*--part dev-other"):
        read_corpus("librispeech", root, tmp_path / "c.h5", options=ReaderOptions(parts=("test-clean",)))
    twice = ReaderOptions(parts=("dev-other/", "dev-other"))
    assert read_corpus("librispeech", root, tmp_path / "c.h5", options=twice)["splits"] == {"dev": 3}
    (base / "dev-other/84/198/84-198.trans.txt").rename(base / "dev-other/84/198/other.txt")
    with pytest.raises(RetortError, match=r"SPEAKER-CHAPTER\.trans\.txt not found"):
        read_corpus("librispeech", root, tmp_path / "c.h5", options=twice)
    write_audio(base / "dev-other/85/1/85-1-0000.flac", tone())
    (base / "dev-other/85/1/85-1.trans.txt").write_text("85-1-0000 A\n")
    with pytest.raises(RetortError, match=r"1 chapters.*transcript: 198"):
        read_corpus("librispeech", root, tmp_path / "c.h5", options=twice)


def test_librispeech_that_is_half_unpacked_is_named(tmp_path: Path) -> None:
    root = librispeech(tmp_path / "set")
    base = root / "LibriSpeech"
    (root / "dev-clean.tar.gz").write_bytes(b"\x1f\x8b")  # its folder is there
    (root / "test-other.tar.gz").write_bytes(b"\x1f\x8b")  # not one of the parts that are read by default
    (base / "SPEAKERS.TXT").write_text(
        ";ID |SEX| SUBSET |MINUTES| NAME\n19 | F | train-clean-100 | 1 | A |B\n84 | F | dev-clean | 1 | C\n"
        "99 | M | test-other | 1 | D\n"
    )
    read_corpus("librispeech", root, tmp_path / "c.h5")
    (root / "train-other-500.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(RetortError, match=r"train-other-500\.tar\.gz not unpacked"):
        read_corpus("librispeech", root, tmp_path / "d.h5")
    parts = ReaderOptions(parts=("dev-clean", "train-clean-100"))
    assert read_corpus("librispeech", root, tmp_path / "c.h5", options=parts)["splits"] == {"dev": 3, "train": 3}
    with (base / "SPEAKERS.TXT").open("a") as speakers:
        speakers.write("26 | M | train-clean-100 | 1 | E\n")
    with pytest.raises(RetortError, match=r"train-clean-100: speaker 26 of SPEAKERS\.TXT not found"):
        read_corpus("librispeech", root, tmp_path / "d.h5", options=parts)


@pytest.mark.parametrize(
    ("reader", "archive"),
    [
        ("voxceleb1", "vox1_dev_wav_partaa"),
        ("speech-commands", "speech_commands_v0.01.tar.gz"),
        ("iemocap", "IEMOCAP_full_release.tar.gz"),
        ("folder", "mine.zip"),
        ("kaldi", "data.tgz"),
        ("lhotse", "manifests.tar.xz"),
    ],
)
def test_an_archive_that_is_not_unpacked_is_named(reader: str, archive: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / archive).write_bytes(b"\0")
    with pytest.raises(RetortError, match=f"not found; .*found {archive}: unpack it"):
        read_corpus(reader, tmp_path / "set", tmp_path / "c.h5")


def test_absent_files_beside_an_archive_are_to_be_unpacked(tmp_path: Path) -> None:
    root = voxceleb(tmp_path / "set")
    (root / "dev/wav/id10000/x/00001.wav").unlink()
    (root / "vox1_dev_wav.zip").write_bytes(b"PK")
    with pytest.raises(RetortError, match=r"1 of 4 files can't be used: .*Unpack vox1_dev_wav\.zip, or drop"):
        read_corpus("voxceleb1", root, tmp_path / "c.h5")


def test_other_suffixes_are_read(tmp_path: Path) -> None:
    expected = {}
    for name in ("librispeech", "speech-commands", "voxceleb1", "voxceleb1-trials", "iemocap"):
        root = WORLDS[name][0](tmp_path / name)
        expected[name] = read_corpus(name, root, tmp_path / "c.h5")
        for path in files(root):
            if path.suffix == ".flac":
                audio, rate = soundfile.read(path, dtype="int16")
                soundfile.write(path.with_suffix(".wav"), audio, rate)
                path.unlink()
            elif path.suffix == ".wav":
                path.rename(path.with_suffix(".WAV"))
        assert read_corpus(name, root, tmp_path / "c.h5")["digest"] == expected[name]["digest"], name


def refused(tmp_path: Path, table: str, **options: dict[str, str]) -> str:
    root = tmp_path / "mine"
    for name in ("a.001", "a.002"):
        write_audio(root / name, tone(), format="WAV")
    (root / "metadata.csv").write_text(table)
    with pytest.raises(RetortError) as caught:
        read_corpus("folder", root, tmp_path / "c.h5", options=ReaderOptions(**options))
    assert "\n" not in str(caught.value) and not (tmp_path / "c.h5").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("file,split,speaker\n", "no rows"),
        ("file,split,speaker\n , \n,,\n", "no rows"),
        ("", "is empty"),
        ("\ufeff\n \n", "is empty"),
        ("file;split\na.001;train\n", "separated by ';', expected commas"),
        ("file\tsplit\na.001\ttrain\n", r"separated by '\t', expected commas"),
        ("file,split,split\na.001,a,b\n", "column 'split' occurs twice"),
        (",file\n0,a.001\n", "column 1 has no name"),
        ("file\na.001\na.002\n", "a.001 and "),
        ("file\na.001\na.002\n", "a column `id`"),
        ("file\na.001\na.001\n", "a.001 is listed twice"),
    ],
)
def test_an_odd_table_is_one_line(table: str, expected: str, tmp_path: Path) -> None:
    assert expected in refused(tmp_path, table)


def test_columns_are_renamed_to_free_names_alone(tmp_path: Path) -> None:
    assert "'split' exists already" in refused(tmp_path, "file,split,x\na.001,a,b\n", rename={"x": "split"})
    done = CliRunner().invoke(
        main, ["corpus", "folder", str(tmp_path), "--out", "c.h5", "--rename", "a=b", "--rename", "a=c"]
    )
    assert done.exit_code == 1 and "--rename 'a' is given twice" in done.stderr


def test_a_table_with_spaces_backslashes_and_lines_in_quotes_is_read(tmp_path: Path) -> None:
    root = folder(tmp_path)
    (root / "metadata.csv").write_text(' file , split,text\n a\\one.wav , train ,"A\nB"\n\n,,\nthree.wav,dev,C\n')
    read_corpus("folder", root, tmp_path / "c.h5")
    corpus = Corpus.open(tmp_path / "c.h5")
    assert (corpus.ids, corpus.splits, corpus.label("text")) == (["a/one", "three"], ["train", "dev"], ["A\nB", "C"])


def test_unreadable_noise_is_a_bad_file(tmp_path: Path) -> None:
    root = speech_commands(tmp_path / "set")
    noise = root / "speech_commands_v0.01" / "_background_noise_"
    (noise / "bad.wav").write_text("no audio")
    write_audio(noise / "cut.wav", tone(3.0))
    (noise / "cut.wav").write_bytes((noise / "cut.wav").read_bytes()[:80_000])
    with pytest.raises(RetortError) as caught:
        read_corpus("speech-commands", root, tmp_path / "c.h5")
    message = str(caught.value)
    assert message.startswith("2 of ") and f"{noise / 'bad.wav'} (unreadable" in message
    assert message.count("cut.wav") == 1  # once for all its seconds
    card = read_corpus("speech-commands", root, tmp_path / "c.h5", skip_bad=True)
    assert len(card["record"]["dropped"]) == 2


def test_odd_audio_is_in_the_record_and_the_closing_line(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    write_audio(root / "three.wav", np.zeros((8_000, 1)))
    done = CliRunner().invoke(main, ["corpus", "folder", str(root), "--out", str(tmp_path / "c.h5")])
    assert done.exit_code == 0 and "1 files noted: digital silence" in done.output
    record = json.loads((tmp_path / "c.json").read_text())["record"]
    assert record["noted"] == {"digital silence": {"files": 1, "first": [str(root / "three.wav")]}}


def test_a_long_file_is_decoded_in_its_place(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    long = np.random.default_rng(0).integers(-9, 9, 130 * 16_000).astype(np.int16)
    soundfile.write(root / "a" / "two.wav", long, 16_000)
    read_corpus("folder", root, tmp_path / "c.h5")
    corpus = Corpus.open(tmp_path / "c.h5")
    assert corpus.ids == ["a/one", "a/two", "three", "four"]
    np.testing.assert_array_equal(corpus.samples(1), long)


def test_a_file_name_that_is_not_utf_8_is_recorded(tmp_path: Path) -> None:
    root = speech_commands(tmp_path / "set")
    odd = os.fsdecode(b"caf\xe9_nohash_0.wav")
    (root / "speech_commands_v0.01" / "yes" / odd).write_text("no audio")
    card = read_corpus("speech-commands", root, tmp_path / "c.h5", skip_bad=True)
    assert "caf\\udce9_nohash_0.wav (unreadable" in card["record"]["dropped"][0]
    assert json.loads((tmp_path / "c.json").read_text()) == card
