"""Section `upstreams` of params.yaml: the models whose features are extracted and scored, one row of results each."""

from dataclasses import dataclass
from pathlib import Path

from extract.base.errors import RetortError
from extract.base.files import read_json
from extract.base.params import read_section
from extract.base.validate import check_name, parse

STUDENT_CODE = Path(__file__).parents[2] / "train/modeling_retort.py"


@dataclass(frozen=True)
class ConfiguredUpstream:
    """One row of the section."""

    source: str  # `fbank`, a local folder, an .onnx file, or a hub id: org/name or org/name@REVISION
    watch: str | None = None  # file or folder whose change makes the upstream a new one, for DVC


def read_upstreams(path: Path) -> dict[str, ConfiguredUpstream]:
    """Return name -> upstream in the order of the file. Raises RetortError for an empty or invalid section."""
    section = read_section(path, "upstreams")
    where = f"{path}: upstreams"
    if not section:
        raise RetortError(f"{where}: the section is empty, expected NAME: {{source: fbank, a folder or a hub id}}")
    for name in section:
        check_name(str(name), where=where)
    return {str(name): parse(ConfiguredUpstream, value, where=f"{where}.{name}") for name, value in section.items()}


def brings_own_code(folder: Path | None) -> bool:
    """Return whether the only code in an upstream's folder is this repository's student code, byte for byte."""
    if folder is None or not (folder / "config.json").is_file():
        return False
    code = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.py")}
    named = read_json(folder / "config.json").get("auto_map")
    return (
        code == {STUDENT_CODE.name: STUDENT_CODE.read_bytes()}
        and isinstance(named, dict)
        # A name such as OWNER/REPO--MODULE.CLASS would load code from the hub.
        and all(str(name).startswith(f"{STUDENT_CODE.stem}.") for name in named.values())
    )
