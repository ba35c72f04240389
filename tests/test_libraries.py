"""A library that does not load is one line that names it and the lock files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT


def run_with(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python with packages of `folder` found before the installed ones."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def package(folder: Path, name: str, code: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    return folder


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("h5py", "raise OSError('undefined symbol: H5Pset_x')"),
        ("zarr", "raise RuntimeError('needs numpy 3')"),
        ("zarr", "__version__ = '2.18'"),  # an old one, without the modules that we import
        ("click", "raise ImportError('cannot import')"),
        ("click", "from nowhere import something"),
    ],
)
def test_a_library_that_does_not_load_is_one_line(tmp_path: Path, name: str, code: str) -> None:
    done = run_with(package(tmp_path, name, code), "-m", "extract", "verify", "nowhere.json")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "requirements/run.lock" in done.stderr
    assert ("nowhere" if "nowhere" in code else name) in done.stderr


def test_torchaudio_of_another_torch_is_one_line(tmp_path: Path) -> None:
    broken = package(tmp_path, "torchaudio", "raise OSError('undefined symbol: torch_exception_get_what')")
    done = run_with(broken, "-c", "import extract.audio")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("extract.base.errors.RetortError: torchaudio does not load beside torch")
    assert "undefined symbol" in last and "requirements/run.lock" in last


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    code = "import extract.base.libraries\nfrom extract.base.files import not_there"
    done = run_with(tmp_path, "-c", code)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and "not_there" in done.stderr


@pytest.mark.parametrize("room", ["extract", "train", "evaluate", "pipelines"])
def test_version(room: str) -> None:
    done = run_with(Path(), "-m", room, "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("retort ") and done.stdout.split()[1].count(".") == 2
