"""Data sets of another layout, damaged audio, and wrong arguments of the commands of `pipelines`: one-line errors."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from extract.upstream.card import find_upstream
from pipelines.readers import READERS
from tests.bad_input_world import Row, change_params, check_refused, enter_world, folder, tree, write

MINE, TABLE, ONE = (
    "pipelines corpus folder data/mine --out corpora/mine.h5",
    "data/mine/metadata.csv",
    "data/mine/one.wav",
)
MANIFEST = "manifests/teacher.json"
BYTES = b"\xff\xfe\xfa"
TRANSCRIPT = "LibriSpeech/train-clean-100/1/2/1-2.trans.txt"
LIBRIMIX = {
    f"data/{split}/{name}": ""
    for split in ("train", "dev", "test")
    for name in ("wav.scp", "segments", "utt2spk", "rttm", "reco2dur")
}
QUESST = {f"scoring/language_key_{name}.lst": "" for name in ("utterances", "dev", "eval")}
TERMS = {f"scoring/groundtruth_quesst14_{part}/a.tlist.xml": "<terms/>" for part in ("dev", "eval")}
RTTMS = {f"scoring/groundtruth_quesst14_{part}/a.rttm": "" for part in ("dev", "eval")}
FLUENT = [f"data/{part}_data.csv" for part in ("train", "valid", "test")]
TURNS = {f"Session{number}/sentences/wav/d/t.wav": "" for number in range(1, 6)}
EVALUATIONS = [f"Session{number}/dialog/EmoEvaluation/d.txt" for number in range(1, 6)]
COMMANDS = {
    "speech_commands_v0.01/validation_list.txt": "",
    "speech_commands_v0.01/testing_list.txt": "",
    "speech_commands_v0.01/_background_noise_/a.wav": "no audio",
    "speech_commands_test_set_v0.01/readme": "",
}
TRIALS = {"dev/wav/a/b/c.wav": ""}


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_world(tmp_path / "world", monkeypatch)


def data_set(
    name: str, reader: str, files: dict[str, str] | dict[str, str | bytes], message: str, options: str = ""
) -> Row:
    """Return a row whose data set folder has these files."""

    def damage() -> None:
        for file, text in files.items():
            write(f"data/set/{file}", text)()

    return Row(
        f"{reader} {name}", f"pipelines corpus {reader} data/set --out corpora/set.h5 {options}", message, damage
    )


def table(name: str, text: str | bytes, message: str) -> Row:
    """Return a row of the reader `folder` with this metadata.csv."""
    return Row(f"table {name}", MINE, message, write(TABLE, text))


def audio(name: str, samples: np.ndarray, message: str) -> Row:
    return Row(f"audio {name}", MINE, message, lambda: soundfile.write(ONE, samples, 16_000, subtype="FLOAT"))


def command(line: str, message: str) -> Row:
    return Row(line, line, message)


TREES = [
    *(
        command(f"pipelines corpus {reader} data/empty --out corpora/x.h5", "not found; expected the layout of")
        for reader in READERS
    ),
    command("pipelines corpus folder data/none --out corpora/x.h5", "data set folder data/none not found"),
    command("pipelines corpus folder params.yaml --out corpora/x.h5", "data set folder params.yaml not found"),
    command("pipelines corpus kaldi2 data/mine --out corpora/x.h5", "unknown reader 'kaldi2'.*did you mean 'kaldi'"),
    command("pipelines corpus musan data/mine --out corpora/x.h5", "unknown reader 'musan': expected one of fluent"),
    data_set("bytes", "librispeech", {TRANSCRIPT: BYTES}, "1-2.trans.txt: not text in UTF-8"),
    data_set(
        "no audio", "librispeech", {TRANSCRIPT: "1-2-3 A\n"}, "1 of 1 files can't be used: .*1-2-3.flac .does not exist"
    ),
    data_set("silent", "librispeech", {TRANSCRIPT: ""}, "the corpus would be empty"),
    data_set("part", "librispeech", {TRANSCRIPT: "1-2-3 A\n"}, "train-other-9/ not found", "--part train-other-9"),
    data_set("no lexicon", "librispeech", {TRANSCRIPT: ""}, "lexicon none not found", "--lexicon none"),
    data_set(
        "lexicon",
        "librispeech",
        {TRANSCRIPT: "1-2-3 A\n", "librispeech-lexicon.txt": "\nA\n"},
        "lexicon.txt: got line 'A', expected WORD",
    ),
    data_set(
        "word",
        "librispeech",
        {TRANSCRIPT: "1-2-3 A B\n", "librispeech-lexicon.txt": "A x\n"},
        "'B' is not in the lexicon",
    ),
    data_set("bytes", "voxceleb1", {"iden_split.txt": BYTES}, "iden_split.txt: not text in UTF-8"),
    data_set("line", "voxceleb1", {"iden_split.txt": "9 a/b/c.wav\n"}, "got line '9 a/b/c.wav', expected 1 .train."),
    data_set(
        "no audio",
        "voxceleb1",
        {"iden_split.txt": "1 a/b/c.wav\n"},
        "all files of iden_split.txt, such as dev/wav/a/b/c.wav, not found",
    ),
    data_set("no list", "voxceleb1-trials", TRIALS, "veri_test2.txt not found"),
    data_set(
        "line", "voxceleb1-trials", TRIALS | {"veri_test2.txt": "1 a\n"}, "veri_test2.txt: got line '1 a', expected"
    ),
    data_set(
        "columns", "fluent", dict.fromkeys(FLUENT, "a,b\n1,2\n"), "column 'path' not found; expected path, speakerId"
    ),
    data_set("bytes", "fluent", dict.fromkeys(FLUENT, BYTES), "train_data.csv: not text in UTF-8"),
    data_set("no row", "fluent", dict.fromkeys(FLUENT, ""), "train_data.csv is empty; .*path, speakerId"),
    data_set("line", "snips", {"all.iob.snips.txt": "x\n"}, "got line 'x', expected .SPEAKER-snips-SPLIT-N"),
    data_set("blank line", "snips", {"all.iob.snips.txt": "\n"}, "Ivy-snips-train-. not found"),
    data_set("nothing", "snips", {"all.iob.snips.txt": ""}, "Ivy-snips-train-. not found"),
    data_set("no evaluation", "iemocap", TURNS, "Session1/dialog/EmoEvaluation/d.txt not found"),
    data_set("bytes", "iemocap", TURNS | dict.fromkeys(EVALUATIONS, BYTES), "d.txt: not text in UTF-8"),
    data_set("no emotion", "iemocap", TURNS | dict.fromkeys(EVALUATIONS, ""), "the corpus would be empty"),
    data_set("nothing", "librimix", LIBRIMIX, "the corpus would be empty"),
    data_set(
        "wav.scp",
        "librimix",
        LIBRIMIX | {"data/train/wav.scp": "x\n"},
        "wav.scp: got line 'x', expected .RECORDING PATH",
    ),
    data_set(
        "segments",
        "librimix",
        LIBRIMIX | {"data/train/segments": "a b c\n"},
        "segments: got line 'a b c', expected .UTTERANCE",
    ),
    data_set("speaker", "librimix", LIBRIMIX | {"data/train/segments": "a b 0 1\n"}, "utt2spk: utterance 'a'"),
    data_set(
        "seconds",
        "librimix",
        LIBRIMIX | {"data/train/rttm": "SPEAKER r 1 zz 1 <NA> <NA> s\n"},
        "rttm: got time 'zz'",
    ),
    data_set(
        "endless",
        "librimix",
        LIBRIMIX | {"data/train/rttm": "SPEAKER r 1 0 inf <NA> <NA> s\n"},
        "rttm: got time 'inf'",
    ),
    data_set("turn", "librimix", LIBRIMIX | {"data/train/rttm": "SPEAKER x\n"}, "rttm: got line 'SPEAKER x'"),
    data_set("no scoring", "quesst14", QUESST, "scoring/groundtruth_quesst14_dev/.*not found"),
    data_set("terms", "quesst14", QUESST | RTTMS | dict.fromkeys(TERMS, "<x"), "a.tlist.xml: not a list of terms"),
    data_set("lexeme", "quesst14", QUESST | TERMS | dict.fromkeys(RTTMS, "LEXEME a\n"), "a.rttm: got line 'LEXEME a'"),
    data_set(
        "key",
        "quesst14",
        QUESST | TERMS | RTTMS | {"scoring/language_key_dev.lst": "a b c\n"},
        "language_key_dev.lst: got line 'a b c'",
    ),
    data_set("noise", "speech-commands", COMMANDS, "1 of 1 files can't be used: .*a.wav .unreadable"),
    data_set(
        "list",
        "speech-commands",
        COMMANDS | {"speech_commands_v0.01/testing_list.txt": BYTES},
        "testing_list.txt: not text in UTF-8",
    ),
]

FOLDERS = [
    table("empty", "", "metadata.csv is empty"),
    table("without file", "name\na\n", "column .file. not found; it has name; .*--rename name=file"),
    table("short row", "file,speaker\none.wav\n", "line 2 has 1 columns, expected 2"),
    table("long row", "file,speaker\none.wav,a,b,c\n", "line 2 has 4 columns, expected 2"),
    table("bytes", BYTES, "metadata.csv: not text in UTF-8"),
    table("open quote", 'file,x\n"one.wav,b\n', "metadata.csv: not a CSV file"),
    table("NUL", "file\none.wav\0\n", "column `file` holds 'one.wav.x00', expected a path"),
    table("no name", "file,x\n,1\n", "column `file` holds '', expected a path below"),
    table("twice", "file\none.wav\none.wav\n", "utterance id 'one' occurs twice"),
    table("odd id", "file,id\none.wav,a\tb\n", "utterance id 'a.tb' is empty or holds control characters"),
    table("odd label", "file,a/b\none.wav,x\n", "a label's name: got 'a/b', expected a plain name"),
    table("no audio", "file\ntwo.wav\n", "data/mine/two.wav .does not exist..*--skip-bad"),
    Row("audio text", MINE, "one.wav .unreadable", write(ONE, "no audio")),
    Row("audio empty", MINE, "one.wav .unreadable", write(ONE, "")),
    Row("audio a folder", MINE, "one.wav .unreadable", folder(ONE)),
    Row("nothing left", f"{MINE} --skip-bad", "the corpus would be empty", write(ONE, "no audio")),
    audio("short", np.zeros(100), "100 samples at 16 kHz, one frame needs 400"),
    audio("without samples", np.zeros(0), "one.wav .empty"),
    audio("NaN", np.full(9_000, np.nan), "holds NaN or infinite samples"),
    command(f"{MINE} --rename a", "--rename 'a': expected OLD=NEW"),
    command(f"{MINE} --rename a=b", "--rename a: .*file, speaker, keyword"),
    command(f"{MINE} --rename keyword=", "a label's name: got '', expected a plain name"),
    command("pipelines corpus snips data/mine --out corpora/x.h5 --seed 3", "--seed is an option of the readers"),
    command("pipelines corpus kaldi data/mine --out corpora/x.h5 --table a", "of the reader folder, not of kaldi"),
    command(f"{MINE} --dev-share nan", "--dev-share nan: expected at least 0"),
    command(f"{MINE} --part x", "--part is an option of the reader librispeech, not of folder"),
    command(f"{MINE} --lexicon params.yaml", "--lexicon is an option of the reader librispeech"),
    command(MINE.replace("mine.h5", "mine.json"), "a corpus is an .h5 file, such as corpora/mine.h5"),
    command(MINE.replace("corpora", "params.yaml"), "--out .*params.yaml/mine.h5: .*params.yaml"),
    Row("out a folder", MINE, "mine.h5 is a folder; give a file", folder("corpora/mine.h5")),
    Row("card a folder", MINE, "mine.json is a folder; give a file", folder("corpora/mine.json")),
]

OTHERS = [
    command("pipelines demo --config none --out demo", "none does not exist; give the params file"),
    command("pipelines demo --out data", "--out .*data is a folder without demo.json"),
    command("pipelines demo --out params.yaml", "params.yaml is a file; give a folder"),
    Row("demo scale", "pipelines demo --out d", "scale: got 0.0, expected more than 0", change_params("0.02", "0")),
    Row("demo NaN", "pipelines demo --out d", "scale: got nan, expected float", change_params("0.02", ".nan")),
    Row("demo key", "pipelines demo --out d", "unknown key .*'scales'", change_params("scale: 0.02", "scales: 1")),
    Row("demo section", "pipelines demo --out d", "no section `demo`", change_params("demo: {scale: 0.02}", "demo: 3")),
    command("pipelines study none", "unknown study 'none': expected one of codecs, discrete, generation"),
    command("pipelines study stacking --out corpora", "--out corpora .*would be replaced"),
    command("pipelines study stacking --out params.yaml/x", "params.yaml "),
    command("pipelines study stacking --base none", "unknown study 'none'"),
    Row(
        "study upstreams",
        "pipelines study stacking",
        "params.yaml: section .upstreams. is ",
        change_params("upstreams: {", "upstreams: 3 # {"),
    ),
    command("pipelines report --config none", "none does not exist; give the params file"),
    command("pipelines report", "manifests/targets/distill.json does not exist.*dvc repro"),
    command("pipelines report --out params.yaml", "'params.yaml' is a file"),
    Row("report section", "pipelines report", "has no section `report`", change_params("report:", "repot:")),
    Row("report key", "pipelines report", "unknown key .*'spead'", change_params("  speed: {", "  spead: {")),
    command("extract speed --config none", "none does not exist; give the params file"),
    command("extract speed --out corpora", "--out corpora is a folder"),
    Row("speed key", "extract speed", "unknown key .*'audio'", change_params("audio_seconds: 1", "audio: 1")),
    Row("speed value", "extract speed", "rounds: got 0, expected more than 0", change_params("rounds: 1", "rounds: 0")),
    command("extract speed --upstream fbank", "--upstream 'fbank': expected NAME=SOURCE"),
    command(
        f"extract compare {MANIFEST} none.json --corpus corpora/tiny.json --out x.json", "none.json does not exist"
    ),
    command(f"extract compare {MANIFEST} {MANIFEST} --corpus corpora/other.json --out x.json", "corpus"),
    command(
        f"extract compare {MANIFEST} {MANIFEST} --corpus corpora/tiny.json --split no --out x.json", "no split 'no'"
    ),
    Row(
        "report students",
        "pipelines report",
        "`students` is 'tiny'",
        change_params("students: [tiny]", "students: tiny"),
    ),
    Row("report manifest", "pipelines report", "is not JSON", write("manifests/targets/distill.json", "{")),
    Row("report fields", "pipelines report", "format_version", write("manifests/targets/distill.json", "{}")),
    command("pipelines bench nothing", "No such command 'nothing'"),
    command("pipelines bench extract --seconds nan", "--seconds nan: expected more than 0"),
    command("pipelines bench extract --rounds 0", "--rounds 0: expected more than 0"),
    command("pipelines bench extract --shape big", "unknown shape 'big': expected one of hubert-base"),
    command("pipelines bench extract --shape hubert-demo --upstream teacher", "exclude each other; give one"),
    command("pipelines bench extract --codec zip", "unknown codec 'zip': expected one of float16"),
    command("pipelines bench extract --out corpora", "--out corpora is a folder; give a file"),
    command("pipelines bench extract --threads 0", "--threads 0: expected more than 0"),
    command("pipelines bench train --steps 0", "--steps 0: expected more than 0"),
    command("pipelines bench train --codec zip", "unknown codec 'zip'"),
    command("pipelines bench train --dtype fp8", "unknown dtype 'fp8'"),
    command("pipelines bench growth --rounds -1", "--rounds -1: expected more than 0"),
    command("pipelines bench evaluate --batch-size 0", "--batch-size 0: expected more than 0"),
    command("pipelines bench evaluate --codec zip", "unknown codec 'zip'"),
    command("pipelines bench load --packs 0", "--packs 0: expected more than 0"),
    command("pipelines bench load --dim 7 --codec int4", "needs a dim that divides by 2, got 7; use --codec int8"),
    command("pipelines bench load --student none", "unknown student .*'none'"),
]


@pytest.mark.parametrize("row", [*TREES, *FOLDERS, *OTHERS], ids=lambda row: row.name)
def test_refused(row: Row) -> None:
    check_refused(row)


@pytest.mark.parametrize("change", ["its code", "its map", "one file more"])
def test_no_code_but_this_repositorys_runs_when_speed_is_measured(change: str) -> None:
    # Late: it imports torch, and no other row of this file does.
    from extract.base.errors import RetortError
    from extract.speed import SpeedConfig, SpeedRequest, load

    audio = SpeedConfig(corpus="", split="test", audio_seconds=1.0, threads=1, rounds=1)
    request = SpeedRequest(sources={"student": "student"}, audio=audio, device="cpu", trust_remote_code=False)
    assert load(request, "student", check=False).spec.dim == 32
    assert find_upstream("student").family == "retort-student"
    code, config = Path("student/modeling_retort.py"), Path("student/config.json")
    touches = "\nfrom pathlib import Path\nPath('ran').touch()\n"
    if change == "its code":
        code.write_text(code.read_text() + touches)
    elif change == "its map":
        config.write_text(config.read_text().replace('"modeling_retort.', '"somebody/thing--modeling_retort.'))
    else:
        Path("student/more.py").write_text(touches)
    before = tree()
    with pytest.raises(RetortError, match="brings other code than this repository"):
        load(request, "student", check=False)
    assert tree() == before and not Path("ran").exists()
