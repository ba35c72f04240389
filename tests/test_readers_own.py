"""Readers of own data: tables, parts of long files and trees as they lie on disk, Kaldi, lhotse, Hugging Face."""

import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import lhotse
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from extract.base.errors import RetortError
from extract.corpus import Corpus
from pipelines.__main__ import main
from pipelines.readers import READERS, ReaderOptions, read_corpus
from pipelines.readers import audio_file as audio_file_module
from pipelines.readers.decode import Bad, decode
from pipelines.readers.listing import ListedUtterance, Listing
from pipelines.readers.splits import draw_dev, name_splits

RATE = 16_000
NOISE = np.random.default_rng(0).integers(-3_000, 3_000, 4 * RATE).astype(np.int16)
WHOLE = ReaderOptions(dev_share=0.0)


def write_audio(*paths: Path, audio: np.ndarray = NOISE, rate: int = RATE, **options: Any) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, audio, rate, **options)


def read(reader: str, root: Path, out: Path, **options: Any) -> Corpus:
    read_corpus(reader, root, out, options=ReaderOptions(**{"dev_share": 0.0} | options))
    return Corpus.open(out.with_suffix(".json"))


def refused(reader: str, root: Path, out: Path, **options: Any) -> str:
    with pytest.raises(RetortError) as caught:
        read(reader, root, out, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists() and not out.with_suffix(".json").exists()
    return str(caught.value)


def rows_of(corpus: Corpus, *labels: str) -> list[tuple[str, ...]]:
    columns = [corpus.ids, corpus.splits, corpus.speakers, *(corpus.label(name) for name in labels)]
    return sorted(zip(*columns, strict=True))


# ------------------------------------------------------------------------------------------------------------- folder


@pytest.mark.parametrize("column", ["file", "file_name", "path", "audio_filepath", "audio"])
def test_any_usual_name_of_the_audio_column_is_read(column: str, tmp_path: Path) -> None:
    write_audio(tmp_path / "set/a.wav")
    (tmp_path / "set/metadata.csv").write_text(f"{column},client_id,sentence,lang\na.wav,s1,HI,en\n")
    corpus = read("folder", tmp_path / "set", tmp_path / "c.h5")
    assert rows_of(corpus, "text", "lang", "speaker") == [("a", "train", "s1", "HI", "en", "s1")]


def test_common_voice_is_read_as_it_lies_on_disk(tmp_path: Path) -> None:
    root = tmp_path / "cv/en"
    header = "client_id\tpath\tsentence_id\tsentence\tup_votes\tage\n"
    for number, split in enumerate(("train", "dev", "test")):
        write_audio(root / f"clips/common_voice_en_{number}.mp3", audio=NOISE / 32_768)
        (root / f"{split}.tsv").write_text(f'{header}c{number}\tcommon_voice_en_{number}.mp3\tx\t"Quoted" once\t2\t\n')
    for name in ("validated", "other", "invalidated"):
        (root / f"{name}.tsv").write_text(header + "c9\tnone.mp3\tx\tNo\t0\t\n")
    corpus = read("folder", root, tmp_path / "c.h5")
    assert rows_of(corpus, "text", "age") == [
        (f"clips/common_voice_en_{number}", split, f"c{number}", '"Quoted" once', "")
        for number, split in enumerate(("train", "dev", "test"))
    ]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_audiofolder_has_a_table_in_the_folder_of_each_split(suffix: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_audio(tmp_path / "set" / split / "x/a.wav")
        row = json.dumps({"file_name": "x/a.wav", "transcription": "HI", "n": 3})
        text = row + "\n" if suffix == ".jsonl" else "file_name,transcription,n\nx/a.wav,HI,3\n"
        (tmp_path / "set" / split / f"metadata{suffix}").write_text(text)
    corpus = read("folder", tmp_path / "set", tmp_path / "c.h5")
    assert rows_of(corpus, "text", "n") == [
        ("test/x/a", "test", "unknown", "HI", "3"),
        ("train/x/a", "train", "unknown", "HI", "3"),
    ]


def test_manifests_of_nemo_lie_outside_the_audio(tmp_path: Path) -> None:
    root = tmp_path / "audio"
    write_audio(root / "a.wav", root / "b.wav", root / "c.wav")
    tables = tmp_path / "git/train_manifest.json", tmp_path / "git/dev_clean.jsonl"
    tables[0].parent.mkdir()
    rows: list[dict[str, Any]] = [
        {"audio_filepath": str(root / "a.wav"), "duration": 4.0, "text": "WHOLE"},
        {"audio_filepath": "b.wav", "offset": 1.5, "duration": 2.0, "text": "PART", "lang": "en"},
        {"audio_filepath": "b.wav", "offset": 0, "duration": 1.25, "text": "FIRST"},
    ]
    tables[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    # The offset and the duration of all of a file, but for rounding
    tables[1].write_text(json.dumps({"audio_filepath": "c.wav", "offset": 0.0, "duration": 3.99, "text": "ALL"}) + "\n")
    corpus = read("folder", root, tmp_path / "c.h5", tables=tables)
    found = {name: (split, text, lang) for name, split, _, text, lang in rows_of(corpus, "text", "lang")}
    assert found == {
        "a": ("train", "WHOLE", ""),
        "b-0001500-0003500": ("train", "PART", "en"),
        "b-0000000-0001250": ("train", "FIRST", ""),
        "c-0000000-0003990": ("dev", "ALL", ""),
    }
    spans = {"a": (0, 64_000), "b-0001500-0003500": (24_000, 56_000), "b-0000000-0001250": (0, 20_000)}
    for name, (first, last) in (spans | {"c-0000000-0003990": (0, 64_000)}).items():
        np.testing.assert_array_equal(corpus.samples(list(corpus.ids).index(name)), NOISE[first:last])


def test_a_tree_without_a_table_is_read_by_its_folders(tmp_path: Path) -> None:
    write_audio(tmp_path / "set/train/s1/a.WAV", tmp_path / "set/valid/b.flac", tmp_path / "set/test/c.wav")
    assert rows_of(read("folder", tmp_path / "set", tmp_path / "c.h5")) == [
        ("test/c", "test", "unknown"),
        ("train/s1/a", "train", "unknown"),
        ("valid/b", "dev", "unknown"),
    ]
    write_audio(tmp_path / "set/d.wav")  # beside the folders: they are not splits
    assert set(read("folder", tmp_path / "set", tmp_path / "c.h5").splits) == {"train"}
    (tmp_path / "set/e.m4a").write_bytes(b"\0\0\0\x18ftypM4A ")
    assert "e.m4a (unreadable" in refused("folder", tmp_path / "set", tmp_path / "d.h5")


def test_the_command_says_and_records_how_a_folder_was_understood(tmp_path: Path) -> None:
    write_audio(*(tmp_path / f"set/{number}.wav" for number in range(20)))
    lines = "".join(f"{number}.wav,0.5,1.5,{'valid' if number > 17 else 'train'}\n" for number in range(20))
    (tmp_path / "set/metadata.csv").write_text("file_name,start,end,split\n" + lines)
    arguments = ["corpus", "folder", str(tmp_path / "set"), "--out", str(tmp_path / "c.h5")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0 and "20 parts of longer files; splits dev (named valid) 2, train 18" in done.stderr
    record = json.loads((tmp_path / "c.json").read_text())["record"]["listing"]
    assert record["columns"] == {"file_name": "file"} and record["splits"] == {"valid": "dev"}
    (tmp_path / "set/metadata.csv").write_text("file_name\n" + "".join(f"{number}.wav\n" for number in range(20)))
    done = CliRunner().invoke(main, [*arguments, "--dev-share", "0.2", "--seed", "7"])
    assert done.exit_code == 0 and "drew 4 utterances, 20.0%, by utterance, seed 7" in done.stderr
    card = json.loads((tmp_path / "c.json").read_text())
    assert card["splits"] == {"dev": 4, "train": 16}
    assert card["record"]["listing"]["dev"] == {
        "by": "utterance", "seed": 7, "share": 0.2, "speakers": 1, "utterances": 4, "of_utterances": 20,
    }  # fmt: skip


BAD_TABLES = [
    ("file,path\na.wav,a.wav\n", "columns file and path may all be paths", "--rename path=other_path"),
    ("wav,x\na.wav,1\n", "column `file` not found; it has wav, x", "--rename wav=file"),
    ("file,start,end\na.wav,2,2\n", "row 2 (a.wav): starts at 2 s and ends at 2 s", "expected a later end"),
    ("file,start,end\na.wav,0,1\na.wav,-1,2\n", "row 3 (a.wav): got time '-1'", "expected seconds"),
    ("file,start,end\na.wav,x,2\n", "row 2 (a.wav): got time 'x'", "expected seconds"),
    ("file,start,end\na.wav,1,nan\n", "row 2 (a.wav): got time 'nan'", "expected seconds"),
    ("file,start,end\na.wav,1,\n", "`start` without `end`", "none of them for the whole file"),
    ("file,end\na.wav,1\n", "`end` without `start`", "none of them for the whole file"),
    ("file,start,end,offset\na.wav,1,2,1\n", "has `start` and `offset`", "--rename"),
    ("file,duration\na.wav,0\n", "`duration` is 0 s", "remove the row"),
    ("file,duration\na.wav,3\n", "lasts 4 s, its table gives 3 s", "--skip-bad"),
    (
        "file,start,end\na.wav,3,4.5\n",
        "ends before 4.5 s, the end of utterance 'a-0003000-0004500': it has 4 s",
        "a.wav",
    ),
    ("file,start,end,id\na.wav,5,6,u\n", "ends before 5 s, the beginning of utterance 'u': it has 4 s", "a.wav"),
    ("file,start,end\na.wav,1,2\na.wav,1,2\n", "'a-0001000-0002000' occurs twice", "is listed twice"),
    ("file,start,end,id\na.wav,1,2,u\na.wav,2,3,u\n", "a.wav (1 to 2 s) and ", "a.wav (2 to 3 s)"),
]


@pytest.mark.parametrize(("text", "expected", "fix"), BAD_TABLES)
def test_a_bad_table_is_one_line(text: str, expected: str, fix: str, tmp_path: Path) -> None:
    write_audio(tmp_path / "set/a.wav")
    (tmp_path / "set/metadata.csv").write_text(text)
    found = refused("folder", tmp_path / "set", tmp_path / "c.h5")
    assert expected in found and fix in found


def test_bad_json_lines_and_tables_are_one_line(tmp_path: Path) -> None:
    root, out = tmp_path / "set", tmp_path / "c.h5"
    write_audio(root / "a.wav")
    table = root / "metadata.jsonl"
    table.write_text('{"file": "a.wav"}\n\n{"file": "a.wav"\n')
    assert "metadata.jsonl: line 3 is not JSON" in refused("folder", root, out)
    table.write_text('["a.wav"]\n')
    assert "line 1 is a JSON list, expected an object" in refused("folder", root, out)
    table.write_text("\n")
    assert "metadata.jsonl is empty" in refused("folder", root, out)
    (root / "metadata.csv").write_text("file\na.wav\n")
    assert "metadata.csv, metadata.jsonl; choose one with --table" in refused("folder", root, out)
    assert read("folder", root, out, tables=(root / "metadata.csv",)).ids == ["a"]
    out.unlink()
    out.with_suffix(".json").unlink()
    assert "--table none.csv: file not found" in refused("folder", root, out, tables=(Path("none.csv"),))
    assert "unknown form of table" in refused("folder", root, out, tables=(root / "a.wav",))
    assert "--dev-share 1" in refused("folder", root, out, tables=(root / "metadata.csv",), dev_share=1.0)


# ---------------------------------------------------------------------------------------------- parts of long files


LONG = {
    "wav": {}, "flac": {}, "ogg": {}, "opus": {"format": "OGG", "subtype": "OPUS"}, "mp3": {},
    "gsm": {"format": "WAV", "subtype": "GSM610"},
}  # fmt: skip


@pytest.mark.parametrize("name", LONG)
def test_parts_equal_slices_of_the_whole_file_and_the_rest_is_not_decoded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, seconds = tmp_path / "set", 32
    audio = np.tile(NOISE, seconds // 4) * np.linspace(0.1, 1, seconds * RATE) / 32_768
    write_audio(root / f"long.{name}", audio=audio, **LONG[name])
    whole, _ = soundfile.read(root / f"long.{name}", dtype="float32")
    starts = [*np.arange(2.0, 30, 2.113), 2.5, 23.0]  # two overlap others, and the table is not in order
    rows = "".join(f"long.{name},{start:.3f},{start + 1.25:.3f}\n" for start in starts)
    (root / "metadata.csv").write_text(f"file,start,end\n{rows}")
    decoded = []
    original = audio_file_module.Stream.read

    def count(self: Any, frames: int, *args: Any, **kwargs: Any) -> Any:
        found = original(self, frames, *args, **kwargs)
        decoded.append(len(found))
        return found

    monkeypatch.setattr(audio_file_module.Stream, "read", count)
    corpus = read("folder", root, tmp_path / "c.h5")
    # MP3 and GSM are decoded once, from the beginning to the last part; the others only where there is a part.
    assert sum(decoded) <= (len(whole) if name in ("mp3", "gsm") else len(starts) * 1.25 * RATE)
    assert len(corpus) == len(starts)
    for index, utterance in enumerate(corpus.ids):
        first, last = (round(int(text) * RATE / 1000) for text in utterance.split("-")[1:])
        expected = np.clip(np.rint(whole[first:last] * 32_768), -32_768, 32_767)
        # soundfile seeks after it has opened a file, which moves the floats of an MP3 by their last bit.
        np.testing.assert_allclose(corpus.samples(index), expected, rtol=0, atol=int(name == "mp3"))


def test_the_header_of_a_file_with_parts_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_audio(tmp_path / "set/a.ogg", audio=NOISE / 32_768)
    rows = "".join(f"a.ogg,{start / 10},{start / 10 + 0.5}\n" for start in range(30))
    (tmp_path / "set/metadata.csv").write_text("file,start,end\n" + rows)
    checks = []
    original = audio_file_module.read_header
    monkeypatch.setattr(audio_file_module, "read_header", lambda file: checks.append(1) or original(file))
    assert len(read("folder", tmp_path / "set", tmp_path / "c.h5")) == 30
    assert len(checks) == 1


def test_a_part_of_another_rate_is_resampled_by_itself(tmp_path: Path) -> None:
    import torch
    import torchaudio

    write_audio(tmp_path / "set/a.flac", rate=22_050)
    (tmp_path / "set/metadata.csv").write_text("file,offset,duration\na.flac,0.5,1.1\n")
    corpus = read("folder", tmp_path / "set", tmp_path / "c.h5")
    part = torch.from_numpy(NOISE[11_025 : 11_025 + 24_255].astype(np.float32) / 32_768)
    expected = torchaudio.functional.resample(part, 22_050, RATE).numpy()
    np.testing.assert_allclose(corpus.waveform(0), expected, atol=1 / 32_768)


def test_a_part_may_end_a_frame_after_its_file(tmp_path: Path) -> None:
    write_audio(tmp_path / "set/a.wav")
    (tmp_path / "set/metadata.csv").write_text("file,start,end\na.wav,3,4.02\n")
    np.testing.assert_array_equal(read("folder", tmp_path / "set", tmp_path / "c.h5").samples(0), NOISE[48_000:])


def test_an_error_in_a_file_that_is_decoded_forwards_does_not_move_the_next_part(tmp_path: Path) -> None:
    write_audio(tmp_path / "a.mp3", audio=NOISE / 32_768)
    whole, _ = soundfile.read(tmp_path / "a.mp3", dtype="float32")
    with audio_file_module.Forward() as forward:

        def part(name: str, start: float, **changes: Any) -> Any:
            crop = {"crop_s": (start, 0.5), **changes}
            one = ListedUtterance(file=tmp_path / name, id="a", split="train", speaker="s", **crop)
            return decode(one, forward=forward)

        for start in (1.0, 2.0, 0.5):
            first = round(start * RATE)
            expected = np.rint(whole[first : first + RATE // 2] * 32_768)
            assert isinstance(part("b.mp3", start), Bad)
            np.testing.assert_array_equal(part("a.mp3", start).samples, expected)
            assert isinstance(part("a.mp3", 3.8), Bad)


# -------------------------------------------------------------------------------------------------- splits and dev


def listing(*names: str, speakers: int = 1, split: str = "train") -> Listing:
    return Listing(
        [
            ListedUtterance(file=Path(name), id=name, split=split, speaker=f"s{number % speakers}")
            for number, name in enumerate(names)
        ]
    )


def dev_of(found: Listing) -> set[str]:
    return {utterance.id for utterance in found.utterances if utterance.split == "dev"}


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({"train", "validation", "test"}, {"train", "dev", "test"}),
        ({"train-clean-100", "dev-clean", "test-clean", "test-other"}, {"train", "dev", "test-clean", "test-other"}),
        ({"train", "valid", "eval"}, {"train", "dev", "eval"}),
        ({"train", "eval", "test"}, {"train", "dev", "test"}),
        ({"train", "dev", "val"}, {"train", "dev", "val"}),
        ({"Session1", "validated"}, {"Session1", "validated"}),
    ],
)
def test_usual_names_of_splits_are_renamed_where_they_are_unambiguous(splits: set[str], expected: set[str]) -> None:
    utterances = [one for split in sorted(splits) for one in listing(split, split=split).utterances]
    assert {one.split for one in name_splits(Listing(utterances)).utterances} == expected


def test_dev_is_drawn_by_a_hash_that_later_files_do_not_disturb() -> None:
    names = [f"u{number}" for number in range(2_000)]
    drawn = dev_of(draw_dev(listing(*names), ReaderOptions()))
    assert len(drawn) == 100
    assert drawn == dev_of(draw_dev(listing(*reversed(names)), ReaderOptions()))
    assert drawn != dev_of(draw_dev(listing(*names), ReaderOptions(seed=1)))
    more = dev_of(draw_dev(listing(*names, *(f"v{number}" for number in range(200))), ReaderOptions()))
    assert len(more) == 110 and len(drawn & more) >= 90
    assert not dev_of(draw_dev(listing(*names), ReaderOptions(dev_share=0.0)))
    assert not dev_of(draw_dev(listing("u0"), ReaderOptions()))
    assert not dev_of(draw_dev(listing(*names, split="Session1"), ReaderOptions()))


def test_dev_is_drawn_by_speaker_where_ten_are_known() -> None:
    found = draw_dev(listing(*(f"u{number}" for number in range(1_000)), speakers=40), ReaderOptions())
    speakers = {split: {one.speaker for one in found.utterances if one.split == split} for split in ("train", "dev")}
    assert Counter(one.split for one in found.utterances) == {"train": 950, "dev": 50}
    assert len(speakers["dev"]) == 2 and not speakers["dev"] & speakers["train"]
    assert found.understood["dev"]["by"] == "speaker"
    few = draw_dev(listing(*(f"u{number}" for number in range(100)), speakers=9), ReaderOptions())
    assert few.understood["dev"]["by"] == "utterance" and few.understood["dev"]["utterances"] == 5


def test_a_dev_split_by_speaker_has_whole_speakers_and_never_all() -> None:
    by_speaker = ReaderOptions(dev_by="speaker")
    two = draw_dev(listing("a", "b", "c", speakers=2), by_speaker)  # s0 has two of the three utterances
    assert dev_of(two) == {"b"}
    with pytest.raises(RetortError, match="one speaker, 's0', expected at least two speakers; use --dev-by utterance"):
        draw_dev(listing("a", "b"), by_speaker)
    unknown = [ListedUtterance(file=Path(name), id=name, split="train", speaker="unknown") for name in "ab"]
    with pytest.raises(RetortError, match="knows no speaker"):
        draw_dev(Listing(unknown), by_speaker)
    beside = Listing(listing("a", "b").utterances + listing("c", split="dev").utterances)
    assert draw_dev(beside, ReaderOptions()) == beside
    with pytest.raises(RetortError, match="has a split 'dev'; remove the option"):
        draw_dev(beside, ReaderOptions(dev_share=0.1))


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
