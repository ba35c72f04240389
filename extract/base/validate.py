"""Validation of untrusted values: JSON and YAML become typed values, and names stay in their folder.

One interpreter of type hints serves every file that Retort reads: params.yaml, manifests, score files, checkpoints'
metadata. A file that Retort wrote fits without fail. One that a person edited, another version wrote or somebody else
sent may hold anything, and is refused here with one line before a path is built from it or a byte is read.
"""

import math
import re
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from extract.base.errors import RetortError, unknown

_SHOWN = 60  # characters of a value that an error line quotes
T = TypeVar("T")


def parse(kind: type[T], value: object, *, where: str) -> T:
    """Convert a mapping to the dataclass `kind`; nested dataclasses are nested mappings.

    A field without a default is required, and a key that is not a field is refused. The dataclass may refuse values in
    `__post_init__` with a RetortError whose message begins with the field.
    Raises RetortError that begins with `where`, the file and the path in it.
    """
    if not isinstance(value, dict):
        raise RetortError(f"{where}: got {_quoted(value)}, expected a section with keys")
    hints = get_type_hints(kind)
    for key in value:
        if key not in hints:
            raise unknown(f"key in {where}", str(key), hints)
    for one in fields(kind):  # type: ignore[arg-type]
        required = one.default is MISSING and one.default_factory is MISSING
        if required and one.name not in value:
            raise RetortError(f"{where}: `{one.name}` is missing; keys are {', '.join(hints)}")
    converted = {key: convert(hints[key], item, where=_key_of(where, key)) for key, item in value.items()}
    try:
        return kind(**converted)
    except RetortError as error:
        raise RetortError(_key_of(where, error)) from None


def check_fields(hints: Mapping[str, Any], value: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Return the fields named by `hints` (name -> type), converted; other keys of the mapping are ignored.

    Raises RetortError for a field that is missing or of another type.
    """
    for name in hints:
        if name not in value:
            raise RetortError(f"{where}: `{name}` is missing; expected {', '.join(hints)}")
    return {name: convert(hint, value[name], where=_key_of(where, name)) for name, hint in hints.items()}


def convert(hint: Any, value: object, *, where: str) -> Any:
    """Convert a JSON or YAML value to the type `hint`. Raises RetortError, which begins with `where`, if it differs.

    hint: a scalar type, a dataclass, Any, Literal, a union, list[X], tuple[X, ...], tuple[X, Y], dict[str, X], or
    dict[int, X], whose keys are text in JSON.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint):
        return parse(hint, value, where=where)  # type: ignore[arg-type]
    if origin is Literal:
        if value not in inner:
            raise unknown(where, str(value), inner)
        return value
    if origin in (Union, types.UnionType):
        return _one_of(inner, value, where)
    if origin is dict:
        if isinstance(value, dict) and (inner[0] is str or all(str(key).isdecimal() for key in value)):
            return {inner[0](key): convert(inner[1], item, where=_key_of(where, key)) for key, item in value.items()}
        raise RetortError(f"{where}: got {_quoted(value)}, expected a mapping with {inner[0].__name__} keys")
    if origin in (list, tuple):
        fixed = inner if origin is tuple and Ellipsis not in inner else ()
        if not isinstance(value, list | tuple) or (fixed and len(fixed) != len(value)):
            length = f" of {len(fixed)}" if fixed else ""
            raise RetortError(f"{where}: got {_quoted(value)}, expected a list{length}")
        kinds = fixed or inner[:1] * len(value)
        return origin(convert(kind, item, where=where) for kind, item in zip(kinds, value, strict=True))
    return _scalar(hint, value, where)


def _one_of(kinds: tuple[Any, ...], value: object, where: str) -> Any:
    """Convert a value to the first type of a union that it fits; the error is that of the last one.

    A mapping is converted to the mapping of the union, if it has one, so that an error names the key.
    """
    if value is None and types.NoneType in kinds:
        return None
    mappings = tuple(kind for kind in kinds if get_origin(kind) is dict)
    if isinstance(value, dict) and mappings:
        kinds = mappings
    *others, last = (kind for kind in kinds if kind is not types.NoneType)
    for kind in others:
        with suppress(RetortError):
            return convert(kind, value, where=where)
    return convert(last, value, where=where)


def _scalar(kind: type, value: object, where: str) -> Any:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer beyond float64's range
            if math.isfinite(number := float(value)):
                return number
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise RetortError(f"{where}: got {_quoted(value)}, expected {kind.__name__}")


def _key_of(where: str, key: object) -> str:
    """Name a key of a file, or of a section of one: `pr.json: interval.also`."""
    return f"{where}: {key}" if where.endswith(".json") else f"{where}.{key}"


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def is_plain(text: str) -> bool:
    """Return True for a text that is not empty and has no control characters and no halves of a surrogate pair."""
    return bool(text) and not re.search("[\x00-\x1f\x7f\ud800-\udfff]", text)


def check_name(name: str, *, where: str) -> None:
    """Raise RetortError for a name that is not one part of a path: it could lead out of the folder it is for."""
    if name in (".", "..") or not is_plain(name) or re.search(r"[/\\]", name):
        raise RetortError(f"{where}: got {name!r}, expected a plain name without slashes")


def check_below(path: str, *, where: str) -> None:
    """Raise RetortError for a path that is absolute or leads upwards."""
    for part in path.split("/"):
        if part in (".", "..") or not is_plain(part) or "\\" in part:
            raise RetortError(f"{where}: got {path!r}, expected a path below the root, without `..`")
