"""Make the lock files from the ranges of pyproject.toml, and print what changed.

    python requirements/refresh.py                    newest versions that the ranges admit
    python requirements/refresh.py --only torch       torch alone may move
    python requirements/refresh.py --keep             no version moves; for a changed list of dependencies

    run.lock             what the pipeline needs
    dev.lock             run.lock, the extras, and what tests and checks need
    without-torch.lock   run.lock without torch, torchaudio and their CUDA libraries, for another build of that pair

Every file holds exact versions with sha256 digests, for Python 3.11 and newer and every platform that the packages
support, so that `pip install -r` needs no resolver. Needs uv (`pip install uv`), or installs it into a temporary
virtual environment.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = Path("requirements")
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)(?: *; *([^\\]*?))? *\\?$")
_TORCH = ("torch", "torchaudio")
_OF_A_BUILD = re.compile(r"(triton|nvidia-.*|cuda-.*)$")  # another build of torch brings its own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    moves = parser.add_mutually_exclusive_group()
    moves.add_argument("--only", action="append", metavar="NAME", default=[], help="only this package may move")
    moves.add_argument("--keep", action="store_true", help="no package may move unless pyproject.toml asks for it")
    arguments = parser.parse_args()
    upgrade = [f"--upgrade-package={name}" for name in arguments.only]
    if not arguments.only and not arguments.keep:
        upgrade = ["--upgrade"]
    files = [ROOT / FOLDER / name for name in ("run.lock", "dev.lock", "without-torch.lock")]
    before = {file: file.read_text() if file.is_file() else "" for file in files}
    run, dev, without_torch = files
    with tempfile.TemporaryDirectory() as scratch:
        uv = find_uv(Path(scratch))
        compile_lock(uv, dev, "--all-extras", *upgrade)
        compile_lock(uv, run, "--constraint", str(FOLDER / dev.name))
    without_torch.write_text(drop_packages(run.read_text(), torch_packages(run.read_text())))
    for file in files:
        lines = changes(pins(before[file]), pins(file.read_text()))
        print(f"{FOLDER / file.name}: {len(lines)} changes", *lines, sep="\n  ")


def find_uv(scratch: Path) -> str:
    """Return the path of uv; without one, install it into a virtual environment in `scratch`."""
    if found := shutil.which("uv"):
        return found
    venv.create(scratch / "venv", with_pip=True)
    python = scratch / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
    return str(python.with_name("uv"))


def compile_lock(uv: str, file: Path, *options: str) -> None:
    """Resolve pyproject.toml into a lock file. Versions that the file holds stay where `options` do not move them."""
    command = [uv, "pip", "compile", "--quiet", "--universal", "--python-version=3.11", "--generate-hashes"]
    command += ["--custom-compile-command=python requirements/refresh.py", *options]
    done = subprocess.run([*command, "pyproject.toml", "--output-file", str(file.relative_to(ROOT))], cwd=ROOT)
    if done.returncode:
        sys.exit(f"error: uv found no set of versions for {file.name}; its reasons stand above, change pyproject.toml")


def pins(lock: str) -> dict[str, str]:
    """Return the version of each package of a lock, the versions of several Pythons side by side."""
    found: dict[str, list[str]] = {}
    for line in lock.splitlines():
        if match := _PIN.match(line):
            name, version, marker = match.groups()
            found.setdefault(name, []).append(version + (f" ({marker.strip()})" if marker else ""))
    return {name: ", ".join(versions) for name, versions in found.items()}


def changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return one line for each package that was added, removed or moved."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is None:
            lines.append(f"added {name} {new}")
        elif new is None:
            lines.append(f"removed {name} {old}")
        elif old != new:
            lines.append(f"{name} {old} -> {new}")
    return lines


def torch_packages(lock: str) -> set[str]:
    """Return torch, torchaudio and the CUDA packages that nothing else in a lock needs."""
    needed_by: dict[str, set[str]] = {}
    name = ""
    for line in lock.splitlines():
        if match := _PIN.match(line):
            name = match.group(1)
            needed_by.setdefault(name, set())
        elif line.startswith("    #") and not line.startswith("    #   -c "):
            needed_by[name] |= set(line.removeprefix("    #").replace("via", "", 1).split())
    found = set(_TORCH)
    while more := {
        name
        for name, others in needed_by.items()
        if name not in found and _OF_A_BUILD.match(name) and others and others <= found
    }:
        found |= more
    return found


def drop_packages(lock: str, names: set[str]) -> str:
    """Return a lock without the packages of these names: their pins, digests and comments."""
    kept, dropping = [], False
    for line in lock.splitlines(keepends=True):
        if match := _PIN.match(line.rstrip("\n")):
            dropping = match.group(1) in names
        if not dropping:
            kept.append(line)
    return "".join(kept)


if __name__ == "__main__":
    main()
