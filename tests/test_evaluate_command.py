"""Commands of `python -m evaluate`: files, one-line errors, exit status, imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from evaluate_stores import class_corpus, make_store

from evaluate.__main__ import main

CONFIG = (
    "evaluate:\n  ks:\n    head_seeds: 1\n    learning_rates: [1e-2, 1e-3]\n    steps: 20\n    dev_evaluations: 2\n"
)


def command(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def ready(tmp_path: Path) -> list[str | Path]:
    """Return valid arguments of a run that writes scores/hand/ks.json."""
    card, hidden = class_corpus(tmp_path)
    config = tmp_path / "params.yaml"
    config.write_text(CONFIG)
    manifest = make_store(tmp_path, card, hidden, keep=["pooled"])
    out = tmp_path / "scores/hand/ks.json"
    return ["--config", config, "--manifest", manifest, "--corpus", card, "--out", out]


def test_run_writes_the_score_and_prints_it(tmp_path: Path, ready: list[str | Path]) -> None:
    result = command("run", "--task", "ks", "--upstream", "mine", *ready)
    assert result.exit_code == 0, result.output
    score = json.loads((tmp_path / "scores/hand/ks.json").read_text())
    assert (score["upstream"], score["task"], score["metric"], score["unit"]) == ("mine", "ks", "acc", "percent")
    assert "keyword spotting, ACC 100.00% on 12 test utterances, 95% interval 100.00 to 100.00" in result.stdout
    assert "20/20 steps" in result.stderr
    assert [path.name for path in (tmp_path / "scores/hand").iterdir()] == ["ks.json"]


def test_the_upstream_is_by_default_the_folder_of_out(tmp_path: Path, ready: list[str | Path]) -> None:
    assert command("run", "--task", "ks", *ready).exit_code == 0
    assert json.loads((tmp_path / "scores/hand/ks.json").read_text())["upstream"] == "hand"


def test_score_prints_a_table_and_writes_it(tmp_path: Path, ready: list[str | Path]) -> None:
    for upstream, changed in (("fbank", {"test": 40.0}), ("teacher", {"test": 90.0}), ("small", {"test": 65.0})):
        out = tmp_path / "scores" / upstream / "ks.json"
        if not (tmp_path / "scores/fbank").exists():
            assert command("run", "--task", "ks", *ready[:-1], out).exit_code == 0
            made = json.loads(out.read_text())
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(made | changed | {"upstream": upstream}))
    arguments = ["score", tmp_path / "scores", "--fbank", "fbank", "--teacher", "teacher"]
    result = command(*arguments, "--out", tmp_path / "superb.json")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines() if "65.00" in line]
    assert rows[0][-2] == "500"
    assert "of 1000 points" in result.output
    assert "it is not superb_s" in result.output
    assert json.loads((tmp_path / "superb.json").read_text())["upstreams"]["small"]["relative_score"] == 500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--task": "kws"}, "error: unknown task 'kws': expected one of asr, asv, er, ic, ks, pr, qbe, sd, sf, sid"),
        ({"--config": "none.yaml"}, "error: none.yaml does not exist"),
        ({"--corpus": "none.json"}, "error: none.json does not exist"),
        ({"--manifest": "none.json"}, "error: none.json does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(ready: list[str | Path], change: dict[str, str], message: str) -> None:
    pairs = dict(zip(ready[::2], ready[1::2], strict=True)) | {"--task": "ks"} | change
    result = command("run", *(item for pair in pairs.items() for item in pair))
    assert result.exit_code == 1
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["run", "many"])
def test_a_device_that_is_not_here_is_one_line(name: str, ready: list[str | Path]) -> None:
    arguments = ["--task", "ks", *ready] if name == "run" else []
    for device, message in (("cuda:99", "this machine has"), ("tpu", "expected cpu, cuda or cuda:N"), ("mps", "expec")):
        result = command(name, *arguments, "--device", device)
        assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evaluate: {ks: {stepz: 3}}", "unknown key in evaluate.ks of"),
        ("evaluate: {kws: {steps: 3}}", "unknown key in evaluate of"),
        ("train: {}", "has no section `evaluate`"),
        ("[1, 2]", "holds a list, expected sections"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_params_file_is_one_line(tmp_path: Path, ready: list[str | Path], text: str, message: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    result = command("run", "--task", "ks", *ready)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "scores").exists()


def test_an_interrupted_run_leaves_an_earlier_score_as_it_was(
    tmp_path: Path, ready: list[str | Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "scores/hand/ks.json"
    assert command("run", "--task", "ks", *ready).exit_code == 0
    before = out.read_bytes()

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("evaluate.sweep.HeadTraining.step", stop)
    result = command("run", "--task", "ks", *ready)
    assert result.exit_code == 1
    assert "interrupted" in result.stderr
    assert out.read_bytes() == before


def run_python(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": "."}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout


def test_help_and_the_table_need_no_torch_and_scoring_no_transformers() -> None:
    assert "no" in run_python(
        "import evaluate.__main__, evaluate.table, sys; print('no' if 'torch' not in sys.modules else 'torch')"
    )
    heavy = "{'transformers', 'torchaudio', 'scipy', 'torch._dynamo', 'matplotlib', 'pandas'}"
    code = f"import evaluate.tasks, evaluate.jobs, sys; print(sorted({heavy} & set(sys.modules)))"
    assert run_python(code).strip() == "[]"
