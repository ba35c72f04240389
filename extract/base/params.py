"""params.yaml, parsed at the edge: sections become frozen dataclasses, whatever does not fit is an error that says so.

A field without a default must be given; a nested dataclass is a nested section; `Literal` lists the valid values. A
dataclass may refuse values in `__post_init__` with a RetortError, whose message begins with the field.
"""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from extract.base.errors import RetortError, unknown

T = TypeVar("T")


def read_params(path: Path) -> dict[str, Any]:
    """A params file as a mapping. Raises RetortError when it is missing, no YAML, or no mapping."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise RetortError(f"{path} does not exist; give the params file with --config") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        raise RetortError(f"{path} is not YAML: {error}") from None
    if not isinstance(value, dict):
        raise RetortError(f"{path} holds a {type(value).__name__}, expected sections such as `train` and `evaluate`")
    return value


def read_section(path: Path, name: str) -> dict[str, Any]:
    """One section of a params file. Raises RetortError when it is missing or no mapping."""
    section = read_params(path).get(name)
    if not isinstance(section, dict):
        raise RetortError(f"{path} has no section `{name}` with keys")
    return section


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` changed by `change`: mappings merge key by key, everything else (lists, null, …) replaces."""
    merged = dict(base)
    for key, value in change.items():
        both_map = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both_map else value
    return merged


def parse(kind: type[T], value: object, *, where: str) -> T:
    """A mapping from YAML as the dataclass `kind`; nested ones too. Raises RetortError that names the place."""
    if not isinstance(value, dict):
        raise RetortError(f"{where}: got {value!r}, expected a section with keys")
    hints = get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise unknown(f"key in {where}", str(key), hints)
    for one in fields(kind):  # type: ignore[arg-type]
        required = one.default is MISSING and one.default_factory is MISSING
        if required and one.name not in value:
            raise RetortError(f"{where}: `{one.name}` is missing; keys are {', '.join(hints)}")
    converted = {key: _convert(hints[key], item, f"{where}.{key}") for key, item in value.items()}
    try:
        return kind(**converted)
    except RetortError as error:
        raise RetortError(f"{where}.{error}") from None


def _convert(hint: Any, value: object, where: str) -> Any:
    origin = get_origin(hint)
    if is_dataclass(hint):
        return parse(hint, value, where=where)  # type: ignore[arg-type]
    if origin is Literal:
        if value not in get_args(hint):
            raise unknown(where, str(value), get_args(hint))
        return value
    if origin in (Union, types.UnionType):
        kind = next(one for one in get_args(hint) if one is not type(None))
        return None if value is None else _convert(kind, value, where)
    if hint is Any:
        return value
    if origin is dict:
        key_kind, kind = get_args(hint)
        if not isinstance(value, dict) or (key_kind is int and not all(str(key).isdecimal() for key in value)):
            raise RetortError(f"{where}: got {value!r}, expected a section with {key_kind.__name__} keys")
        return {key_kind(key): _convert(kind, item, f"{where}.{key}") for key, item in value.items()}
    if origin is tuple:
        if not isinstance(value, list):
            raise RetortError(f"{where}: got {value!r}, expected a list")
        return tuple(_convert(get_args(hint)[0], item, where) for item in value)
    return _scalar(hint, value, where)


def _scalar(kind: type, value: object, where: str) -> Any:
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:  # PyYAML reads 5e-4 as a string, YAML 1.2 (and DVC) as a number
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise RetortError(f"{where}: got {value!r}, expected {kind.__name__}")
