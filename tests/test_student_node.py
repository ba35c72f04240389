"""A machine with the corpus card and its index, a manifest, its initial weights and the store: no audio, no teacher."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

from tests.bad_input_world import EXTRACT, PARAMS, SCORE, TRAIN, enter_world, run, tree

FBANK = EXTRACT.replace("teacher", "fbank").replace("0,2,4", "0,1").replace("96", "400")
STORED = {"stem": "stored", "optimiser": {"stem_grad_scale": 0.0}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a store with the stem, train and score there, and then delete the audio, the teacher and the data set."""
    folder = tmp_path_factory.mktemp("made") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        enter_world(folder, patch)
        _make()
    return folder


@pytest.fixture
def node(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy what is left to a new working folder, the node's."""
    shutil.copytree(made, tmp_path / "node")
    monkeypatch.chdir(tmp_path / "node")
    return tmp_path / "node"


def _make() -> None:
    params = yaml.safe_load(PARAMS)
    for name in ("distilhubert", "gendistiller"):  # the second scores dev with teacher forcing, too
        shape = params["train"]["tiny"]["shape"] | {"layers": 1}
        params["train"][name] = {"family": name, "steps": 4, "shape": shape, "dev_every": 2} | STORED
    Path("params.yaml").write_text(yaml.safe_dump(params))
    for line in (
        f"{EXTRACT} --keep frames,pooled,stem --initial-blocks 2",
        *(train_line(name, "whole") for name in ("distilhubert", "gendistiller")),
        f"{SCORE} --out whole/ks.json",
    ):
        done = run(line)
        assert done.exit_code == 0, done.output
    for path in ("teacher", "data", "student"):
        shutil.rmtree(path)
    Path("corpora/tiny.h5").unlink()


def train_line(name: str, folder: str) -> str:
    options = f"--student {name} --out {folder}/{name} --run {folder}/runs/{name}"
    return f"train run --manifest new.json --corpus corpora/tiny.json --device cpu {options}"


@pytest.mark.parametrize("name", ["distilhubert", "gendistiller"])
def test_a_student_is_the_one_of_the_whole_machine(node: Path, name: str) -> None:
    done = run(train_line(name, "alone"))
    assert done.exit_code == 0, done.output
    expected, found = (load_file(folder / name / "model.safetensors") for folder in (node / "whole", node / "alone"))
    assert expected.keys() == found.keys() and all((expected[key] == found[key]).all() for key in expected)
    whole, alone = (
        json.loads((node / folder / f"runs/{name}/metrics.json").read_text()) for folder in ("whole", "alone")
    )
    for field in ("loss", "dev_by_layer", "exposure_bias"):
        assert alone[field] == whole[field]
    assert alone["loss"]["dev"] == alone["loss"]["dev_stored_stem"] > 0


def test_heads_are_scored_with_the_labels_of_the_index(node: Path) -> None:
    done = run(f"{SCORE} --out alone/ks.json")
    assert done.exit_code == 0, done.output
    whole, alone = (json.loads((node / folder / "ks.json").read_text()) for folder in ("whole", "alone"))
    assert whole.keys() == alone.keys()
    assert {key for key in whole if whole[key] != alone[key]} <= {"seconds", "upstream"}  # upstream: the folder's name


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (TRAIN, ["stem: `waveforms` needs waveforms", "`stem: stored`", "--keep frames,pooled,stem"]),
        (FBANK, ["extraction needs waveforms"]),
        ("extract plan --upstream fbank --corpus corpora/tiny.json --pack-frames 400", ["needs waveforms"]),
        ("extract speed --upstream fbank=fbank", ["needs waveforms"]),
    ],
)
def test_audio_that_is_needed_is_named(node: Path, line: str, parts: list[str]) -> None:
    before = tree()
    done = run(line)
    assert done.exit_code == 1 and done.output.splitlines()[-1].startswith("error: ")
    (error,) = (line for line in done.output.splitlines() if line.startswith("error: "))
    assert all(part in error for part in [*parts, f"copy its audio to {node / 'corpora/tiny.h5'}"])
    assert tree() == before
