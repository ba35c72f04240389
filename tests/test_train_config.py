"""Settings of students from params.yaml: errors name the place and the valid names."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from extract.base.errors import RetortError
from extract.base.params import merge, read_section
from extract.base.validate import parse
from train.config import OptimiserConfig, StudentConfig, read_student
from train.losses import build_distiller

ROOT = Path(__file__).parents[1]

SHAPE = {"layers": 2, "dim": 16, "ffn": 32, "heads": 2}


def section(**changes: Any) -> dict[str, Any]:
    return {"family": "distilhubert", "steps": 10, "shape": SHAPE} | changes


def test_reads_a_section(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text(
        "train:\n  one:\n    family: interleaved\n    steps: 10\n    targets: [4, 8, 12]\n"
        "    shape: {layers: 12, dim: 32, ffn: 64, heads: 4}\n    optimiser: {lr: 5e-4, betas: [0.9, 0.999]}\n"
        "    growth: {schedule: proportional, exponent: 2}\n    dev_split: null\n"
    )
    config = read_student(params, "one")
    assert (config.family, config.targets, config.dev_split) == ("interleaved", (4, 8, 12), None)
    assert config.optimiser == OptimiserConfig(lr=5e-4, betas=(0.9, 0.999))
    assert config.growth.exponent == 2.0 and config.growth.first == 3


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"family": "distillhubert"}, ["here.family", "'distillhubert'", "distilhubert", "gendistiller"]),
        ({"stepz": 3}, ["key in here", "'stepz'", "steps"]),
        ({"optimiser": {"lrr": 1}}, ["key in here.optimiser", "'lrr'", "weight_decay"]),
        ({"optimiser": {"lr": "fast"}}, ["here.optimiser.lr", "'fast'", "float"]),
        ({"optimiser": {"lr": float("nan")}}, ["here.optimiser.lr", "float"]),
        ({"steps": 1.5}, ["here.steps", "1.5", "int"]),
        ({"optimiser": {"ema": 1.0}}, ["optimiser.ema", "got 1", "below 1"]),
        ({"steps": True}, ["here.steps", "True", "int"]),
        ({"steps": 0}, ["here.steps", "at least 1"]),
        ({"shape": SHAPE | {"heads": 3}}, ["shape.dim", "16", "multiple of shape.heads (3)"]),
        ({"shape": {"layers": 2}}, ["here.shape", "`dim` is missing"]),
        ({"shape": 12}, ["here.shape", "12", "a section"]),
        ({"targets": "4,8"}, ["here.targets", "a list"]),
        ({"targets": [8, 4]}, ["here.targets", "ascending"]),
        ({"dev_split": "train"}, ["here.dev_split", "'train'", "train_splits"]),
        ({"generation": {"forcing_last": 1.5}}, ["here.generation.forcing_last", "1.5", "0 to 1"]),
        ({"growth": {"optimiser": "keep"}}, ["here.growth.optimiser", "copy-reset-step"]),
        ({"loss": "ce"}, ["here.loss", "'ce'", "codes, l1-cosine, mse"]),
        ({"loss": "codes"}, ["loss: `codes`", "codebook"]),
        ({"codebook": "../k"}, ["codebook", "plain name"]),
        ({"codebook": "k", "dev_split": None}, ["codebook", "dev_split"]),
        ({"family": "gendistiller", "loss": "codes", "codebook": "k"}, ["loss", "`codes`", "gendistiller"]),
        ({"init": "random", "optimiser": {"stem_grad_scale": 0}}, ["stem_grad_scale", "freezes"]),
    ],
)
def test_a_wrong_value_is_named(changes: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(RetortError) as caught:
        parse(StudentConfig, section(**changes), where="here")
    for message in messages:
        assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_student_and_missing_section(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    with pytest.raises(RetortError, match="does not exist"):
        read_student(params, "one")
    params.write_text("train: {one: {}, two: {}}\n")
    with pytest.raises(RetortError, match=r"unknown student .*'three': expected one of one, two"):
        read_student(params, "three")
    with pytest.raises(RetortError, match=r"train.one: `family` is missing"):
        read_student(params, "one")
    params.write_text("evaluate: {}\n")
    with pytest.raises(RetortError, match="no section `train`"):
        read_student(params, "one")
    params.write_text("a: [\n")
    with pytest.raises(RetortError, match="not YAML"):
        read_student(params, "one")


def test_merge_replaces_all_but_mappings() -> None:
    base = {"a": {"x": 1, "y": [1, 2], "z": {"deep": 1}}, "b": 2, "c": {"k": 1}, "d": 4}
    change = {"a": {"y": [3], "z": {"more": 2}}, "b": {"new": 1}, "c": None, "e": 5}
    kept = copy.deepcopy(base)
    expected = {"a": {"x": 1, "y": [3], "z": {"deep": 1, "more": 2}}, "b": {"new": 1}, "c": None, "d": 4, "e": 5}
    assert merge(base, change) == expected
    assert base == kept


def test_a_student_is_merged_over_the_defaults(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    defaults = {"steps": 20, "targets": [4, 8, 12], "shape": SHAPE | {"dropout": 0.0}, "optimiser": {"lr": 2e-3}}
    one = {"family": "distilhubert", "targets": [6], "shape": {"dim": 32}, "optimiser": {"clip": 1.0}}
    params.write_text(yaml.safe_dump({"train": {"defaults": defaults, "one": one, "two": 3}}))
    expected = section(
        steps=20, targets=[6], shape=SHAPE | {"dropout": 0.0, "dim": 32}, optimiser={"lr": 2e-3, "clip": 1.0}
    )
    assert read_student(params, "one") == parse(StudentConfig, expected, where="here")
    with pytest.raises(RetortError, match="expected one of one, two"):
        read_student(params, "defaults")
    with pytest.raises(RetortError, match=r"train\.two: got 3"):
        read_student(params, "two")
    params.write_text(yaml.safe_dump({"train": {"defaults": [1], "one": one}}))
    with pytest.raises(RetortError, match=r"train\.defaults: got \[1\]"):
        read_student(params, "one")


def test_students_that_the_repository_ships() -> None:
    """Check that each student of the demo has at most a quarter of its teacher's parameters."""
    students = read_section(ROOT / "params.yaml", "train")
    with safe_open(ROOT / "pipelines/teacher/model/model.safetensors", framework="pt") as teacher:
        most = sum(math.prod(teacher.get_slice(name).get_shape()) for name in teacher.keys()) / 4  # noqa: SIM118
    assert students.keys() == {"defaults", "distilhubert", "layerwise", "interleaved", "gendistiller"}
    for name in students.keys() - {"defaults"}:
        config = read_student(ROOT / "params.yaml", name)
        with torch.device("meta"):
            distiller = build_distiller(config, targets=(4, 8, 12), teacher_dim=160, normalise=False)
        assert sum(parameter.numel() for parameter in distiller.student.parameters()) <= most, name
