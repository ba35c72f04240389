"""Readers of own data: tables, parts of long files, trees as they lie on disk, splits and the dev share."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from extract.base.errors import RetortError
from pipelines.__main__ import main
from pipelines.readers import ReaderOptions
from pipelines.readers import audio_file as audio_file_module
from pipelines.readers.decode import Bad, decode
from pipelines.readers.listing import ListedUtterance, Listing
from pipelines.readers.splits import draw_dev, name_splits
from tests.own_data import NOISE, RATE, read, refused, rows_of, write_audio

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
