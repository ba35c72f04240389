"""VoxCeleb1's trials, LibriMix and QUESST 2014: compared with torchaudio's readers; one-line errors."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torchaudio
from test_readers import tone, write_audio

from extract.base.errors import RetortError
from extract.corpus import Corpus
from pipelines.readers import read_corpus
from pipelines.readers.silence import without_silence


def read(reader: str, root: Path, out: Path) -> Corpus:
    read_corpus(reader, root, out / "c.h5")
    return Corpus.open(out / "c.json")


@pytest.fixture
def voxceleb(tmp_path: Path) -> Path:
    root = tmp_path / "vox"
    for speaker in range(5):
        for name in ("a/00001", "b/00001"):
            write_audio(root / "dev" / "wav" / f"id1000{speaker}" / f"{name}.wav", tone(2.5))
    write_audio(root / "dev" / "wav" / "id10000" / "a" / "00002.wav", tone(1.5))
    for name in ("id10270/x/00001", "id10270/y/00001", "id10271/z/00001", "id10271/z/00002"):
        write_audio(root / "test" / "wav" / f"{name}.wav", tone(0.5))
    (root / "veri_test2.txt").write_text(
        "1 id10270/x/00001.wav id10270/y/00001.wav\n0 id10270/x/00001.wav id10271/z/00001.wav\n"
    )
    return root


def test_trials_hold_out_whole_speakers_and_take_what_the_list_names(voxceleb: Path, tmp_path: Path) -> None:
    corpus = read("voxceleb1-trials", voxceleb, tmp_path)
    by_split: dict[str, set[str]] = {}
    for split, speaker in zip(corpus.splits, corpus.speakers, strict=True):
        by_split.setdefault(split, set()).add(speaker)
    assert {split: len(speakers) for split, speakers in by_split.items()} == {"train": 4, "dev": 1, "test": 2}
    assert not by_split["train"] & by_split["dev"]
    assert "id10271/z/00002" not in corpus.ids  # in test/, and in no trial
    assert "id10000/a/00002" not in corpus.ids  # shorter than 2 s; trials may be
    assert corpus.metadata["trials"] == [
        [1, "id10270/x/00001", "id10270/y/00001"],
        [0, "id10270/x/00001", "id10271/z/00001"],
    ]
    original = tone(2.5)[:, 0]
    waveform = corpus.waveform(corpus.ids.index("id10001/a/00001"))
    assert np.abs(waveform).max() == pytest.approx(np.abs(original).max() * 10 ** (-3 / 20), rel=1e-3)


def test_trials_agree_with_torchaudio(voxceleb: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"  # torchaudio requires both parts in one folder
    for part in ("dev", "test"):
        shutil.copytree(voxceleb / part / "wav", merged / "wav", dirs_exist_ok=True)
    shutil.copy(voxceleb / "veri_test2.txt", merged)
    theirs = torchaudio.datasets.VoxCeleb1Verification(merged, meta_url="veri_test2.txt")
    ours = read("voxceleb1-trials", voxceleb, tmp_path).metadata["trials"]
    assert len(theirs) == len(ours)
    for index, trial in enumerate(ours):
        left, right, _, label, *_ = theirs.get_metadata(index)
        assert trial == [label, left.removesuffix(".wav"), right.removesuffix(".wav")]


def test_the_other_name_of_the_trial_list_counts_and_a_wrong_line_is_named(voxceleb: Path, tmp_path: Path) -> None:
    (voxceleb / "veri_test2.txt").rename(voxceleb / "voxceleb1_test_v2.txt")
    assert len(read("voxceleb1-trials", voxceleb, tmp_path).metadata["trials"]) == 2
    (voxceleb / "voxceleb1_test_v2.txt").write_text("2 a b\n")
    with pytest.raises(RetortError, match=r"voxceleb1_test_v2\.txt: got line '2 a b', expected"):
        read("voxceleb1-trials", voxceleb, tmp_path)


def test_silence_is_cut_where_it_lasts() -> None:
    rate = 16_000
    generator = np.random.default_rng(0)

    def sound(seconds: float) -> np.ndarray:
        return (0.1 * generator.normal(size=int(seconds * rate))).astype(np.float32)

    def quiet(seconds: float) -> np.ndarray:
        return np.zeros(int(seconds * rate), dtype=np.float32)

    audio = np.concatenate([quiet(0.5), sound(1.0), quiet(0.05), sound(0.5), quiet(0.4), sound(0.03), quiet(0.3)])
    # The pause of 50 ms is kept, the click of 30 ms is removed, and the window adds 20 ms at the end.
    assert len(without_silence(audio, rate)) == pytest.approx(1.55 * rate, abs=0.025 * rate)
    assert len(without_silence(quiet(1.0), rate)) == 0
    assert len(without_silence(quiet(0.0), rate)) == 0
    loud = sound(1.0)
    np.testing.assert_array_equal(without_silence(loud, rate), loud)


@pytest.fixture
def librimix(tmp_path: Path) -> Path:
    root = tmp_path / "mix"
    for split, subset in (("train", "train-100"), ("dev", "dev"), ("test", "test")):
        name = f"1-{split}_2-{split}"
        for kind in ("mix_both", "s1", "s2"):
            write_audio(root / "Libri2Mix" / "wav16k" / "max" / subset / kind / f"{name}.wav", tone(2.0))
        folder = root / "data" / split
        folder.mkdir(parents=True)
        (folder / "wav.scp").write_text(f"{name} /elsewhere/Libri2Mix/wav16k/max/{subset}/mix_both/{name}.wav\n")
        (folder / "segments").write_text(f"1_x {name} 0.1 1.5\n2_x {name} 0.5 1.9\n")
        (folder / "utt2spk").write_text("1_x 1\n2_x 2\n")
        (folder / "reco2dur").write_text(f"{name} 2.0\n")
        (folder / "rttm").write_text(
            f"SPEAKER {name} 1 0.100 1.400 <NA> <NA> 1 <NA> <NA>\nSPEAKER {name} 1 0.5 1.4 <NA> <NA> 2 <NA> <NA>\n"
        )
    return root


def test_mixtures_and_their_turns_from_kaldi_folders(librimix: Path, tmp_path: Path) -> None:
    corpus = read("librimix", librimix, tmp_path)
    assert corpus.ids == [f"{split}/1-{split}_2-{split}" for split in ("train", "dev", "test")]
    assert corpus.splits == ["train", "dev", "test"]
    assert set(corpus.label("segments")) == set(corpus.label("rttm")) == {"1 0.1 1.5; 2 0.5 1.9"}
    for split, subset in (("train", "train-100"), ("dev", "dev"), ("test", "test")):
        theirs = torchaudio.datasets.LibriMix(librimix, subset=subset, sample_rate=16_000, task="sep_noisy", mode="max")
        files = [Path(theirs.get_metadata(index)[1]).stem for index in range(len(theirs))]
        assert [f"{split}/{file}" for file in files] == [name for name in corpus.ids if name.startswith(split)]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("data/dev/rttm", "", "rttm: recording '1-dev_2-dev'"),
        ("data/dev/wav.scp", "1-dev_2-dev Libri2Mix/no.wav\n", "all files of data/dev/wav.scp, such as Libri2Mix/no"),
        ("data/dev/wav.scp", "1-dev_2-dev sph2pipe x.sph |\n", "wav.scp: got line '1-dev_2-dev sph2pipe x.sph |'"),
    ],
)
def test_a_wrong_kaldi_folder_is_one_line(librimix: Path, tmp_path: Path, file: str, text: str, message: str) -> None:
    (librimix / file).write_text(text)
    with pytest.raises(RetortError) as caught:
        read("librimix", librimix, tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def quesst(tmp_path: Path) -> Path:
    base = tmp_path / "quesst" / "quesst14Database"
    for name in ("Audio/d1", "Audio/d2", "dev_queries/q1", "dev_queries/q2", "eval_queries/e1"):
        write_audio(base / f"{name}.wav", tone(0.5, 8_000), 8_000)
    scoring = base / "scoring"
    for key, lines in {
        "utterances": ["Audio/d1.wav nnenglish", "Audio/d2.wav nnenglish", "Audio/d3.wav czech"],
        "dev": ["dev_queries/q1.wav nnenglish", "dev_queries/q2.wav nnenglish", "dev_queries/q3.wav czech"],
        "eval": ["eval_queries/e1.wav nnenglish"],
    }.items():
        scoring.mkdir(exist_ok=True)
        text = "".join(f"quesst14Database/{line}\n" for line in lines)
        (scoring / f"language_key_{key}.lst").write_text(text)
    for split, rows in (("dev", [("d2", "text1"), ("d1", "text1"), ("d3", "q3")]), ("eval", [("d1", "e1")])):
        folder = scoring / f"groundtruth_quesst14_{split}"
        folder.mkdir()
        (folder / "x.rttm").write_text("".join(f"LEXEME {d} 1 0.0 0.5 {q} lex unknown <NA>\n" for d, q in rows))
        terms = '<term termid="q1"><termtext>text1</termtext></term>'
        (folder / "x.tlist.xml").write_text(f"<termlist>{terms}</termlist>")
    return base.parent


def test_english_queries_and_the_documents_that_match_them(quesst: Path, tmp_path: Path) -> None:
    corpus = read("quesst14", quesst, tmp_path)
    rows = zip(corpus.ids, corpus.splits, corpus.label("documents"), strict=True)
    assert list(rows) == [
        ("d1", "docs", ""),
        ("d2", "docs", ""),
        ("q1", "dev", "d1 d2"),
        ("q2", "dev", ""),
        ("e1", "test", "d1"),
    ]
    assert corpus.metadata == {"documents": 3, "queries": {"dev": 2, "test": 1}}  # of all languages
    assert corpus.num_samples.tolist() == [8_000] * 5
    for subset, split in (("docs", "docs"), ("dev", "dev"), ("eval", "test")):
        theirs = torchaudio.datasets.QUESST14(quesst, subset)
        names = [theirs.get_metadata(index)[2] for index in range(len(theirs))]
        assert names == [corpus.ids[index] for index in corpus.select(split)]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "language_key_dev.lst",
            "x/dev_queries/no.wav nnenglish\n",
            "all files of scoring/language_key_dev.lst, such as quesst14Database/dev_queries/no.wav",
        ),
        ("groundtruth_quesst14_dev/x.tlist.xml", "<a><term/></a>", "x.tlist.xml: not a list of terms"),
    ],
)
def test_wrong_scoring_files_are_one_line(quesst: Path, tmp_path: Path, file: str, text: str, message: str) -> None:
    (quesst / "quesst14Database" / "scoring" / file).write_text(text)
    with pytest.raises(RetortError) as caught:
        read("quesst14", quesst, tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("reader", "fixture", "lost"),
    [
        ("voxceleb1-trials", "voxceleb", "veri_test2.txt"),
        ("voxceleb1-trials", "voxceleb", "dev"),
        ("voxceleb1-trials", "voxceleb", "test"),
        ("librimix", "librimix", "data/test/rttm"),
        ("librimix", "librimix", "Libri2Mix"),
        ("quesst14", "quesst", "quesst14Database/scoring/language_key_eval.lst"),
        ("quesst14", "quesst", "quesst14Database/scoring/groundtruth_quesst14_eval/x.tlist.xml"),
        ("quesst14", "quesst", "quesst14Database/Audio"),
    ],
)
def test_the_error_for_an_incomplete_folder_has_the_expected_tree(
    reader: str, fixture: str, lost: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    root: Path = request.getfixturevalue(fixture)
    path = root / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(RetortError, match=r" not found; expected the layout of .+: "):
        read(reader, root, tmp_path)
