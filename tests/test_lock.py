"""The lock files fit pyproject.toml, and every library that the code imports is a stated dependency."""

import ast
import importlib.util
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ("3.11", "3.12", "3.13")
ROOMS = ("extract", "train", "evaluate", "pipelines")

_spec = importlib.util.spec_from_file_location("refresh", ROOT / "requirements" / "refresh.py")
assert _spec is not None and _spec.loader is not None
refresh = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refresh)


def locked(file: str, python: str) -> dict[str, str]:
    """The version of each package that a lock gives one Python on Linux x86-64."""
    system = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    found = {}
    for line in (ROOT / "requirements" / file).read_text().splitlines():
        if re.match(r"[A-Za-z0-9]", line):
            pin = Requirement(line.removesuffix("\\").strip())
            if pin.marker is None or pin.marker.evaluate(system):
                (specifier,) = pin.specifier
                assert specifier.operator == "==" and pin.name not in found
                found[canonicalize_name(pin.name)] = specifier.version
    return found


def requirements(*extras: str) -> list[Requirement]:
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [one for line in lines if (one := Requirement(line)).name != PROJECT["name"]]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("file", "extras"), [("run.lock", ()), ("dev.lock", tuple(PROJECT["optional-dependencies"]))])
def test_every_dependency_is_locked_within_its_range(file: str, extras: tuple[str, ...], python: str) -> None:
    pins = locked(file, python)
    for wanted in requirements(*extras):
        version = pins[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(version, prereleases=True), f"{wanted}, locked {version}"


@pytest.mark.parametrize("python", PYTHONS)
def test_the_locks_hold_the_same_versions(python: str) -> None:
    run, dev, without = (locked(file, python) for file in ("run.lock", "dev.lock", "without-torch.lock"))
    assert run.items() <= dev.items()
    assert without.items() < run.items()
    assert {"torch", "torchaudio", "triton"} <= run.keys() - without.keys()
    assert not [name for name in without if name.startswith(("torch", "nvidia-cu", "cuda-"))]
    assert "nvidia-ml-py" in without  # dvclive needs it, and pip refuses a lock that lacks a dependency


def test_every_version_of_a_lock_has_digests_and_names_no_host() -> None:
    for file in ("run.lock", "dev.lock", "without-torch.lock"):
        text = (ROOT / "requirements" / file).read_text()
        pins = re.findall(r"^[A-Za-z0-9].*\n    (.*)", text, re.MULTILINE)
        assert len(pins) > 100 and all(re.match("--hash=sha256:[0-9a-f]{64}", line) for line in pins)
        assert "://" not in text


def test_what_the_rooms_import_is_a_dependency() -> None:
    listed = requirements(*PROJECT["optional-dependencies"])
    stated = {canonicalize_name(one.name) for one in listed} | {extra for one in listed for extra in one.extras}
    distributions = packages_distributions()
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            for name in imported(file) - set(sys.stdlib_module_names) - {*ROOMS, "docs"}:
                owners = {canonicalize_name(owner) for owner in distributions.get(name, [name])}
                assert owners & stated, f"{file.relative_to(ROOT)} imports {name}, which pyproject.toml does not list"


def imported(file: Path) -> set[str]:
    """The top-level names that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found


LOCK = """# a comment
numpy==2.4.6 ; python_full_version < '3.12' \\
    --hash=sha256:aa
    # via zarr
numpy==2.5.5 ; python_full_version >= '3.12' \\
    --hash=sha256:bb
torch==2.14.1 \\
    --hash=sha256:cc
    # via retort
zarr==3.4.2 \\
    --hash=sha256:dd
"""


def test_refresh_reads_pins_and_says_what_changed() -> None:
    before = refresh.pins(LOCK)
    assert before == {
        "numpy": "2.4.6 (python_full_version < '3.12'), 2.5.5 (python_full_version >= '3.12')",
        "torch": "2.14.1",
        "zarr": "3.4.2",
    }
    after = before | {"torch": "2.15.0", "obstore": "0.12.1"}
    del after["zarr"]
    assert refresh.changes(before, after) == ["added obstore 0.12.1", "torch 2.14.1 -> 2.15.0", "removed zarr 3.4.2"]
    assert refresh.changes(before, before) == []


def test_what_else_needs_a_package_of_nvidias_keeps_it() -> None:
    needs = {
        "cuda-toolkit": "# via torch",
        "dvclive": "# via retort (pyproject.toml)",
        "nvidia-cublas": "# via\n    #   cuda-toolkit\n    #   torch",
        "nvidia-ml-py": "# via\n    #   -c requirements/dev.lock\n    #   dvclive",
        "sympy": "# via torch",
        "torch": "# via\n    #   retort (pyproject.toml)\n    #   torchaudio",
        "torchaudio": "# via retort (pyproject.toml)",
    }
    lock = "".join(f"{name}==1 \\\n    --hash=sha256:aa\n    {via}\n" for name, via in needs.items())
    assert refresh.torch_packages(lock) == {"torch", "torchaudio", "cuda-toolkit", "nvidia-cublas"}


def test_refresh_drops_a_package_with_its_digests() -> None:
    kept = refresh.drop_packages(LOCK, {"torch"})
    assert refresh.pins(kept).keys() == {"numpy", "zarr"}
    assert "cc" not in kept and "via retort" not in kept and "sha256:dd" in kept
