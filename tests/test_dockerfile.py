"""Dockerfile: its files exist and are sent, its shell parses, its Python is one that Retort admits."""

import json
import re
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Return instruction and argument of each line, joined where it continues."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = filter(None, text.replace("\\\n", "").splitlines())
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def arguments(instructions: list[tuple[str, str]], name: str) -> list[str]:
    return [rest for instruction, rest in instructions if instruction == name]


def sent(path: str) -> bool:
    """Return whether .dockerignore leaves a path in: its last pattern that matches decides."""
    decided = True
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#") and fnmatch(path, pattern.removeprefix("!")):
            decided = pattern.startswith("!")
    return decided


def test_copied_files_exist_and_are_sent(instructions: list[tuple[str, str]]) -> None:
    (copied,) = arguments(instructions, "COPY")
    *sources, target = copied.split()
    assert sources and all((ROOT / source).is_file() and sent(source) for source in sources)
    installed = re.findall(r"--requirement ([^\s;]+)", " ".join(arguments(instructions, "RUN")))
    assert {target + Path(source).name for source in sources} == set(installed)
    assert not sent("dvc.yaml") and not sent(".git/config")


def test_python_is_admitted(instructions: list[tuple[str, str]]) -> None:
    (image,) = arguments(instructions, "FROM")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    found = re.fullmatch(r"python:(3\.\d+)-slim", image)
    assert found and found[1] in SpecifierSet(wanted)


def test_shell_parses_and_the_user_is_not_root(instructions: list[tuple[str, str]]) -> None:
    for command in arguments(instructions, "RUN"):
        subprocess.run(["sh", "-n", "-c", command], check=True)
    assert arguments(instructions, "USER") == ["retort"]
    (command,) = arguments(instructions, "CMD")
    assert json.loads(command) == ["dvc", "repro"]
