"""`python -m pipelines bench all`: the benchmarks, one after another, and the page that is made of their figures.

Each is run by its own command, with the arguments that stand below and on the page. BENCHMARKS.json, beside the page,
has all that they returned, by size; it is written after each of them, so that a killed run goes on.
"""

import json
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from click import Command

from extract.base.errors import RetortError, unknown
from extract.base.files import check_out, read_json, sha256_matching, written_aside
from extract.base.machine import describe_machine
from pipelines.bench.measure import library_versions
from pipelines.bench.page import write_page

ROOT = Path(__file__).parents[2]
_DEMO = "--threads 1 --shape hubert-demo"
_TINY_STEPS = "--seconds 12 --pack-frames 800 --rounds 1"
SIZES = {
    "tiny": {
        "extract": "--threads 1 --seconds 4 --rounds 1 --pack-frames 800",
        "load": "--threads 1 --packs 2 --dim 160 --pack-frames 800 --rounds 1",
        "train": f"{_DEMO} --student distilhubert {_TINY_STEPS} --steps 1",
        "growth": f"{_DEMO} --student interleaved {_TINY_STEPS} --steps 8",
        "evaluate": f"{_DEMO} --batch-size 2 --steps 1 --rounds 1",
        "infer": f"{_DEMO} --students distilhubert --seconds 0.5 --utterances 2 --rounds 1",
        "scaling": "--threads 1 --seconds 8 --rounds 1 --pack-frames 800",
        "profile": "--seconds 12 --pack-frames 800 --steps 1 --rounds 1",
    },
    "small": {
        "extract": "--threads 1 --seconds 180 --rounds 3",
        "load": "--threads 1 --packs 4 --rounds 3",
        "train": f"{_DEMO} --student distilhubert --seconds 90 --pack-frames 2048 --steps 2 --rounds 3",
        "growth": f"{_DEMO} --student interleaved --seconds 90 --pack-frames 2048 --steps 8 --rounds 1",
        "evaluate": f"{_DEMO} --steps 4 --rounds 3",
        "infer": f"{_DEMO} --students distilhubert,layerwise,gendistiller,gendistiller-2d --seconds 10 --rounds 3",
        "scaling": "--threads 1 --seconds 60 --rounds 2",
        "profile": "--rounds 3",
    },
    "base": {
        "extract": "--threads 1 --shape hubert-base --seconds 120 --rounds 2",
        "load": "--threads 1 --packs 8 --rounds 3",
        "train": "--threads 1 --seconds 64 --pack-frames 800 --rounds 2",
        "growth": "--threads 1 --seconds 64 --pack-frames 800 --steps 8 --rounds 1",
        "evaluate": "--threads 1 --rounds 2",
        "infer": "--threads 1 --seconds 10 --utterances 3 --rounds 2",
        "scaling": "--threads 1 --shape hubert-base --seconds 60 --rounds 1",
        "profile": "--shape hubert-base --student layerwise-12x384 --seconds 64 --pack-frames 800 --rounds 1",
    },
}
# What a benchmark's figures depend on, beside the benchmark itself.
_FRAME = ("pipelines/bench/measure.py", "pipelines/bench/material.py", "pipelines/teacher/model/config.json")
_STEPS = ("extract/*.py", "train/*.py", "pipelines/bench/train.py", "params.yaml", "pipelines/studies/*.yaml")
CODE = {
    "extract": ("extract/*.py", "pipelines/bench/extract.py"),
    "load": ("extract/*.py", "train/*.py", "pipelines/bench/load.py", "params.yaml"),
    "train": _STEPS,
    "growth": (*_STEPS, "pipelines/bench/growth.py"),
    "evaluate": ("extract/*.py", "evaluate/**/*.py", "pipelines/bench/evaluate.py"),
    "infer": (*_STEPS, "pipelines/bench/infer.py"),
    "scaling": ("extract/*.py", "train/data.py", "pipelines/bench/extract.py", "pipelines/bench/scaling.py"),
    "profile": (*_STEPS, "evaluate/**/*.py", "pipelines/bench/evaluate.py", "pipelines/bench/hotpath.py"),
}


def run_suite(
    commands: Mapping[str, Command], out: Path, *, size: str, only: tuple[str, ...], again: bool, render: bool
) -> Iterator[str]:
    """Measure what is missing or has changed, and write the page; says what is kept.

    Raises RetortError for an unknown size or benchmark, and for `render` where there are no figures.
    """
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    for name in only:
        if name not in CODE:
            raise unknown("benchmark (--only)", name, CODE)
    if again and render:
        raise RetortError("--again measures all, --render measures nothing: give one of them")
    figures = out.with_suffix(".json")
    check_out(out, "--out")
    check_out(figures, "--out")
    if figures == out:
        raise RetortError(f"--out {out}: the figures go to {figures}; give the page another suffix, such as .md")
    if render and not figures.is_file():
        raise RetortError(f"--render: {figures} does not exist; run `python -m pipelines bench all` without --render")
    kept: dict[str, dict[str, Any]] = read_json(figures) if figures.is_file() else {}
    if not all(isinstance(records, dict) and records.keys() <= CODE.keys() for records in kept.values()):
        raise RetortError(f"--out {out}: {figures} holds something else than figures of benchmarks; give another page")
    for name in () if render else only or CODE:
        record = kept.setdefault(size, {}).get(name)
        if record is not None and not again and not (changed := _changed(name, SIZES[size][name], record)):
            yield f"{name}: kept, nothing that it depends on has changed"
            continue
        yield f"{name}: {'other ' + changed if record is not None and not again else 'measuring'}"
        kept[size][name] = _measure(commands[name], SIZES[size][name])
        _write(figures, kept)
        write_page(out, kept)
    write_page(out, kept)
    yield f"{out}: written, with the figures in {figures}"


def _measure(command: Command, arguments: str) -> dict[str, Any]:
    """Run a benchmark's own command."""
    name = str(command.name)
    start = time.monotonic()
    with TemporaryDirectory(prefix="retort-bench-") as folder:
        result = Path(folder) / f"{name}.json"
        asked = [*shlex.split(arguments), "--out", str(result)]
        figures = command.main(asked, name, standalone_mode=False)
    return {
        "arguments": arguments,
        "code": code_digest(name),
        "took_s": round(time.monotonic() - start),
        "result": json.loads(json.dumps(figures)),  # as it will be read; a file of its own would have its keys sorted
    }


def _changed(name: str, arguments: str, record: dict[str, Any]) -> str:
    """What a record's figures were made of that is not so now; empty where all of it is."""
    machine = {key: value for key, value in record["result"]["machine"].items() if key != "load_before"}
    now = {
        "settings": (record["arguments"], arguments),
        "code": (record["code"], code_digest(name)),
        "libraries": (record["result"]["versions"], library_versions()),
        "machine": (machine, describe_machine()),
    }
    return ", ".join(what for what, (then, today) in now.items() if then != today)


def code_digest(name: str) -> str:
    """The digest of the code that a benchmark measures and of its own."""
    return sha256_matching(ROOT, (*_FRAME, *CODE[name]))


def _write(path: Path, kept: dict[str, dict[str, Any]]) -> None:
    """As JSON with a line a benchmark: raw figures are many, and a difference should name the benchmark."""
    sizes = []
    for size, records in kept.items():
        lines = [f" {json.dumps(name)}: {json.dumps(record)}" for name, record in records.items()]
        sizes.append(f"{json.dumps(size)}: {{\n" + ",\n".join(lines) + "\n}")
    with written_aside(path) as aside:
        aside.write_text("{\n" + ",\n".join(sizes) + "\n}\n", encoding="utf-8")
