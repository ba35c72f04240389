"""params.yaml: reading it, the corpora that it configures, and the rule by which defaults and changes are merged."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from extract.base.errors import RetortError

TRAINED_ON = "distill"  # the corpus of the teacher's store, which no task scores


class _Loader(yaml.SafeLoader):
    """PyYAML's loader with YAML 1.2's floats: `5e-4` is a number, as it is for DVC, not a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def read_params(path: Path) -> dict[str, Any]:
    """Read a params file as a mapping. Raises RetortError if it is missing, not YAML, or not a mapping."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise RetortError(f"{path} does not exist; give the params file with --config") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date is a ValueError
        raise RetortError(f"{path} is not YAML: {error}") from None
    if not isinstance(value, dict):
        raise RetortError(f"{path} holds a {type(value).__name__}, expected sections such as `train` and `evaluate`")
    return value


def read_section(path: Path, name: str) -> dict[str, Any]:
    """Read one section of a params file. Raises RetortError if it is missing or not a mapping."""
    section = read_params(path).get(name)
    if not isinstance(section, dict):
        raise RetortError(f"{path} has no section `{name}` with keys")
    return section


def configured(section: Mapping[str, Any], name: str, params: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the lines of section `name` (`features` or `tasks`, one for each corpus) whose corpus is in `corpora`.

    `corpora` alone decides what is used: lines of other corpora are skipped. A file without that section uses all
    lines. Raises RetortError for a corpus of `corpora` that is scored and has no line: one of the names is misspelt.
    """
    corpora = params.get("corpora", section)
    if not isinstance(corpora, Mapping):
        raise RetortError(f"{path}: `corpora` is {corpora!r:.60}, expected one key for each corpus")
    if missing := [corpus for corpus in corpora if corpus not in section and corpus != TRAINED_ON]:
        odd = ", ".join(corpus for corpus in section if corpus not in corpora)
        raise RetortError(
            f"{path}: corpus {missing[0]!r} of `corpora` has no line in `{name}`"
            + (f", which has lines for {odd}, not configured" if odd else "")
            + "; correct the name, add the line, or delete the corpus"
        )
    return {corpus: value for corpus, value in section.items() if corpus in corpora}


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` changed by `change`: mappings merge key by key, everything else (lists, null, …) replaces."""
    merged = dict(base)
    for key, value in change.items():
        both_map = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both_map else value
    return merged
