"""What a file from somebody else may say: values of the types expected, and names that stay in their folder.

JSON that one of our commands wrote fits without fail; what a person edited, another version wrote or a stranger sent
may hold anything. It is refused here, in one line, before a path is built from it or a byte is read.
"""

import re
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

from extract.base.errors import RetortError

_SHOWN = 60  # characters of a value that an error shows


def check_type(hint: Any, value: object, *, where: str) -> None:
    """Raises RetortError unless a JSON value is of the type `hint`: a scalar, a dict by string, a tuple or a list."""
    if not _fits(hint, value):
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
        raise RetortError(f"{where}: got {shown}, expected {getattr(hint, '__name__', hint)}")


def check_fields(fields: Mapping[str, Any], value: Mapping[str, object], *, where: str) -> None:
    """Raises RetortError unless all `fields` (name -> type) are there and of their types; others may be there too."""
    for name, hint in fields.items():
        if name not in value:
            raise RetortError(f"{where} has no field {name!r}; expected {', '.join(fields)}")
        check_type(hint, value[name], where=f"{where}.{name}")


def is_plain(text: str) -> bool:
    """Whether a text is there and holds neither control characters nor halves of a surrogate pair."""
    return bool(text) and not re.search("[\x00-\x1f\x7f\ud800-\udfff]", text)


def check_name(name: str, *, where: str) -> None:
    """Raises RetortError for a name that is no single part of a path: it would lead out of the folder it is for."""
    if name in (".", "..") or not is_plain(name) or re.search(r"[/\\]", name):
        raise RetortError(f"{where}: got {name!r}, expected a plain name without slashes")


def check_below(path: str, *, where: str) -> None:
    """Raises RetortError for a path that is absolute or leads upwards."""
    for part in path.split("/"):
        if part in (".", "..") or not is_plain(part) or "\\" in part:
            raise RetortError(f"{where}: got {path!r}, expected a path below the root, without `..`")


def _fits(hint: Any, value: object) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(one, value) for one in inner)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(inner[1], item) for item in value.values())
    if origin in (tuple, list):
        return isinstance(value, list | tuple) and all(_fits(inner[0], item) for item in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, int | float if hint is float else hint)
