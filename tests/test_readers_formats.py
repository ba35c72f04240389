"""Readers of Kaldi folders, of manifests of lhotse and of data sets of Hugging Face."""

import io
import sys
from pathlib import Path
from typing import Any

import datasets
import lhotse
import numpy as np
import pytest
import soundfile

from pipelines.readers import READERS
from tests.own_data import NOISE, RATE, WHOLE, read, refused, rows_of, write_audio

# ---------------------------------------------------------------------------------------------------------------- Kaldi


def kaldi_folder(folder: Path, audio: Path, **files: str) -> Path:
    """Write a data folder of two recordings, the first with two segments; `files` replace or ("") remove some."""
    write_audio(audio / "rec1.wav", audio / "rec2.flac")
    names = {
        "wav.scp": f"rec1 {audio}/rec1.wav\nrec2 {audio}/rec2.flac\n",
        "segments": "u1 rec1 0.5 1.5\nu2 rec1 2.25 4.0\nu3 rec2 0 4\n",
        "utt2spk": "u1 s1\nu2 s2\nu3 s1\n",
        "text": "u1 HELLO THERE\nu2 HI\nu3 WHOLE\n",
        "utt2dur": "u1 9\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (names | {name.replace("_", "."): text for name, text in files.items()}).items():
        if text:
            (folder / name).write_text(text)
    return folder


def test_a_kaldi_data_folder_is_read(tmp_path: Path) -> None:
    folder = kaldi_folder(tmp_path / "data/all", tmp_path / "audio")
    corpus = read("kaldi", folder, tmp_path / "c.h5")
    assert rows_of(corpus, "text") == [
        ("u1", "train", "s1", "HELLO THERE"), ("u2", "train", "s2", "HI"), ("u3", "train", "s1", "WHOLE"),
    ]  # fmt: skip
    for name, first, last in (("u1", 8_000, 24_000), ("u2", 36_000, 64_000), ("u3", 0, 64_000)):
        np.testing.assert_array_equal(corpus.samples(list(corpus.ids).index(name)), NOISE[first:last])
    (folder / "utt2spk").rename(folder / "utt2spk.old")
    (folder / "spk2utt").write_text("s1 u1 u3\ns2 u2\n")
    assert rows_of(read("kaldi", folder, tmp_path / "d.h5"), "text") == rows_of(corpus, "text")


def test_a_kaldi_folder_without_text_among_others_has_empty_texts(tmp_path: Path) -> None:
    kaldi_folder(tmp_path / "data/train", tmp_path / "audio")
    kaldi_folder(
        tmp_path / "data/test", tmp_path / "more", text="", segments="", utt2spk="v1 s3\n", wav_scp="v1 more/rec1.wav\n"
    )
    corpus = read("kaldi", tmp_path / "data", tmp_path / "c.h5")
    assert ("v1", "test", "s3", "") in rows_of(corpus, "text") and len(corpus) == 4


def test_kaldi_folders_are_splits_and_paths_may_be_those_of_the_recipe(tmp_path: Path) -> None:
    for split in ("train_clean_5", "dev_clean_2", "test"):
        write_audio(tmp_path / f"corpus/{split}.wav")
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "wav.scp").write_text(f"{split} corpus/{split}.wav\n")
        (tmp_path / "data" / split / "utt2spk").write_text(f"{split} {split}\n")
    assert rows_of(read("kaldi", tmp_path / "data", tmp_path / "c.h5")) == [
        ("dev_clean_2", "dev", "dev_clean_2"), ("test", "test", "test"), ("train_clean_5", "train", "train_clean_5"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"wav_scp": "rec1 sph2pipe -f wav a.sph |\nrec2 b.wav\n"}, "entry 'rec1' is a command, which is not run"),
        ({"wav_scp": "rec1 a.wav\nrec2 raw.ark:17\n"}, "entry 'rec2' is a place in an archive"),
        ({"wav_scp": "rec1\nrec2 a.wav\n"}, "entry 'rec1' is empty"),
        ({"wav_scp": "rec1 a.wav\nrec1 b.wav\n"}, "'rec1' occurs twice, as 'a.wav' and 'b.wav'"),
        ({"wav_scp": "rec2 a.wav\n"}, "1 recordings of segments that wav.scp lacks (rec1)"),
        ({"wav_scp": "rec1 none.wav\nrec2 gone.flac\n"}, "2 of 3 files can't be used: "),
        ({"wav_scp": "", "utt2spk": ""}, "wav.scp and utt2spk or spk2utt not found"),
        ({"utt2spk": "u1 s1\n", "text": "u1 A\nu2 B\n"}, "utt2spk lacks (u2, u3); 1 utterances that text lacks (u3)"),
        ({"segments": "u1 rec1 2 1\n"}, "utterance 'u1': starts at 2 s and ends at 1 s"),
        ({"segments": "u1 rec1 -1 1\n"}, "utterance 'u1': got time '-1'"),
        ({"segments": "u1 rec1 0 1\nu1 rec2 0 1\n"}, "utterance 'u1' occurs twice, in rec1 and rec2"),
        ({"segments": "u1 rec1 3 9\n"}, "ends before 9 s, the end of utterance 'u1': it has 4 s"),
        ({"segments": "u1 rec1 3\n"}, "got line 'u1 rec1 3', expected `UTTERANCE RECORDING START END`"),
    ],
)
def test_a_bad_kaldi_folder_is_one_line(files: dict[str, str], expected: str, tmp_path: Path) -> None:
    root = kaldi_folder(tmp_path / "data/train", tmp_path / "audio", **files)
    assert expected in refused("kaldi", root, tmp_path / "c.h5")


# ---------------------------------------------------------------------------------------------------- lhotse, datasets


def lhotse_manifests(folder: Path) -> Path:
    """Write a stereo recording with two supervised parts, and a mono one, in two splits."""
    write_audio(folder / "audio/a.wav", audio=np.stack([NOISE, NOISE[::-1]], 1))
    write_audio(folder / "audio/b.flac")
    (folder / "manifests").mkdir()
    (folder / "cuts").mkdir()
    for split, name in (("train-clean-5", "a.wav"), ("dev-clean-2", "b.flac")):
        recordings = lhotse.RecordingSet.from_recordings([lhotse.Recording.from_file(folder / "audio" / name)])
        segments = [
            lhotse.SupervisionSegment("u1", "a", 0.25, 1.5, channel=1, text="HI", speaker="s", custom={"mood": "sad"}),
            lhotse.SupervisionSegment("u2", "a", 2.0, 1.0, channel=0, text="HO", speaker="s", language="en"),
            lhotse.SupervisionSegment("u3", "b", 0.0, 4.0, text="ALL", speaker="t"),
        ]
        supervisions = lhotse.SupervisionSet.from_segments(one for one in segments if one.recording_id == name[0])
        recordings.to_file(folder / f"manifests/mini_recordings_{split}.jsonl.gz")
        supervisions.to_file(folder / f"manifests/mini_supervisions_{split}.jsonl.gz")
        cuts = lhotse.CutSet.from_manifests(recordings, supervisions)
        cuts.trim_to_supervisions(keep_overlapping=False).to_file(folder / f"cuts/mini_cuts_{split}.jsonl.gz")
    return folder


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lhotse_manifests(tmp_path_factory.mktemp("lhotse"))


@pytest.mark.parametrize("kind", ["manifests", "cuts"])
def test_manifests_of_lhotse_are_read_as_lhotse_reads_them(kind: str, manifests: Path, tmp_path: Path) -> None:
    corpus = read("lhotse", manifests / kind, tmp_path / "c.h5")
    assert rows_of(corpus, "text", "language", "mood") == [
        ("u1", "train", "s", "HI", "", "sad"), ("u2", "train", "s", "HO", "en", ""), ("u3", "dev", "t", "ALL", "", ""),
    ]  # fmt: skip
    cuts = {cut.id: cut for path in sorted((manifests / "cuts").iterdir()) for cut in lhotse.CutSet.from_file(path)}
    for index, name in enumerate(corpus.ids):
        np.testing.assert_array_equal(corpus.samples(index), np.rint(cuts[name].load_audio()[0] * 32_768))


def test_one_manifest_of_cuts_is_read(manifests: Path, tmp_path: Path) -> None:
    corpus = read("lhotse", manifests / "cuts/mini_cuts_dev-clean-2.jsonl.gz", tmp_path / "c.h5")
    assert rows_of(corpus) == [("u3", "dev", "t")]


def test_bad_manifests_of_lhotse_are_one_line(manifests: Path, tmp_path: Path) -> None:
    out, bad = tmp_path / "c.h5", tmp_path / "cuts.jsonl"
    for text, expected in (
        ("{\n", "lhotse can't load it (JSONDecodeError"),
        ('{"a": 1}\n', "lhotse can't load it (TypeError"),
        ("", "the corpus would be empty"),
    ):
        bad.write_text(text)
        assert expected in refused("lhotse", bad, out)
    cuts = lhotse.CutSet.from_file(manifests / "cuts/mini_cuts_dev-clean-2.jsonl.gz")
    for odd, expected in (
        (cuts[0].pad(5.0), "is a MixedCut"),
        (cuts[0].perturb_speed(0.9), "is changed by lhotse when it is loaded"),
    ):
        lhotse.CutSet.from_cuts([odd]).to_file(bad)
        assert expected in refused("lhotse", bad, out)
    cuts.to_file(bad)
    bad.write_text(bad.read_text().replace('"type": "file"', '"type": "command"'))
    assert "of sources of type command" in refused("lhotse", bad, out)
    recordings = manifests / "manifests/mini_recordings_dev-clean-2.jsonl.gz"
    assert "holds a Recording, expected a Cut" in refused("lhotse", recordings, out)
    folder = tmp_path / "lost"
    folder.mkdir()
    (folder / "supervisions_train.jsonl.gz").write_bytes(
        (manifests / "manifests/mini_supervisions_train-clean-5.jsonl.gz").read_bytes()
    )
    assert "recordings_train.jsonl.gz, the recordings of" in refused("lhotse", folder, out)
    (folder / "recordings_train.jsonl.gz").write_bytes(recordings.read_bytes())
    assert "1 recordings (a) not found in" in refused("lhotse", folder, out)
    assert "none not found" in refused("lhotse", tmp_path / "none", out)


@pytest.mark.parametrize("library", ["lhotse", "datasets"])
def test_a_library_that_is_not_installed_is_named(
    library: str, manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # `import` then raises ImportError
    reader, root = {"lhotse": ("lhotse", manifests / "cuts"), "datasets": ("hf", Path("nobody/nothing"))}[library]
    assert f"pip install '{library}>=" in refused(reader, root, tmp_path / "c.h5")


def data_set(num_rows: int = 3) -> Any:
    """Return rows with the bytes of a FLAC file each, a class label and a column that can't be a label."""
    audio = []
    for number in range(num_rows):
        buffer = io.BytesIO()
        soundfile.write(buffer, NOISE[number * RATE :], RATE, format="FLAC")
        audio.append({"bytes": buffer.getvalue(), "path": f"{number}.flac"})
    features = datasets.Features(
        id=datasets.Value("string"),
        audio={"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        sentence=datasets.Value("string"),
        digit=datasets.ClassLabel(names=["one", "two"]),
        vector=datasets.List(datasets.Value("float32")),
    )
    rows = {
        "id": [f"u{number}" for number in range(num_rows)],
        "audio": audio,
        "sentence": ["HI", None, "HO"],
        "digit": [0, 1, -1],
        "vector": [[1.0]] * num_rows,
    }
    return datasets.Dataset.from_dict(rows, features=features).cast_column("audio", datasets.Audio(RATE))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a data set with two splits as Arrow files and as Parquet; the cache of `datasets` lies beside."""
    folder = tmp_path_factory.mktemp("datasets")
    rows = data_set()
    test = rows.remove_columns(["digit"]).map(lambda row: {"id": f"t{row['id']}"}, remove_columns=["vector"])
    datasets.DatasetDict({"train": rows, "validation": test}).save_to_disk(folder / "saved")
    (folder / "parquet").mkdir()
    rows.to_parquet(folder / "parquet/train-00000-of-00001.parquet")
    return folder


def test_a_saved_data_set_is_read_with_its_splits_and_labels(saved: Path, tmp_path: Path) -> None:
    corpus = read("hf", saved / "saved", tmp_path / "c.h5", rename={})
    assert rows_of(corpus, "text", "digit") == [
        ("tu0", "dev", "unknown", "HI", ""), ("tu1", "dev", "unknown", "", ""), ("tu2", "dev", "unknown", "HO", ""),
        ("u0", "train", "unknown", "HI", "one"), ("u1", "train", "unknown", "", "two"),
        ("u2", "train", "unknown", "HO", ""),
    ]  # fmt: skip
    for index, name in enumerate(corpus.ids):
        np.testing.assert_array_equal(corpus.samples(index), NOISE[int(name[-1]) * RATE :])


def test_parquet_files_and_a_folder_of_audio_are_read(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    corpus = read("hf", saved / "parquet", tmp_path / "c.h5", rename={"digit": "keyword"})
    assert corpus.ids == ["u0", "u1", "u2"] and corpus.label("keyword") == ["one", "two", ""]
    np.testing.assert_array_equal(corpus.samples(1), NOISE[RATE:])
    write_audio(tmp_path / "audiofolder/train/a.wav")
    (tmp_path / "audiofolder/train/metadata.csv").write_text("file_name,transcription\na.wav,HI\n")
    assert rows_of(read("hf", tmp_path / "audiofolder", tmp_path / "d.h5"), "text")[0][3] == "HI"


def test_bad_data_sets_of_hugging_face_are_one_line(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    out = tmp_path / "c.h5"
    data_set().remove_columns(["audio"]).save_to_disk(tmp_path / "silent")
    assert "expected one column of type Audio, got none; it has id (Value)" in refused("hf", tmp_path / "silent", out)
    rows = data_set()
    rows.add_column("more", rows.with_format("arrow")["audio"].to_pylist()).cast_column(
        "more", datasets.Audio()
    ).save_to_disk(tmp_path / "two")
    assert "got audio and more" in refused("hf", tmp_path / "two", out)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/train.parquet").write_bytes(b"PAR1 and no more")
    assert "datasets can't load it" in refused("hf", tmp_path / "broken", out)
    assert "it is not a folder here, so the hub was asked" in refused("hf", Path("nobody/nothing"), out)


def test_audio_of_a_table_is_read_one_row_at_a_time(saved: Path) -> None:
    listed = READERS["hf"].list_data_set(saved / "saved", WHOLE).utterances
    assert all(utterance.data is not None for utterance in listed)
    assert (
        listed[1].data is not None and soundfile.read(io.BytesIO(listed[1].data()), dtype="int16")[0][0] == NOISE[RATE]
    )
