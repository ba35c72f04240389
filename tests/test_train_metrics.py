"""runs/NAME/metrics.json: read as written, and an error that names the field if a file does not fit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from extract.base.errors import RetortError
from train.metrics import CodeScore, GrowthStep, LayerError, RunLoss, RunMetrics

METRICS = RunMetrics(
    student="one",
    family="interleaved",
    teacher="f1" * 32,
    seed=3,
    config={"optimiser": {"betas": [0.9, 0.98]}},
    versions={"torch": "2.14.1"},
    params=10,
    training_params=12,
    steps=8,
    epochs=1.6,
    seconds=2.0,
    audio_seconds_per_second=100.0,
    loader_wait_share=0.25,
    processes=1,
    loss=RunLoss(train=0.5, dev=None, dev_stored_stem=None),
    dev_by_layer={4: LayerError(0.1, 0.9, 0.2), 12: LayerError(0.3, 0.8, 0.4)},
    from_teacher=("stem",),
    not_from_teacher={"projection": "other shape"},
    growth=(GrowthStep(0, 3), GrowthStep(4, 6)),
    exposure_bias=None,
    codes_by_layer={4: CodeScore(0.5, 0.25, 0.125)},
)


def test_metrics_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "runs/one/metrics.json"
    METRICS.write(path)
    assert RunMetrics.read(path) == METRICS
    value = json.loads(path.read_text())
    assert value["format_version"] == 1
    assert value["dev_by_layer"]["12"] == {"l1": 0.3, "cosine": 0.8, "mse": 0.4}
    assert value["codes_by_layer"] == {"4": {"probe_mse": 0.5, "probe_accuracy": 0.25, "accuracy": 0.125}}
    assert value["growth"] == [{"step": 0, "layers": 3}, {"step": 4, "layers": 6}]
    assert value["loss"] == {"train": 0.5, "dev": None, "dev_stored_stem": None}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"format_version": 2}, ["format_version", "2", "expected 1"]),
        ({"spread": 1}, ["'spread'"]),
        ({"seconds": None}, ["seconds", "None", "float"]),
        ({"loss": {"dev": 0.4}}, ["loss", "`train`"]),
        ({"loss": {"train": 0.4, "dev": 0.4, "test": 0.4}}, ["loss", "'test'"]),
        ({"dev_by_layer": {"first": {}}}, ["dev_by_layer", "'first'"]),
        ({"dev_by_layer": {"4": {"l1": 1.0, "mse": 1.0}}}, ["dev_by_layer.4", "`cosine`"]),
        ({"not_from_teacher": {"stem": 1}}, ["not_from_teacher.stem", "1"]),
        ({"versions": []}, ["versions", "[]"]),
        ({"growth": 3}, ["growth", "3"]),
    ],
)
def test_a_field_that_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], names: list[str]) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(METRICS.to_dict() | changes))
    with pytest.raises(RetortError) as caught:
        RunMetrics.read(path)
    assert all(name in str(caught.value) for name in [str(path), *names])


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    optional = {"provenance", "codes_by_layer", "dev_curve", "dev_teacher", "stem_teacher", "stores"}
    for name in METRICS.to_dict().keys() - optional:
        value = METRICS.to_dict()
        del value[name]
        with pytest.raises(RetortError, match=name):
            RunMetrics.from_dict(value, path=tmp_path / "metrics.json")


def test_metrics_of_a_version_without_provenance_are_read(tmp_path: Path) -> None:
    value = METRICS.to_dict()
    del value["provenance"]
    assert RunMetrics.from_dict(value, path=tmp_path / "metrics.json") == METRICS


def test_runs_are_read_without_torch() -> None:
    code = "import sys, train.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
