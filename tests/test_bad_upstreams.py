"""Invalid corpora, options and upstreams of stage one; code of an untrusted upstream runs only with an option."""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bad_input_world import (
    EXTRACT,
    Row,
    both,
    change_json,
    check_refused,
    cut,
    enter_world,
    folder,
    remove,
    run,
    tree,
    write,
)

CARD, AUDIO = "corpora/tiny.json", "corpora/tiny.h5"
WEIGHTS, INDEX = "teacher/model.safetensors", "teacher/model.safetensors.index.json"
CODE = """\
from pathlib import Path
Path("ran").touch()
from transformers import HubertConfig as Config, HubertModel as Model
"""
AUTO_MAP = {"AutoConfig": "stranger.Config", "AutoModel": "stranger.Model"}


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_world(tmp_path / "world", monkeypatch)


def asked(name: str, more: str, message: str) -> Row:
    return Row(name, f"{EXTRACT} {more}", message)


def instead(name: str, old: str, new: str, message: str) -> Row:
    assert old in EXTRACT
    return Row(name, EXTRACT.replace(old, new), message)


def configured(key: str, value: Any, message: str) -> Row:
    """Return a row with another value in the teacher's config.json."""
    return Row(f"{key} {value}", EXTRACT, message, change_json("teacher/config.json", key, to=value))


def change_h5(name: str, value: Any) -> None:
    with h5py.File(AUDIO, "r+") as file:
        del file[name]
        file[name] = value


def samples_elsewhere() -> None:
    with h5py.File(AUDIO, "r+") as file:
        size = len(file["samples"])
        del file["samples"]
        file.create_dataset("samples", (size,), dtype="<i2", external=[("corpora/other.h5", 0, 2 * size)])


def name_climbs() -> None:
    with h5py.File(AUDIO, "r+") as file:
        file.attrs["name"] = "../../x"


def renamed_weights(**changes: str) -> None:
    tensors = load_file(WEIGHTS)
    save_file({changes.get(name, name): value for name, value in tensors.items()}, WEIGHTS, metadata={"format": "pt"})


CORPORA = [
    instead("no corpus", "tiny.json", "none.json", "corpora/none.json does not exist; run the stage"),
    instead("text as corpus", "corpora/tiny.json", "params.yaml", "params.yaml is not a readable corpus"),
    Row("card a folder", EXTRACT, "tiny.json is a folder; give the JSON file", folder(CARD)),
    Row("audio a folder", EXTRACT, "tiny.h5 is a folder or a device; give the .h5 file", folder(AUDIO)),
    Row("audio empty", EXTRACT, "tiny.h5 is not a readable corpus", write(AUDIO, "")),
    Row("audio cut off", EXTRACT, "is not a readable corpus .*truncated file", cut(AUDIO, 4000)),
    Row("audio is text", EXTRACT, "is not a readable corpus .*signature not found", write(AUDIO, "hello")),
    Row("card without file", EXTRACT, "tiny.json: `file` is missing", change_json(CARD, "file", drop=True)),
    Row("card with a number", EXTRACT, "file: got 1, expected str", change_json(CARD, "file", to=1)),
    Row("card without digest", EXTRACT, "tiny.json: `digest` is missing", change_json(CARD, "digest", drop=True)),
    Row("card of another", EXTRACT, "has digest .*its card", change_json(CARD, "file", to="corpora/other.h5")),
    Row("card to a system file", EXTRACT, "/etc/passwd is not a readable", change_json(CARD, "file", to="/etc/passwd")),
    Row("audio exchanged", EXTRACT, "the file changed after", lambda: shutil.copy("corpora/other.h5", AUDIO)),
    Row("samples elsewhere", EXTRACT, "its samples lie in another file", samples_elsewhere),
    Row("name climbs", EXTRACT, "name: got '../../x', expected a plain name", name_climbs),
    Row("fewer starts", EXTRACT, "column start .*expected 10 rows", lambda: change_h5("utterances/start", [0, 1])),
    Row("numbers as ids", EXTRACT, "is not a readable corpus", lambda: change_h5("utterances/id", list(range(10)))),
    Row("ids alike", EXTRACT, "ids are not unique names", lambda: change_h5("utterances/id", ["a"] * 10)),
    Row(
        "beyond the end",
        EXTRACT,
        "its table needs .* int16 samples",
        lambda: change_h5("utterances/start", [9**9] * 10),
    ),
]

OPTIONS = [
    asked("codec", "--codec zip", "unknown codec 'zip': expected one of float16, int4, int8"),
    asked(
        "a codec without a rate", "--codec transform", "codec 'transform': expected a number of bits a value, such as"
    ),
    asked("rate in words", "--codec transform:x", "codec 'transform:x': expected a number of bits a value, such as"),
    asked("rate 0", "--codec transform:0", "codec transform:0: expected a rate above 0 and up to"),
    asked("rate 9", "--codec transform:9", "codec transform:9: expected a rate above 0 and up to"),
    asked("rate of two names", "--codec transform:0.50", "codec 'transform:0.50': write transform:0.5"),
    asked(
        "rate too fine", "--codec transform:0.3", "of 32 features in 19.2 bytes, .* a rate that is a multiple of 1/64"
    ),
    asked("part of a block", "--codec transform:1 --pack-frames 100", "--pack-frames 100: expected a multiple of 16"),
    asked("dtype", "--dtype fp8", "unknown dtype 'fp8': expected one of bf16, fp16, fp32"),
    asked("keep", "--keep frames,x", "unknown --keep 'x': expected one of frames, pooled, stem"),
    asked("keep without means", "--keep frames", "`pooled` costs little and is always kept; add it"),
    asked("keep nothing", "--keep ''", "`pooled` costs little and is always kept; add it"),
    asked("layers in words", "--layers a,b", "--layers 'a,b': expected `all` or numbers"),
    asked("no layers", "--layers ''", "--layers '': expected `all` or numbers"),
    asked("layers beyond", "--layers 0,99", "upstream teacher has no layer 99; it has 0 to 4"),
    asked("layers below", "--layers=-1", "has no layer -1; it has 0 to 4"),
    asked("layers turned", "--layers 4,2", "--layers 4,2: give each layer once, in ascending order"),
    asked("no frames", "--pack-frames 0", "--pack-frames 0: expected at least 1"),
    asked("frames in words", "--pack-frames many", "'many' is not a valid integer"),
    asked("endless packs", "--pack-frames 99999999999999999999", "expected at least 1 and less than 2.53"),
    asked("packs too long", "--pack-frames 9999999999999", "a store's index is int32, expected less than 2"),
    asked("packs too small", "--pack-frames 3", "has 53 frames, a pack holds 3 .* use --pack-frames 53, or drop"),
    asked("a short cut", "--cut-long 0.5", "--cut-long 0.5: expected 0 .no cut., or 1 to 86400 seconds"),
    asked("a cut that is not a number", "--cut-long nan", "--cut-long nan: expected 0"),
    asked("all dropped", "--pack-frames 3 --drop-long", "every utterance of .*give a larger --pack-frames"),
    asked("no shard", "--shard-packs 0", "--shard-packs 0: expected at least 1"),
    asked("workers", "--workers -1", "--workers -1: expected 0 or more"),
    asked("two clusters", "--workers 2 --scheduler tcp://127.0.0.1:9", "give one of them"),
    asked("odd cluster", "--scheduler nope://a", "no Dask scheduler answers there .*start `python -m dask scheduler`"),
    asked("threads", "--threads -2", "--threads -2: expected 0 or more"),
    asked("device", "--device tpu", "--device 'tpu': expected cpu, cuda or cuda:N"),
    asked("device without data", "--device meta", "--device 'meta': expected cpu, cuda or cuda:N"),
    asked("workers beyond", "--device cuda:77 --workers 2", "--device cuda:77: this machine has . CUDA devices"),
    asked("device beyond", "--device cuda:77", "--device cuda:77: this machine has . CUDA devices"),
    asked("blocks below", "--initial-blocks -1", "--initial-blocks -1: expected 0 or more"),
    asked("blocks beyond", "--initial-blocks 99", "--initial-blocks 99: the upstream has 4 blocks"),
    asked("store a file", "--store params.yaml", "--store .*params.yaml is a file; give a folder"),
    asked("store below a file", "--store params.yaml/x", "params.yaml is not a folder"),
    asked("store nowhere", "--store ''", "the ROOT of all stores is empty"),
    asked("store at an odd URL", "--store nope://x", "Protocol not known: nope; expected a local folder or a URL"),
    asked("store in the kernel", "--store /proc/none", "/proc/none: No such file or directory; give another path"),
    asked("name climbs", "--name ../../x", "got '../../x', expected a plain name without slashes"),
    asked("no name", "--name ''", "got '', expected a plain name without slashes"),
    asked("odd option", "--fast", "No such option '--fast'"),
    instead("manifest a folder", "new.json", "corpora", "--manifest corpora is a folder; give a file"),
    instead("manifest below a file", "new.json", "params.yaml/x.json", "params.yaml is not a folder"),
    Row(
        "fbank's stem",
        EXTRACT.replace("teacher", "fbank").replace("0,2,4", "0") + " --keep pooled,stem --drop-long",
        "upstream fbank has no convolution stem, or .*; keep frames,pooled",
    ),
    instead("fbank's blocks", "teacher", "fbank --initial-blocks 1", "upstream fbank has no blocks"),
    Row("plan: rate", "extract plan --upstream teacher --corpus corpora/tiny.json --rate nan", "--rate nan: expected"),
    Row(
        "plan: sample", "extract plan --upstream teacher --corpus corpora/tiny.json --sample-s -1", "expected 0 or more"
    ),
    Row(
        "plan: layers",
        "extract plan --upstream teacher --corpus corpora/tiny.json --student-layers 9",
        "layer 9 is not",
    ),
]

UPSTREAMS = [
    instead("nowhere", "teacher", "nobody/none", "'nobody/none' is not a folder .* hub"),
    instead("a file", "teacher", "params.yaml", "'params.yaml' is not a folder"),
    instead("an odd folder", "teacher", "corpora", "corpora/config.json does not exist; expected .*save_pretrained"),
    Row(
        "a fairseq folder",
        EXTRACT.replace("teacher", "fairseq"),
        "fairseq/config.json does not exist, and base.pt looks like a fairseq checkpoint: .*convert_hubert_original",
        write("fairseq/base.pt", "weights"),
    ),
    Row(
        "a fairseq file",
        EXTRACT.replace("teacher", "base.pt"),
        "'base.pt' is not a folder but a file, which looks like a fairseq checkpoint: .*convert_hubert_original",
        write("base.pt", "weights"),
    ),
    instead("an empty revision", "teacher", "nobody/none@", "'nobody/none@': the revision after @ is empty"),
    Row("no config", EXTRACT, "teacher/config.json does not exist", remove("teacher/config.json")),
    Row("config cut off", EXTRACT, "teacher/config.json is not JSON", cut("teacher/config.json", 100)),
    Row("config a list", EXTRACT, "holds a JSON list, expected an object", write("teacher/config.json", "[]")),
    configured("model_type", "bert", "has model_type 'bert'; expected one of wav2vec2, hubert"),
    configured("model_type", ["hubert"], "has model_type .'hubert'.; expected one of"),
    configured("hidden_size", "x", "hidden_size: got 'x', expected int"),
    configured("hidden_size", 0, "expected numbers of at least 1"),
    configured("conv_stride", [5, 2], "lists .* differ in length"),
    configured("conv_kernel", "x", "conv_kernel: got 'x', expected a list"),
    configured("num_attention_heads", 5, "transformers can't open .*download or train it again"),
    configured("hidden_act", "xyz", "transformers can't open .*download or train it again"),
    configured(
        "intermediate_size", 48, r"can't open .*\.bias: got \[64\], expected \[48\]; download or train it again"
    ),
    configured("num_hidden_layers", 9, "weights .* missing .* such as encoder.layers.4"),
    configured("retort_note", 3, "retort_note: got 3, expected str"),
    Row("no weights", EXTRACT, "holds no weights; expected one of model.safetensors", remove(WEIGHTS)),
    Row("weights empty", EXTRACT, "transformers can't open .*header too small", write(WEIGHTS, "")),
    Row("weights garbage", EXTRACT, "transformers can't open", write(WEIGHTS, b"\x08" + b"\0" * 7 + b"garbage!")),
    Row("weights cut off", EXTRACT, "transformers can't open", cut(WEIGHTS, 50_000)),
    Row(
        "a weight of another name",
        EXTRACT,
        "1 weights .* missing .* such as encoder.layer_n",
        lambda: renamed_weights(**{"encoder.layer_norm.weight": "elsewhere"}),
    ),
    Row("index without map", EXTRACT, "`weight_map` is missing", both(remove(WEIGHTS), write(INDEX, "{}"))),
    Row(
        "index climbs",
        EXTRACT,
        "weight_map: got '../student/model.safetensors', expected a plain name",
        both(remove(WEIGHTS), write(INDEX, json.dumps({"weight_map": {"a": "../student/model.safetensors"}}))),
    ),
    Row(
        "index to nothing",
        EXTRACT,
        "teacher/a.safetensors, which .* names, does not exist",
        both(remove(WEIGHTS), write(INDEX, json.dumps({"weight_map": {"a": "a.safetensors"}}))),
    ),
    Row(
        "odd pickle",
        EXTRACT,
        "transformers can't open",
        both(remove(WEIGHTS), write("teacher/pytorch_model.bin", "garbage")),
    ),
    Row("no preprocessor", EXTRACT, "has no preprocessor_config.json", remove("teacher/preprocessor_config.json")),
    Row(
        "odd preprocessor",
        EXTRACT,
        "do_normalize: got 'no', expected bool",
        change_json("teacher/preprocessor_config.json", "do_normalize", to="no"),
    ),
]


PREPROCESSOR, PROCESSOR = "teacher/preprocessor_config.json", "teacher/processor_config.json"
PLAN = "extract plan --upstream teacher --corpus corpora/tiny.json --rate 1"


def settings_say(key: str, value: Any, message: str, *, line: str = EXTRACT) -> Row:
    """Return a row with another value in the preprocessor's settings."""
    return Row(f"{key} {value} {line[8:12]}", line, message, change_json(PREPROCESSOR, key, to=value))


def sharded(*, lost: bool) -> None:
    """Split the teacher's weights into two .bin files, one of which is missing or a pickled program."""
    tensors = load_file(WEIGHTS)
    Path(WEIGHTS).unlink()
    names = sorted(tensors)
    torch.save({name: tensors[name] for name in names[1:]}, "teacher/b.bin")
    if not lost:
        torch.save({names[0]: _Touches()}, "teacher/a.bin")
    index = {"weight_map": dict.fromkeys(names, "b.bin") | {names[0]: "a.bin"}}
    Path("teacher/pytorch_model.bin.index.json").write_text(json.dumps(index))


def lossy_weight(factor: float) -> None:
    tensors = load_file(WEIGHTS)
    tensors["encoder.layers.1.final_layer_norm.weight"] *= factor
    save_file(tensors, WEIGHTS, metadata={"format": "pt"})


ONE_OF_TWO = "do_normalize .*processor_config.json: feature_extractor: false, .*true.*--normalise"
CHECKED = [
    settings_say("sampling_rate", 8000, "sampling_rate: got 8000, expected 16000"),
    settings_say("sampling_rate", 8000, "sampling_rate: got 8000, expected 16000", line=f"{EXTRACT} --normalise"),
    settings_say("sampling_rate", 44100, "sampling_rate: got 44100, expected 16000", line=PLAN),
    settings_say("sampling_rate", "16000", "sampling_rate: got '16000', expected 16000"),
    settings_say("feature_extractor_type", "WhisperFeatureExtractor", "expected 'Wav2Vec2FeatureExtractor'"),
    settings_say("feature_size", 80, "feature_size: got 80, expected 1"),
    Row("two settings", EXTRACT, ONE_OF_TWO, write(PROCESSOR, '{"feature_extractor": {"do_normalize": false}}')),
    Row("processor a list", EXTRACT, "processor_config.json holds a JSON list", write(PROCESSOR, "[]")),
    Row(
        "processor without",
        EXTRACT,
        "has no preprocessor_config.json .*give --normalise or --no-normalise",
        both(remove(PREPROCESSOR), write(PROCESSOR, '{"processor_class": "Wav2Vec2Processor"}')),
    ),
    Row(
        "rate of a processor",
        EXTRACT,
        "feature_extractor: sampling_rate: got 8000, expected 16000",
        both(remove(PREPROCESSOR), write(PROCESSOR, '{"feature_extractor": {"sampling_rate": 8000}}')),
    ),
    configured("quantization_config", {"load_in_8bit": True}, "has a quantization_config, .*quantised from"),
    Row(
        "num_hidden_layers 3",
        EXTRACT.replace("0,2,4", "0,2,3"),
        "16 weights .* such as encoder.layers",
        change_json("teacher/config.json", "num_hidden_layers", to=3),
    ),
    configured("attn_implementation", "attention_of_another", "`attn_implementation`, from config.json"),
    configured("transformers_weights", "../student/model.safetensors", "expected a plain name"),
    configured("transformers_weights", "other.safetensors", "holds no weights; expected one of other.safetensors"),
    Row("a PEFT adapter", EXTRACT, "is a PEFT adapter, .*merge it", write("teacher/adapter_config.json", "{}")),
    Row("a PEFT adapter, plan", PLAN, "is a PEFT adapter, .*merge it", write("teacher/adapter_config.json", "{}")),
    Row(
        "weights of flax",
        EXTRACT,
        "found flax_model.msgpack: open it with transformers 4",
        both(remove(WEIGHTS), write("teacher/flax_model.msgpack", "")),
    ),
    Row("a .bin part lost", EXTRACT, "a.bin, which .* names, does not exist", lambda: sharded(lost=True)),
    Row("a .bin part a program", EXTRACT, "transformers can't open", lambda: sharded(lost=False)),
    Row("a weight that is nan", EXTRACT, "layer 2 is not finite .* in fp32", lambda: lossy_weight(float("nan"))),
]


@pytest.mark.parametrize("row", CHECKED, ids=lambda row: row.name)
def test_what_changes_the_meaning_is_refused(row: Row) -> None:
    check_refused(row)
    assert not Path("ran").exists()


@pytest.mark.parametrize(("codec", "code"), [("float16", 1), ("int8", 0), ("int4", 1)])
def test_what_a_codec_cannot_hold_is_named_by_utterance_and_layer(codec: str, code: int) -> None:
    lossy_weight(1e6)
    done = run(f"{EXTRACT} --codec {codec}")
    assert done.exit_code == code, done.output
    if code:
        said = done.stderr.splitlines()[-1]
        assert re.match(r"error: utterance 'u\d+' .*, layer 2: hidden states reach .* use --codec int8", said)
        assert not Path("new.json").exists()


@pytest.mark.parametrize("row", [*CORPORA, *OPTIONS, *UPSTREAMS], ids=lambda row: row.name)
def test_refused(row: Row) -> None:
    check_refused(row)


STRANGERS = [
    Row(
        "auto_map",
        EXTRACT,
        "brings its own code .*give --trust-remote-code",
        change_json("teacher/config.json", "auto_map", to=AUTO_MAP),
    ),
    Row("auto_map of nothing", EXTRACT, "brings its own code", change_json("teacher/config.json", "auto_map", to=None)),
    Row(
        "auto_map to the hub",
        EXTRACT,
        "brings its own code",
        change_json("teacher/config.json", "auto_map", to={"AutoModel": "somebody/thing--stranger.Model"}),
    ),
    Row(
        "a kernel",
        EXTRACT,
        "brings its own code",
        change_json("teacher/config.json", "attn_implementation", to="somebody/kernel"),
    ),
    Row("a student", EXTRACT.replace("teacher", "student"), "brings its own code .*give --trust-remote-code"),
    Row(
        "a student without its map",
        EXTRACT.replace("teacher", "student"),
        "is a student's but has no auto_map",
        change_json("student/config.json", "auto_map", drop=True),
    ),
]


@pytest.mark.parametrize("row", STRANGERS, ids=lambda row: row.name)
@pytest.mark.parametrize("line", ["run", "plan"])
def test_untrusted_code_does_not_run_without_the_option(row: Row, line: str) -> None:
    write("teacher/stranger.py", CODE)()
    command = row.line
    if line == "plan":
        command = command.replace("extract run", "extract plan --sample-s 1").replace("--manifest new.json", "")
    check_refused(Row(row.name, command.replace("0,2,4", "0,2"), row.message, row.damage))
    assert not Path("ran").exists()


def test_untrusted_code_runs_with_the_option() -> None:
    write("teacher/stranger.py", CODE)()
    change_json("teacher/config.json", "auto_map", to=AUTO_MAP)()
    done = run(f"{EXTRACT} --trust-remote-code")
    assert done.exit_code == 0, done.output
    assert Path("ran").exists(), "or the test above shows nothing"


class _Touches:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("trust", ["", " --trust-remote-code"])
def test_weights_that_are_a_program_are_not_run(trust: str) -> None:
    Path(WEIGHTS).unlink()
    torch.save({"weight": _Touches()}, "teacher/pytorch_model.bin")
    check_refused(Row("pickle", EXTRACT + trust, "transformers can't open"))
    Path("teacher/pytorch_model.bin").write_bytes(pickle.dumps(_Touches(), protocol=2))
    check_refused(Row("bare pickle", EXTRACT + trust, "transformers can't open"))
    assert not Path("ran").exists()


def test_a_student_runs_with_the_option() -> None:
    before = tree()
    done = run(EXTRACT.replace("teacher", "student").replace("0,2,4", "0,2") + " --trust-remote-code")
    assert done.exit_code == 0, done.output
    after = tree()
    assert {name: after[name] for name in before} == before and "new.json" in after
