"""`python -m pipelines bench all`: the benchmarks, one after another, and the page that is made of their figures.

Each benchmark is run by its own command, with the arguments that stand in its record and on the page. BENCHMARKS.json,
beside the page, holds every result by size. It is written after each benchmark, so that a killed run continues there.
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
from pipelines.bench.measure import Benchmark, library_versions
from pipelines.bench.page import write_page

ROOT = Path(__file__).parents[2]
SIZES = ("tiny", "small", "base")
# The figures of every benchmark depend on all of this. One digest: a change measures more than it must, never less.
CODE = (
    *(f"{room}/**/*.py" for room in ("extract", "train", "evaluate")),
    *("pipelines/bench/*.py", "pipelines/studies/*.yaml", "pipelines/teacher/model/config.json", "params.yaml"),
)


def run_suite(
    commands: Mapping[str, Command],
    benchmarks: Mapping[str, Benchmark[Any]],
    out: Path,
    *,
    size: str,
    only: tuple[str, ...],
    again: bool,
    render: bool,
) -> Iterator[str]:
    """Measure what is missing or outdated, and write the page; yield a line on each benchmark.

    Raises RetortError for an unknown size or benchmark, and for `render` if there are no figures.
    """
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    for name in only:
        if name not in benchmarks:
            raise unknown("benchmark (--only)", name, benchmarks)
    figures = out.with_suffix(".json")
    _check_files(out, figures, again=again, render=render)
    records: dict[str, dict[str, Any]] = read_json(figures) if figures.is_file() else {}
    if not all(isinstance(one, dict) and one.keys() <= benchmarks.keys() for one in records.values()):
        raise RetortError(f"--out {out}: {figures} does not hold figures of benchmarks; give another page")
    for name in () if render else only or benchmarks:
        record, arguments = records.setdefault(size, {}).get(name), benchmarks[name].sizes[size]
        changed = _changed(arguments, record) if record is not None and not again else ""
        if record is not None and not again and not changed:
            yield f"{name}: up to date, skipped"
            continue
        yield f"{name}: measuring" + (f" (changed: {changed})" if changed else "")
        records[size][name] = _measure(commands[name], benchmarks[name], arguments)
        _write(figures, records)  # after each: a killed run continues here
        write_page(out, records, benchmarks)
    write_page(out, records, benchmarks)
    yield f"{out}: written, with the figures in {figures}"


def _check_files(out: Path, figures: Path, *, again: bool, render: bool) -> None:
    if again and render:
        raise RetortError("--again measures everything, --render nothing: give one of them")
    check_out(out, "--out")
    check_out(figures, "--out")
    if figures == out:  # `--out page.json`
        raise RetortError(f"--out {out}: the figures go to {figures}; give the page another suffix, such as .md")
    if render and not figures.is_file():
        raise RetortError(f"--render: {figures} does not exist; run `python -m pipelines bench all` without --render")


def _measure(command: Command, benchmark: Benchmark[Any], arguments: str) -> dict[str, Any]:
    """Run the command of a benchmark."""
    start = time.monotonic()
    # The command writes a file; the record of all benchmarks is written by _write.
    with TemporaryDirectory(prefix="retort-bench-") as folder:
        out = Path(folder) / f"{benchmark.name}.json"
        result = command.main([*shlex.split(arguments), "--out", str(out)], benchmark.name, standalone_mode=False)
    return {
        "arguments": arguments,
        "code": code_digest(),
        "took_s": round(time.monotonic() - start),
        "result": json.loads(json.dumps(result)),  # as it will be read; the command's own file has sorted keys
    }


def _changed(arguments: str, record: Mapping[str, Any]) -> str:
    """Return what has changed since a record was made, empty if nothing has."""
    # The load average differs from run to run and does not make figures outdated.
    machine = {key: value for key, value in record["result"]["machine"].items() if key != "load_before"}
    then_and_now = {
        "settings": (record["arguments"], arguments),
        "code": (record["code"], code_digest()),
        "libraries": (record["result"]["versions"], library_versions()),
        "machine": (machine, describe_machine()),
    }
    return ", ".join(name for name, (then, now) in then_and_now.items() if then != now)


def code_digest() -> str:
    """Return the digest of the measured code and of the benchmarks' own."""
    return sha256_matching(ROOT, CODE)


def _write(path: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Write JSON with one line a benchmark, so that a difference names the benchmark."""
    sizes = []
    for size, of_size in records.items():
        lines = [f" {json.dumps(name)}: {json.dumps(record)}" for name, record in of_size.items()]
        sizes.append(f"{json.dumps(size)}: {{\n" + ",\n".join(lines) + "\n}")
    with written_aside(path) as aside:
        aside.write_text("{\n" + ",\n".join(sizes) + "\n}\n", encoding="utf-8")
