"""A small working folder for tests of invalid input: each test damages a copy, and a refused command changes nothing.

corpora/    tiny (yes and no, train, dev and test), and another one        teacher/   a HuBERT with random weights
stores/     the teacher's features, int8                                   student/   a Retort student
manifests/  of them, with the teacher's seed                               scores/    of one task, by two upstreams
params.yaml                                                                data/      a data set folder that is read
"""

import atexit
import hashlib
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import zarr
from click.testing import CliRunner, Result
from transformers import HubertConfig, HubertModel

from evaluate.__main__ import main as evaluate_main
from extract.__main__ import main as extract_main
from extract.corpus_writer import write_corpus
from pipelines.__main__ import main as pipelines_main
from tests.conftest import TINY, noise_utterances, save_teacher
from train.__main__ import main as train_main
from train.modeling_retort import RetortStackedStudent, RetortStudentConfig
from train.student_folder import save_student

ROOMS = {"extract": extract_main, "train": train_main, "evaluate": evaluate_main, "pipelines": pipelines_main}
PARAMS = """\
students: [tiny]
upstreams: {fbank: {source: fbank, watch: params.yaml}, teacher: {source: teacher, watch: teacher}}
tasks: {tiny: [ks]}
demo: {scale: 0.02}
train:
  tiny:
    family: distilhubert
    steps: 4
    shape: {layers: 2, dim: 32, ffn: 64, heads: 2, stem_channels: 16, position_kernel: 16, position_groups: 4}
evaluate:
  ks: {learning_rates: [0.01], steps: 2, batch_size: 4, dev_evaluations: 1}
report:
  speed: {corpus: corpora/tiny.json, split: test, audio_seconds: 1, threads: 1, rounds: 1}
"""
EXTRACT = (
    "extract run --upstream teacher --corpus corpora/tiny.json --manifest new.json --layers 0,2,4 --pack-frames 96"
)
TRAIN = "train run --student tiny --manifest manifests/teacher.json --corpus corpora/tiny.json --out out --device cpu"
SCORE = "evaluate run --task ks --config params.yaml --manifest manifests/teacher.json --corpus corpora/tiny.json"


@cache
def _whole_world() -> Path:
    """Make the valid folder once per process, by the commands themselves."""
    folder = Path(tempfile.mkdtemp(prefix="retort-bad-input-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, seed in (("tiny", 0), ("other", 1)):
            utterances = noise_utterances(10, seed=seed, longest=20_000)
            write_corpus(Path(f"corpora/{name}.h5"), name=name, reader="folder", utterances=utterances)
        torch.manual_seed(0)
        save_teacher(HubertModel(HubertConfig(**TINY)), Path("teacher"))
        shape = {key: value for key, value in TINY.items() if key != "num_hidden_layers"}
        student = RetortStackedStudent(RetortStudentConfig(**shape, num_hidden_layers=2))
        save_student(Path("student"), student, made_from={})
        Path("params.yaml").write_text(PARAMS)
        for place in ("data/mine", "data/empty", "scores"):
            Path(place).mkdir(parents=True)
        soundfile.write("data/mine/one.wav", np.random.default_rng(0).normal(size=8_000) * 0.1, 16_000)
        Path("data/mine/metadata.csv").write_text("file,speaker,keyword\none.wav,ann,yes\n")
        for line in (
            f"{EXTRACT.replace('new.json', 'manifests/teacher.json')} --initial-blocks 2 --shard-packs 2",
            f"{SCORE} --out scores/teacher/ks.json",
            f"{SCORE} --out scores/again/ks.json",
        ):
            done = run(line)
            assert done.exit_code == 0, done.output
    return folder


def enter_world(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Copy the world to `folder`, which must not exist, and make it the working folder."""
    shutil.copytree(_whole_world(), folder)
    patch.chdir(folder)


def run(line: str) -> Result:
    """Run a command line, without its `python -m`, in this process."""
    room, *arguments = shlex.split(line)
    return CliRunner().invoke(ROOMS[room], arguments)


def tree(folder: Path = Path()) -> dict[str, str]:
    """Return the sha256 of every file below a folder, and `/` for every folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "/"
        for path in folder.rglob("*")
    }


Damage = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One invalid input: the damage, the command, and a pattern that its one error line must match."""

    name: str
    line: str
    message: str
    damage: Damage = lambda: None


def check_refused(row: Row) -> None:
    """Check for exit status 1, one error line that matches, and no byte changed in the working folder."""
    row.damage()
    before = tree()
    done = run(row.line)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 1, done.output
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and done.stderr.count("error: ") == 1
    assert re.search(row.message, last), last
    assert tree() == before


def write(path: str, text: str | bytes) -> Damage:
    """Write a file, replacing any other."""

    def damage() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(text.encode() if isinstance(text, str) else text)

    return damage


def remove(*paths: str) -> Damage:
    return lambda: [Path(path).unlink() for path in paths]


def folder(pattern: str) -> Damage:
    """Put a folder where a file is expected."""

    def damage() -> None:
        path = _first(pattern)
        path.unlink(missing_ok=True)
        path.mkdir(parents=True)

    return damage


def cut(pattern: str, kept: int) -> Damage:
    """Keep only the first bytes of a file."""
    return lambda: _first(pattern).write_bytes(_first(pattern).read_bytes()[:kept])


def _first(pattern: str) -> Path:
    """Return the first file that matches a pattern, or the pattern as a new path."""
    return min(Path().glob(pattern), default=Path(pattern))


def flip(pattern: str, place: int) -> Damage:
    """Flip one bit of the first file that matches the pattern."""

    def damage() -> None:
        path = _first(pattern)
        content = bytearray(path.read_bytes())
        content[place] ^= 64
        path.write_bytes(content)

    return damage


def change_json(path: str, *keys: str, to: Any = None, drop: bool = False) -> Damage:
    """Change or drop one value of a JSON file, found by its keys."""

    def damage() -> None:
        whole = value = json.loads(Path(path).read_text())
        for key in keys[:-1]:
            value = value[key]
        if drop:
            del value[keys[-1]]
        else:
            value[keys[-1]] = to
        Path(path).write_text(json.dumps(whole))

    return damage


def change_params(old: str, new: str) -> Damage:
    """Replace a text in params.yaml."""

    def damage() -> None:
        text = Path("params.yaml").read_text()
        assert old in text
        Path("params.yaml").write_text(text.replace(old, new))

    return damage


def change_array(name: str, **changes: Any) -> Damage:
    """Replace an array of the store by one of another shape or type, and its sizes and digests in the manifest."""

    def damage() -> None:
        manifest = json.loads(Path("manifests/teacher.json").read_text())
        place = Path(manifest["store"]["root"]) / manifest["store"]["path"]
        group = zarr.open_group(place, mode="r+")
        array = group[name]
        made = np.ones(changes.get("shape", array.shape), changes.get("dtype", array.dtype))
        group.create_array(name, data=made, chunks=made.shape, overwrite=True, compressors=None)
        objects = {key: value for key, value in objects_at(place).items() if not key.startswith(f"{name}/")}
        for file in (place / name).rglob("*"):
            if file.is_file():
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                objects[file.relative_to(place).as_posix()] = [file.stat().st_size, digest]
        list_objects(sorted(objects.items()))

    return damage


# A row of `objects.bin`, as extract/store/objects.py documents it.
LISTED = np.dtype([("name", "S40"), ("bytes", "<i8"), ("sha256", "V32")])


def objects_at(place: Path) -> dict[str, list[Any]]:
    """Read the list of a store's objects."""
    rows = np.fromfile(place / "objects.bin", dtype=LISTED)
    return {row["name"].decode(): [int(row["bytes"]), bytes(row["sha256"]).hex()] for row in rows}


def list_objects(objects: list[tuple[str, list[Any]]]) -> None:
    """Write another list of the store's objects; the manifest then fits it."""
    manifest = json.loads(Path("manifests/teacher.json").read_text())
    rows = np.array([(name.encode(), size, bytes.fromhex(sha)) for name, (size, sha) in objects], dtype=LISTED)
    (Path(manifest["store"]["root"]) / manifest["store"]["path"] / "objects.bin").write_bytes(rows.tobytes())
    totals: dict[str, list[int]] = {}
    for name, (size, _) in objects:
        array = "metadata" if name.endswith("zarr.json") else name.partition("/")[0]
        totals.setdefault(array, [0, 0])
        totals[array] = [totals[array][0] + 1, totals[array][1] + size]
    listed = [rows.nbytes, hashlib.sha256(rows.tobytes()).hexdigest()]
    Path("manifests/teacher.json").write_text(json.dumps(manifest | {"object_list": listed, "totals": totals}))


def as_format_2(path: str = "manifests/teacher.json") -> None:
    """Convert a manifest and its store to those of version 0.2.0, which had the list of objects in the manifest."""
    manifest = json.loads(Path(path).read_text())
    place = Path(manifest["store"]["root"]) / manifest["store"]["path"]
    for key in ("object_list", "totals", "num_dropped"):
        del manifest[key]
    manifest |= {"format_version": 2, "objects": objects_at(place), "dropped": []}
    (place / "objects.bin").unlink()
    for file in (Path(path), place / "manifest.json"):
        file.write_text(json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def both(*damages: Damage) -> Damage:
    return lambda: [damage() for damage in damages]
