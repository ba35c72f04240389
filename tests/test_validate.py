"""Validator of JSON and YAML values: conversion by type hint, and one-line errors that name the key and the value."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from extract.base.errors import RetortError
from extract.base.params import read_params
from extract.base.validate import check_fields, convert, parse


@dataclass(frozen=True)
class Part:
    size: int
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.size < 0:
            raise RetortError(f"size: got {self.size}, expected 0 or more")


@dataclass(frozen=True)
class Whole:
    part: Part
    parts: tuple[Part, ...] = ()


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (float, 3, 3.0),
        (int | None, None, None),
        (str | int, 5, 5),
        (bool | int | float | tuple[float, ...], [1, 2.5], (1.0, 2.5)),
        (tuple[float, float], [1, 2], (1.0, 2.0)),
        (list[int], [1], [1]),
        (dict[int, str], {"4": "x"}, {4: "x"}),
        (dict[str, Any], {"x": [1]}, {"x": [1]}),
        (Whole, {"part": {"size": 1}, "parts": [{"size": 2, "kind": "b"}]}, Whole(Part(1), (Part(2, "b"),))),
    ],
)
def test_values_are_converted_to_their_type(hint: Any, value: object, expected: object) -> None:
    found = convert(hint, value, where="here")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value", "named"),
    [
        (int, True, ["here: got True", "int"]),
        (float, "0.5", ["got '0.5'", "float"]),
        (float, float("inf"), ["got inf", "float"]),
        (float, 10**400, ["got 1000", "float"]),
        (str, None, ["got None", "str"]),
        (tuple[float, float], [1], ["got [1]", "a list of 2"]),
        (dict[int, str], {"x": "y"}, ["'x'", "int keys"]),
        (Literal["a", "b"], "c", ["'c'", "a, b"]),
        (Whole, {"part": {"size": -1}}, ["here.part.size", "-1"]),
        (Whole, {"part": {"size": 1, "sizes": 2}}, ["here.part", "'sizes'", "kind, size"]),
        (Whole, {"part": {}}, ["here.part", "`size` is missing"]),
        (Whole, 3, ["got 3", "keys"]),
    ],
)
def test_an_invalid_value_is_one_line_with_its_key(hint: Any, value: object, named: list[str]) -> None:
    with pytest.raises(RetortError) as caught:
        convert(hint, value, where="here")
    assert all(name in str(caught.value) for name in named), caught.value
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_the_file_is_named_before_the_key() -> None:
    with pytest.raises(RetortError, match=r"^a\.json: part\.size: got 'x', expected int$"):
        parse(Whole, {"part": {"size": "x"}}, where="a.json")
    with pytest.raises(RetortError, match=r"^a\.json: `digest` is missing; expected file, digest$"):
        check_fields({"file": str, "digest": str}, {"file": "x", "other": 1}, where="a.json")


def test_params_have_the_floats_of_yaml_1_2(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    params.write_text("a: 5e-4\nb: 1e5\nc: '5e-4'\nd: 1.5\ne: 5e\nf: -2E+3\n")
    assert read_params(params) == {"a": 5e-4, "b": 1e5, "c": "5e-4", "d": 1.5, "e": "5e", "f": -2e3}
