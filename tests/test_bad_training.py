"""Wrong sections, stores, initial weights and folders of stage two and evaluation: one line, exit 1, no change."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.bad_input_world import (
    EXTRACT,
    SCORE,
    TRAIN,
    Damage,
    Row,
    change_json,
    change_params,
    check_refused,
    enter_world,
    folder,
    remove,
    run,
    tree,
    write,
)

P, WEIGHTS, ONE = "params.yaml", "manifests/teacher.initial.safetensors", "scores/teacher/ks.json"
EXPORT, TABLE = "train export student --out student.onnx", "evaluate score scores --out table.json"
MADE = "manifests/teacher.json"
MANY = "evaluate many --manifests nowhere --corpora corpora --out made"
RUN = f"{SCORE} --out made/ks.json"
UPSTREAMS = "{fbank: {source: fbank, watch: params.yaml}, teacher: {source: teacher, watch: teacher}}"


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_world(tmp_path / "world", monkeypatch)


def trained(old: str, new: str, message: str) -> Row:
    """Return a row whose student's section has `new` in place of `old`."""
    return Row(new.replace("\n   ", ""), TRAIN, message, change_params(old, new))


def also(more: str, message: str) -> Row:
    """Return a row whose student's section has one more line."""
    return trained("steps: 4", f"steps: 4\n    {more}", message)


def scored(old: str, new: str, message: str) -> Row:
    return Row(new, RUN, message, change_params(old, new))


def changed(*keys: str, to: Any, message: str) -> Row:
    """Return a row whose score file has another value."""
    return Row(f"score {keys[0]} {json.dumps(to)}", TABLE, message, change_json(ONE, *keys, to=to))


def asked(name: str, line: str, message: str) -> Row:
    return Row(name, line, message)


def means_alone() -> None:
    done = run(EXTRACT.replace("new.json", "manifests/teacher.json") + " --keep pooled")
    assert done.exit_code == 0, done.output


def stem(kernels: Any, strides: Any) -> Damage:
    """Return a manifest with this shape of its teacher's stem."""
    return change_json(MADE, "stem", to={"conv_kernel": kernels, "conv_stride": strides})


def unrecorded(name: str, message: str, damage: Damage) -> Row:
    """Return a row whose manifest does not record the initial weights, as older versions wrote it."""

    def damages() -> None:
        change_json(MADE, "initial_weights", drop=True)()
        damage()

    return Row(name, TRAIN, message, damages)


def weights(metadata: str) -> None:
    save_file({"a": torch.zeros(1)}, WEIGHTS, metadata={"config": metadata})


PARAMS = [
    asked("no params", f"{TRAIN} --config none.yaml", "none.yaml does not exist; give the params file with --config"),
    asked("params a folder", f"{TRAIN} --config corpora", "corpora does not exist; give the params file"),
    Row("syntax", TRAIN, "params.yaml is not YAML: while parsing", write(P, "a: [1,\nb: }")),
    Row(
        "code",
        TRAIN,
        "is not YAML: could not determine a constructor",
        write(P, "train: !!python/object/apply:os.system ['touch ran']"),
    ),
    Row("a date", TRAIN, "is not YAML: month must be in", write(P, "train: 2026-99-99")),
    Row("a list", TRAIN, "holds a list, expected sections", write(P, "- a")),
    Row("empty", TRAIN, "holds a NoneType, expected sections", write(P, "")),
    Row("bytes", TRAIN, "is not YAML: 'utf-8' codec can't decode", write(P, b"\xff\xfe\x00\x01")),
    Row("no section", TRAIN, "has no section `train` with keys", change_params("train:", "trains:")),
    asked(
        "another student",
        TRAIN.replace("student tiny", "student huge"),
        "unknown student .*'huge': expected one of tiny",
    ),
    trained("family: distilhubert", "family: bert", "'bert': expected one of distilhubert, gendistiller"),
    trained("family: distilhubert", "famly: bert", "unknown key .*'famly': expected one of"),
    trained("steps: 4", "steps: many", "steps: got 'many', expected int"),
    trained("steps: 4", "steps: 0", "steps: got 0, expected at least 1"),
    trained("steps: 4", "steps: .nan", "steps: got nan, expected int"),
    trained("steps: 4", "steps: 1.5", "steps: got 1.5, expected int"),
    trained("steps: 4", "steps: true", "steps: got True, expected int"),
    also("seed: -1", "seed: got -1, expected at least 0"),
    also("optimiser: 3", "optimiser: got 3, expected a section"),
    also("optimiser: {lr: -1}", "optimiser.lr: got -1, expected more than 0"),
    also("optimiser: {lr: .inf}", "optimiser.lr: got inf, expected float"),
    also(f"optimiser: {{lr: 1{'0' * 400}}}", "optimiser.lr: got 1000.*, expected float"),
    also("optimiser: {betas: [1, 2]}", "optimiser.betas: got .*expected two numbers"),
    also("optimiser: {accumulate: 0}", "optimiser.accumulate: got 0, expected at least 1"),
    also("targets: [9]", "targets: .* has no layer 9; .*0, 2, 4"),
    also("targets: [4, 2]", "targets: got .4, 2., expected ascending layers"),
    also("targets: 4", "targets: got 4, expected a list"),
    also("train_splits: [tra]", "has no split 'tra'; it has dev, test, train"),
    also("dev_split: nope", "has no split 'nope'; .*dev_split: null.*--dev-share"),
    also("stem: stored", "stem: `stored` needs a frozen stem.*stem_grad_scale"),
    also("stem: stored\n    optimiser: {stem_grad_scale: 0}", "keeps frames, pooled .*--keep frames,pooled,stem"),
    also("init: random\n    optimiser: {stem_grad_scale: 0}", "stem_grad_scale: got 0, .*above 0"),
    trained("layers: 2", "layers: 0", "shape.layers: got 0, expected at least 1"),
    trained("dim: 32", "dim: 33", "shape.dim: got 33, expected a multiple of shape.heads"),
    trained("heads: 2", "heads: 0", "shape.heads: got 0, expected at least 1"),
    trained("ffn: 64", "ffn: -1", "shape.ffn: got -1, expected at least 1"),
    trained("dim: 32", "dim: 32, dropout: 2", "shape.dropout: got 2, expected at least 0 and below 1"),
    trained("stem_channels: 16", "stem_channels: 24", "the teacher's convolution stem does not fit"),
    trained("family: distilhubert", "family: interleaved\n    growth: {first: 0}", "first: got 0, expected at least 1"),
    trained(
        "family: distilhubert",
        "family: interleaved\n    growth: {first: 3}",
        "expected to reach 2; change shape.layers",
    ),
    trained("family: distilhubert", "family: gendistiller\n    generation: {forcing_first: 3}", "expected a share"),
]

TRAINING = [
    asked("no manifest", TRAIN.replace("teacher.json", "none.json"), "manifests/none.json does not exist"),
    asked(
        "another corpus", TRAIN.replace("tiny.json", "other.json"), "describes features of corpus tiny .*not of other"
    ),
    Row("means alone", TRAIN, "keeps pooled, .*--keep frames,pooled", means_alone),
    Row("weights lost", TRAIN, "initial.safetensors: file not found, .*--initial-blocks", remove(WEIGHTS)),
    Row("weights changed", TRAIN, "sha256 .* records .* sha256 .*--initial-blocks", write(WEIGHTS, "x" * 100)),
    unrecorded("no weights", "initial.safetensors not found, .*`init: random`", remove(WEIGHTS)),
    unrecorded("weights a folder", "initial.safetensors not found", folder(WEIGHTS)),
    unrecorded("weights empty", "initial.safetensors: .*header too small", write(WEIGHTS, "")),
    unrecorded("weights garbage", "initial.safetensors: not a readable file", write(WEIGHTS, "x" * 100)),
    unrecorded("weights' config", "initial.safetensors: not a readable file", lambda: weights("[1")),
    unrecorded("weights of another", "the teacher's convolution stem does not fit", lambda: weights("{}")),
    Row("stem of words", TRAIN, "stem.conv_kernel: got 'x', expected", stem("x", [5])),
    Row("stem of one", TRAIN, "stem: conv_kernel .10. .* 400 samples every 320; run", stem([10], [5])),
    Row("stem of millions", TRAIN, "expected lists of equal length", stem([10**30], [5])),
    Row(
        "filter banks",
        TRAIN,
        "holds filter banks, which have no conv",
        change_json(MADE, "upstream", "family", to="fbank"),
    ),
    # --out is replaced: only a student's folder may be there.
    asked("out holds data", TRAIN.replace("--out out", "--out corpora"), "--out corpora .*would be replaced"),
    asked("out is here", TRAIN.replace("--out out", "--out ."), "--out . .*would be replaced"),
    asked("out a file", TRAIN.replace("--out out", "--out params.yaml"), "--out params.yaml is a file; give a folder"),
    asked("out below a file", TRAIN.replace("--out out", "--out params.yaml/a"), "params.yaml is not a folder"),
    asked("run a file", f"{TRAIN} --run params.yaml", "--run .*params.yaml is not a folder"),
    asked("device", TRAIN.replace("device cpu", "device tpu"), "--device 'tpu': expected cpu, cuda, cuda:N or auto"),
    asked("device without data", TRAIN.replace("device cpu", "device meta"), "--device 'meta': expected cpu, cuda"),
    asked("device beyond", TRAIN.replace("device cpu", "device cuda:99"), "--device cuda:99: this machine has"),
]

EXPORTS = [
    asked("nothing", "train export none", "none/config.json does not exist"),
    asked("a file", "train export params.yaml", "params.yaml/config.json does not exist"),
    asked("a teacher", "train export teacher", "model_type is 'hubert', expected 'retort-student'"),
    Row("no weights", EXPORT, "student can't be opened as a student", remove("student/model.safetensors")),
    Row("garbage", EXPORT, "student can't be opened as a student", write("student/model.safetensors", "garbage" * 9)),
    Row(
        "architecture",
        EXPORT,
        "expected one of RetortStacked",
        change_json("student/config.json", "architectures", to=["X"]),
    ),
    Row("none", EXPORT, "architectures is None", change_json("student/config.json", "architectures", drop=True)),
    Row("width", EXPORT, "can't be opened as a student", change_json("student/config.json", "hidden_size", to=48)),
    Row("words", EXPORT, "can't be opened as a student", change_json("student/config.json", "hidden_size", to="x")),
    Row(
        "depth",
        EXPORT,
        "weights are missing, such as encoder.layers.2",
        change_json("student/config.json", "num_hidden_layers", to=5),
    ),
    asked("out a folder", "train export student --out corpora", "--out corpora is a folder; give a file"),
    asked("out below a file", "train export student --out params.yaml/x", "params.yaml is not a folder"),
    asked("format", "train export student --format tflite", "'tflite' is not one of 'onnx', 'hubert'"),
]

SCORES = [
    asked("task", RUN.replace("task ks", "task xx"), "unknown task 'xx': expected one of asr, asv"),
    asked(
        "label",
        RUN.replace("task ks", "task ic"),
        "has no label 'action', which task ic needs; it has keyword, text, the labels of .*ks",
    ),
    asked("another's features", RUN.replace("tiny.json", "other.json"), "not of other"),
    asked("out a folder", f"{SCORE} --out corpora", "--out corpora is a folder; give a file"),
    asked("out under a file", f"{SCORE} --out params.yaml/x/ks.json", "params.yaml is not a folder"),
    asked("no recipe", RUN.replace(P, "none.yaml"), "none.yaml does not exist"),
    asked("upstream climbs", f"{RUN} --upstream ../../x", "--upstream: got '../../x', expected a plain name"),
    scored("steps: 2", "steps: -2", "steps is -2, expected more than 0"),
    scored("steps: 2", "stepz: 2", "unknown key .*'stepz': expected one of"),
    scored("[0.01]", "[]", "learning_rates must be a list of one or more numbers above 0"),
    scored("[0.01]", "[0.01, 0.01]", "learning_rates names a rate twice"),
    scored("[0.01]", "[.nan]", "learning_rates: got nan, expected float"),
    scored("[0.01]", "0.01", "learning_rates: got 0.01, expected a list"),
    scored("  ks: {", "  kz: {", "unknown key in evaluate of params.yaml 'kz'"),
    scored("evaluations: 1", "evaluations: 1, seed: -1", "seed is -1, expected 0 or more"),
    asked("no score", "evaluate score none.json --out t.json", "'none.json' does not exist"),
    asked("no scores", "evaluate score data --out t.json", "no score files in data; make them with"),
    Row("score empty", TABLE, "scores/teacher/ks.json is not JSON", write(ONE, "")),
    Row("score a list", TABLE, "holds a JSON list, expected an object", write(ONE, "[]")),
    Row("score of nothing", TABLE, "scores/teacher/ks.json: `test` is missing", change_json(ONE, "test", drop=True)),
    changed("test", to=float("nan"), message="test: got nan"),
    changed("test", to="good", message="test: got 'good', expected float"),
    changed("interval", to=[1], message="interval: got .1."),
    changed("interval", to={"test": [1]}, message="scores/teacher/ks.json: interval"),
    changed("interval", to={"test": "ab"}, message="scores/teacher/ks.json: interval"),
    changed("upstream", to=3, message="upstream: got 3, expected str"),
    changed("upstream", to="again", message="again has task ks twice"),
    changed("recipe", to={}, message="differ in recipe"),
    changed("format_version", to=1, message="format_version: got 1, expected 3"),
    asked("one end", f"{TABLE} --fbank again", "needs both --fbank NAME and --teacher NAME"),
    asked("odd end", f"{TABLE} --fbank again --teacher nobody", "unknown upstream 'nobody': expected one of again"),
    asked("one end twice", f"{TABLE} --fbank again --teacher again", "needs a task on which the teacher is better"),
    asked("both scores", f"{TABLE} --fbank again --teacher teacher --official", "ask for one of them"),
    asked("not official", f"{TABLE} --official", "ks: 1 test .* 3081 .*official"),
    asked("table a folder", "evaluate score scores --out corpora", "--out corpora is a folder; give a file"),
    asked("table below a file", "evaluate score scores --out params.yaml/x", "params.yaml is not a folder"),
    asked("workers", f"{MANY} --workers -1", "give one, N > 0"),
    asked("two clusters", f"{MANY} --workers 1 --scheduler tcp://127.0.0.1:9", "give one, N > 0"),
    asked("no manifests", MANY, "nowhere/fbank/tiny.json does not exist"),
    asked("one task", f"{MANY} --task pr", "unknown task of params.yaml 'pr': expected one of ks"),
    asked("one upstream", f"{MANY} --upstream nobody", "unknown upstream of params.yaml 'nobody'"),
    Row("upstreams", MANY, "`upstreams` is 3, expected a section", change_params(UPSTREAMS, "3")),
    Row("upstream's path", MANY, "got '../x', expected a plain name", change_params(UPSTREAMS, "{../x: {}}")),
    Row("tasks", MANY, "expected a list of tasks for each corpus", change_params("{tiny: [ks]}", "[ks]")),
    Row("task twice", MANY, "`tasks` names a task twice", change_params("{tiny: [ks]}", "{tiny: [ks], other: [ks]}")),
    Row("odd task", MANY, "unknown task 'zz': expected one of asr", change_params("{tiny: [ks]}", "{tiny: [zz]}")),
]


@pytest.mark.parametrize("row", [*PARAMS, *TRAINING, *EXPORTS, *SCORES], ids=lambda row: row.name)
def test_refused(row: Row) -> None:
    check_refused(row)
    assert not Path("ran").exists()


def test_export_runs_no_code_of_the_folder() -> None:
    write("student/modeling_retort.py", "from pathlib import Path\nPath('ran').touch()\n")()
    before = tree()
    done = run(EXPORT)
    assert done.exit_code == 0, done.output
    assert {name for name in tree() if name not in before} == {"student.onnx"}


def test_only_a_student_is_replaced_by_a_student() -> None:
    """The rule that refuses other folders must allow a second run of the same command, as in `dvc repro`."""
    first = run(TRAIN)
    assert first.exit_code == 0, first.output
    again = run(TRAIN)
    assert again.exit_code == 0, again.output
    check_refused(Row("its parent", TRAIN.replace("--out out", "--out ."), "would be replaced"))
